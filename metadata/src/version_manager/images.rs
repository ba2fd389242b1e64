//! Images: create, find, list, clone, remove.

use blobcr_proto::v1::SnapshotState;
use blobcr_proto::{ChunkSize, ImageName, v1};

use super::{Held, RecordSwap, VersionManager, check_writer, list_limit, until_won};
use crate::error::Error;
use crate::records::{
    Counter, ImageNameRecord, ImageRecord, KeyKind, PinRecord, ReadTraceRecord, RemovalRecord,
    SnapshotRecord, prefix_of,
};
use crate::store::{Expect, Swap};

/// Image ids taken at once: a thousand clones at a time need not all change one counter. What is
/// left of a block when the process ends is never given.
const IMAGE_ID_BLOCK: u64 = 64;

/// The pool of an image that names none.
pub const POOL_DEFAULT: &str = "default";

/// Snapshots marked in one swap when an image is removed: two records of each, and two more, fit it.
const MARKED_PER_SWAP: usize = 30;

const TAKE_ANOTHER_NAME: &str = "choose another name, or remove it first";
const LIST_IMAGES: &str = "`blobcr image list` shows what there is";

fn image_name(name: &str) -> Result<ImageName, Error> {
    ImageName::new(name).map_err(|error| Error::invalid(format!("image: {error}")))
}

/// How messages call the image that a reference means.
fn describe(image: &v1::ImageRef) -> String {
    if image.name.is_empty() {
        format!("image with the id {}", image.id)
    } else {
        format!("image {:?}", image.name)
    }
}

impl VersionManager {
    /// Makes an image without snapshots, in the pool that it names or in [`POOL_DEFAULT`].
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when the name is taken, [`Error::NotFound`] for an unknown pool.
    pub async fn create_image(&self, r: v1::CreateImageRequest) -> Result<v1::Image, Error> {
        let name = image_name(&r.name)?;
        check_writer(&r.writer)?;
        let chunk_size = match r.chunk_size {
            0 => ChunkSize::DEFAULT,
            bytes => ChunkSize::new(bytes.into()).map_err(Error::invalid)?,
        };
        let pool = if r.pool.is_empty() { POOL_DEFAULT.to_owned() } else { r.pool };
        let pool = self.pool_record(&v1::PoolRef { name: pool, id: 0 }).await?;
        let image = ImageRecord {
            id: self.next_image_id().await?,
            name: name.into(),
            pool: pool.value.id,
            // At most 4 MiB.
            chunk_size: chunk_size.bytes() as u32,
            created_unix_ms: self.now(),
            writer: r.writer,
            ..ImageRecord::default()
        };
        until_won!(
            self,
            format!("image {:?}", image.name),
            self.add_image(&image, Swap::new()).await
        )?;
        Ok(image.to_wire())
    }

    /// One attempt to add an image under its name, together with `swap`.
    async fn add_image(&self, image: &ImageRecord, swap: Swap) -> Result<(), Error> {
        let name = ImageNameRecord { name: image.name.clone(), image_id: image.id };
        if self.load::<ImageNameRecord>(ImageNameRecord::key_of(&name.name)).await?.is_some() {
            let object = format!("image {:?}", name.name);
            return Err(Error::AlreadyExists { object, advice: TAKE_ANOTHER_NAME });
        }
        self.store.swap(swap.create(image).create(&name)).await?;
        Ok(())
    }

    async fn next_image_id(&self) -> Result<u64, Error> {
        let mut block = self.image_ids.lock().await;
        if block.is_empty() {
            let first = until_won!(self, "the counter of images", self.take_image_ids().await)?;
            *block = first..first + IMAGE_ID_BLOCK;
        }
        block.next().ok_or_else(|| Error::Contended { object: "the counter of images".to_owned() })
    }

    async fn take_image_ids(&self) -> Result<u64, Error> {
        let (first, swap) = self.count(Counter::Image, IMAGE_ID_BLOCK, Swap::new()).await?;
        self.store.swap(swap).await?;
        Ok(first)
    }

    /// An image by name or id.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none, or it was removed.
    pub async fn get_image(&self, r: v1::ImageRef) -> Result<v1::Image, Error> {
        Ok(self.image_record(&r).await?.value.to_wire())
    }

    /// The image that a reference means.
    pub(super) async fn image_record(&self, r: &v1::ImageRef) -> Result<Held<ImageRecord>, Error> {
        let not_found = || Error::not_found(describe(r), LIST_IMAGES);
        let id = if r.name.is_empty() {
            r.id
        } else {
            image_name(&r.name)?;
            let name = self.load::<ImageNameRecord>(ImageNameRecord::key_of(&r.name)).await?;
            name.ok_or_else(not_found)?.value.image_id
        };
        match self.load::<ImageRecord>(ImageRecord::key_of(id)).await? {
            Some(image) if !image.value.is_removed() => Ok(image),
            _ => Err(not_found()),
        }
    }

