//! Images.

use blobcr_proto::v1::{self, SnapshotState};
use blobcr_proto::{ChunkSize, ImageName};

use super::pools::Pools;
use super::snapshots::SnapshotRecord;
use super::{Answer, ById, invalid, not_found, page, precondition, unix_ms};
use crate::CatalogError;

#[derive(Debug)]
pub(super) struct ImageRecord {
    pub(super) image: v1::Image,
    pub(super) snapshots: ById<u64, SnapshotRecord>,
    pub(super) removed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Images {
    pub(super) by_id: ById<u64, ImageRecord>,
    /// By image, snapshot and holder.
    pub(super) pins: ById<(u64, u64, String), v1::Pin>,
    /// By image and snapshot.
    pub(super) traces: ById<(u64, u64), v1::ReadTrace>,
}

impl Images {
    pub(super) fn id_of(&self, image: &v1::ImageRef) -> Answer<u64> {
        if !image.name.is_empty() {
            ImageName::new(image.name.as_str()).map_err(invalid)?;
        }
        let wanted = |record: &&ImageRecord| {
            let by_name = !image.name.is_empty() && record.image.name == image.name;
            !record.removed && (by_name || image.name.is_empty() && record.image.id == image.id)
        };
        match self.by_id.values().find(wanted) {
            Some(record) => Ok(record.image.id),
            None if image.name.is_empty() => not_found(format!("no image with id {}", image.id)),
            None => not_found(format!("no image {:?}", image.name)),
        }
    }

    pub(super) fn record(&self, image: &v1::ImageRef) -> Answer<&ImageRecord> {
        Ok(&self.by_id[&self.id_of(image)?])
    }

    pub(super) fn record_mut(&mut self, id: u64) -> Answer<&mut ImageRecord> {
        match self.by_id.get_mut(&id) {
            Some(record) => Ok(record),
            None => not_found(format!("no image with id {id}")),
        }
    }

    pub(super) fn create(&mut self, r: v1::CreateImageRequest, pools: &Pools) -> Answer<v1::Image> {
        let chunk_size = match r.chunk_size {
            0 => ChunkSize::DEFAULT,
            bytes => ChunkSize::new(u64::from(bytes)).map_err(invalid)?,
        };
        let pool = pools.get(&v1::PoolRef { name: r.pool, id: 0 })?.id;
        let image = v1::Image {
            name: r.name,
            pool,
            chunk_size: chunk_size.len() as u32,
            writer: r.writer,
            ..v1::Image::default()
        };
        Ok(self.add(image)?.image.clone())
    }

    fn add(&mut self, image: v1::Image) -> Answer<&mut ImageRecord> {
        ImageName::new(image.name.as_str()).map_err(invalid)?;
        if self.by_id.values().any(|record| !record.removed && record.image.name == image.name) {
            let text = format!("there is an image {:?} already", image.name);
            return Err(CatalogError::AlreadyExists(text));
        }
        let id = self.by_id.keys().next_back().copied().unwrap_or(0) + 1;
        let image = v1::Image { id, created_unix_ms: unix_ms(), ..image };
        let record = ImageRecord { image, snapshots: ById::new(), removed: false };
        Ok(self.by_id.entry(id).or_insert(record))
    }

    pub(super) fn get(&self, image: &v1::ImageRef) -> Answer<v1::Image> {
        Ok(self.record(image)?.image.clone())
    }

    pub(super) fn list(&self, r: &v1::ListImagesRequest) -> Answer<v1::ListImagesResponse> {
        let mut images: Vec<_> = self
            .by_id
            .values()
            .filter(|record| !record.removed && record.image.name > r.after_name)
            .map(|record| record.image.clone())
            .collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        let (images, more) = page(images.into_iter(), r.limit);
        Ok(v1::ListImagesResponse { images, more })
    }

    pub(super) fn clone_image(
        &mut self,
        r: v1::CloneImageRequest,
    ) -> Answer<v1::CloneImageResponse> {
        let source = self.snapshot(&r.source.unwrap_or_default())?;
        if source.state() != SnapshotState::Stable {
            let name = format!("{}@{}", source.image, source.number);
            return precondition(format!("{name} is not stable: it cannot be cloned"));
        }
        let of = &self.by_id[&source.image_id].image;
        let image = v1::Image {
            name: r.name,
            pool: of.pool,
            chunk_size: of.chunk_size,
            parent_image: source.image_id,
            parent_snapshot: source.number,
            writer: r.writer.clone(),
            latest: 1,
            highest_number: 1,
            ..v1::Image::default()
        };
        let record = self.add(image)?;
        let now = unix_ms();
        let wire = v1::Snapshot {
            image_id: record.image.id,
            image: record.image.name.clone(),
            number: 1,
            state: SnapshotState::Stable.into(),
            root: source.root,
            created_unix_ms: now,
            stable_unix_ms: now,
            ..v1::Snapshot::default()
        };
        let first = SnapshotRecord {
            wire: wire.clone(),
            writer: r.writer,
            lease_id: 0,
            obsolete_generation: 0,
        };
        record.snapshots.insert(1, first);
        Ok(v1::CloneImageResponse { image: Some(record.image.clone()), snapshot: Some(wire) })
    }

    pub(super) fn remove(
        &mut self,
        image: &v1::ImageRef,
        generation: u64,
    ) -> Answer<v1::RemoveImageResponse> {
        let id = self.id_of(image)?;
        self.check_unpinned(|pinned, _| pinned == id)?;
        let record = self.record_mut(id)?;
        record.removed = true;
        for snapshot in record.snapshots.values_mut() {
            snapshot.obsolete(generation);
        }
        self.traces.retain(|(image, _), _| *image != id);
        Ok(v1::RemoveImageResponse {})
    }
}