    /// Images in order of name, behind `after_name`.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_images(
        &self,
        r: v1::ListImagesRequest,
    ) -> Result<v1::ListImagesResponse, Error> {
        let after = ImageNameRecord::key_of(&r.after_name);
        let prefix = prefix_of(KeyKind::ImageName);
        let limit = list_limit(r.limit);
        let (names, more) = self.page::<ImageNameRecord>(&prefix, Some(&after), limit).await?;
        let mut images = Vec::with_capacity(names.len());
        for name in names {
            let image = self.load::<ImageRecord>(ImageRecord::key_of(name.value.image_id)).await?;
            // Removed since its name was read.
            images.extend(image.filter(|image| !image.value.is_removed()));
        }
        let images = images.iter().map(|image| image.value.to_wire()).collect();
        Ok(v1::ListImagesResponse { images, more })
    }

    /// The paper's CLONE: an image whose snapshot 1 is the source, by one swap of a few records.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown source, [`Error::Precondition`] when it is not stable,
    /// [`Error::AlreadyExists`] when the name is taken.
    pub async fn clone_image(
        &self,
        r: v1::CloneImageRequest,
    ) -> Result<v1::CloneImageResponse, Error> {
        let name = image_name(&r.name)?;
        check_writer(&r.writer)?;
        let source = r.source.unwrap_or_default();
        let id = self.next_image_id().await?;
        until_won!(
            self,
            format!("image {:?}", name.as_str()),
            self.try_clone(&source, id, name.as_str(), &r.writer).await
        )
    }

    async fn try_clone(
        &self,
        source: &v1::SnapshotRef,
        id: u64,
        name: &str,
        writer: &str,
    ) -> Result<v1::CloneImageResponse, Error> {
        let (parent, snapshot) = self.snapshot_record(source).await?;
        if snapshot.value.state() != v1::SnapshotState::Stable {
            let object = super::snapshots::describe(&parent.value.name, snapshot.value.number);
            return Err(Error::precondition(
                object,
                format!(
                    "is {}; only a stable snapshot can be cloned",
                    super::snapshots::state_name(&snapshot.value)
                ),
            ));
        }
        let now = self.now();
        let image = ImageRecord {
            id,
            name: name.to_owned(),
            pool: parent.value.pool,
            chunk_size: parent.value.chunk_size,
            created_unix_ms: now,
            latest: 1,
            highest_number: 1,
            parent_image: parent.value.id,
            parent_snapshot: snapshot.value.number,
            writer: writer.to_owned(),
            removed_unix_ms: 0,
            left_behind: 0,
        };
        let first = SnapshotRecord {
            image_id: id,
            number: 1,
            state: v1::SnapshotState::Stable.into(),
            root: snapshot.value.root.clone(),
            created_unix_ms: now,
            stable_unix_ms: now,
            writer: writer.to_owned(),
            ..SnapshotRecord::default()
        };
        // The source must still be stable when the clone begins to hold its root.
        let swap = Swap::new().unchanged(&snapshot).create(&first);
        self.add_image(&image, swap).await?;
        let snapshot = first.to_wire(name);
        Ok(v1::CloneImageResponse { image: Some(image.to_wire()), snapshot: Some(snapshot) })
    }

    /// Removes an image: its name is free at once, and when this returns its snapshots are obsolete.
    /// If it is interrupted after the name was freed, [`VersionManager::finish_removals`] marks the
    /// rest.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none, [`Error::Precondition`] while a snapshot is pinned.
    pub async fn remove_image(&self, r: v1::ImageRef) -> Result<v1::RemoveImageResponse, Error> {
        let id = self.image_record(&r).await?.value.id;
        {
            let _turn = self.image_turn(id).await;
            // By its id: the name may go to another image at any moment.
            until_won!(self, describe(&r), self.try_bury(id).await)?;
        }
        self.finish_removal(id).await?;
        Ok(v1::RemoveImageResponse {})
    }

    async fn try_bury(&self, id: u64) -> Result<(), Error> {
        let image = self.image_record(&v1::ImageRef { name: String::new(), id }).await?;
        self.bury(&image).await
    }

    /// Begins the removal of an image, unless it has changed since, or is pinned.
    async fn bury(&self, image: &Held<ImageRecord>) -> Result<(), Error> {
        let id = image.value.id;
        let object = format!("image {:?}", image.value.name);
        self.check_unpinned(&PinRecord::prefix_of_image(id), &object).await?;
        let name = ImageNameRecord { name: image.value.name.clone(), image_id: image.value.id };
        // A clock that stands at zero must not leave the image alive.
        let mut grave = image.value.clone();
        grave.removed_unix_ms = self.now().max(1);
        let removal = RemovalRecord { image_id: grave.id, marked: 0 };
        let swap = Swap::new().update(image, &grave).clear(&name).create(&removal);
        self.store.swap(swap).await?;
        Ok(())
    }

    /// Removes the image of a disk that is gone, when nothing is left in it but snapshot `latest`
    /// and what it was cloned from. Returns whether it did; a pin only puts it off.
    pub(super) async fn remove_left_behind(&self, id: u64, latest: u64) -> Result<bool, Error> {
        let object = format!("image with the id {id}");
        let buried = {
            let _turn = self.image_turn(id).await;
            until_won!(self, object, self.try_bury_left_behind(id, latest).await)
        };
        match buried {
            Ok(true) => self.finish_removal(id).await.map(|()| true),
            Ok(false) => Ok(false),
            // A disk has it still, somebody wants to keep it, or it is gone.
            Err(Error::Precondition { .. } | Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn try_bury_left_behind(&self, id: u64, latest: u64) -> Result<bool, Error> {
        let image = self.image_record(&v1::ImageRef { name: String::new(), id }).await?;
        // Who has imported or cloned an image by hand removes it by hand.
        if image.value.writer.is_empty() || image.value.latest != latest {
            return Ok(false);
        }
        let first_of_clone = u64::from(image.value.parent_image != 0);
        for snapshot in self.all::<SnapshotRecord>(&SnapshotRecord::prefix_of(id)).await? {
            let snapshot = snapshot.value;
            let lives = matches!(snapshot.state(), SnapshotState::Stable | SnapshotState::Pending);
            if lives && snapshot.number != latest && snapshot.number != first_of_clone {
                return Ok(false);
            }
        }
        match self.bury(&image).await {
            Ok(()) => Ok(true),
            // It goes with the pin: such as when the disk is detached.
            Err(Error::Precondition { .. }) if image.value.left_behind != latest => {
                let left = ImageRecord { left_behind: latest, ..image.value.clone() };
                self.store.swap(Swap::new().update(&image, &left)).await?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// After a pin was taken away: removes its image when that has waited for it.
    pub(super) async fn remove_if_left_behind(&self, id: u64) -> Result<(), Error> {
        match self.image_record(&v1::ImageRef { name: String::new(), id }).await {
            Ok(Held { value: image, .. }) if image.left_behind != 0 => {
                self.remove_left_behind(id, image.left_behind).await.map(|_| ())
            }
            Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Marks the snapshots of images whose removal was interrupted. Returns how many images.
    ///
    /// # Errors
    /// When the store cannot; the rest is left for the next time.
    pub async fn finish_removals(&self) -> Result<usize, Error> {
        let removals = self.page::<RemovalRecord>(&prefix_of(KeyKind::Removal), None, 64).await?.0;
        for removal in &removals {
            self.finish_removal(removal.value.image_id).await?;
        }
        Ok(removals.len())
    }

    async fn finish_removal(&self, image_id: u64) -> Result<(), Error> {
        let object = || format!("image with the id {image_id}");
        let _turn = self.generation_turn.lock().await;
        while until_won!(self, object(), self.mark_page(image_id).await)? {}
        Ok(())
    }

    /// Marks some snapshots of a removed image; whether there is more to do.
    async fn mark_page(&self, image_id: u64) -> Result<bool, Error> {
        let removal = self.load::<RemovalRecord>(RemovalRecord::key_of(image_id)).await?;
        let Some(removal) = removal else { return Ok(false) };
        let after = SnapshotRecord::key_of(image_id, removal.value.marked);
        let prefix = SnapshotRecord::prefix_of(image_id);
        let (snapshots, more) =
            self.page::<SnapshotRecord>(&prefix, Some(&after), MARKED_PER_SWAP).await?;
        let (generation, mut swap) = self.newest_generation(Swap::new()).await?;
        let mut marked = removal.value.marked;
        for snapshot in &snapshots {
            marked = snapshot.value.number;
            if snapshot.value.state() != v1::SnapshotState::Obsolete {
                let obsolete = super::snapshots::obsolete(&snapshot.value, generation);
                swap = swap.update(snapshot, &obsolete);
                swap = swap.delete(ReadTraceRecord::key_of(image_id, marked), Expect::Any);
            }
        }
        swap = if more {
            swap.update(&removal, &RemovalRecord { image_id, marked })
        } else {
            swap.remove(&removal)
        };
        self.store.swap(swap).await?;
        Ok(more)
    }
}
