//! The images and snapshots of the repository, as the mount shows them: a little out of date at
//! most, and readable when they are open whatever becomes of the catalog.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blobcr_proto::units::ByteRange;
use blobcr_proto::v1;
use blobcr_repository::tree::Root;
use blobcr_repository::{Catalog, CatalogError, Repository};
use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use rustix::io::Errno;

use crate::base::{SnapshotBase, Snapshots};
use crate::disk::{Base, BaseError};

/// How long an image's record is believed.
const IMAGE_TTL: Duration = Duration::from_secs(1);
/// How long a snapshot is taken to be still there; its bytes never change.
const SNAPSHOT_TTL: Duration = Duration::from_secs(30);
/// Records remembered of each kind: the directory of a busy host.
const REMEMBERED_MAX: usize = 4096;
/// Records asked for at a time: some 100 KB.
const PAGE: u32 = 512;

/// Facts that are believed for a while.
#[derive(Debug)]
struct Memory<K, V> {
    ttl: Duration,
    facts: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K: Eq + Hash + Clone, V: Clone> Memory<K, V> {
    fn new(ttl: Duration) -> Self {
        Self { ttl, facts: Mutex::default() }
    }

    fn facts(&self) -> MutexGuard<'_, HashMap<K, (Instant, V)>> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &K) -> Option<V> {
        self.facts().get(key).filter(|(at, _)| at.elapsed() < self.ttl).map(|(_, v)| v.clone())
    }

    /// Even when it is old.
    fn get_old(&self, key: &K) -> Option<V> {
        self.facts().get(key).map(|(_, v)| v.clone())
    }

    fn put(&self, key: K, value: V) {
        let mut facts = self.facts();
        if facts.len() >= REMEMBERED_MAX {
            facts.retain(|_, (at, _)| at.elapsed() < self.ttl);
        }
        if facts.len() >= REMEMBERED_MAX {
            facts.clear();
        }
        facts.insert(key, (Instant::now(), value));
    }

    fn forget(&self, key: &K) {
        self.facts().remove(key);
    }
}

/// See the head of the file.
#[derive(Debug)]
pub(crate) struct Images {
    repository: Repository,
    snapshots: Arc<Snapshots>,
    by_name: Memory<String, v1::Image>,
    by_id: Memory<u64, v1::Image>,
    stable: Memory<(u64, u64), v1::Snapshot>,
}

/// What the caller of a system call gets to see. A repository that is away shows as a time-out, so
/// that nobody takes its images to be gone.
fn errno(error: &CatalogError) -> Errno {
    match error {
        CatalogError::NotFound(_) => Errno::NOENT,
        CatalogError::Unavailable(_) | CatalogError::Timeout(_) | CatalogError::Conflict(_) => {
            Errno::TIMEDOUT
        }
        CatalogError::AlreadyExists(_)
        | CatalogError::Invalid(_)
        | CatalogError::Precondition(_) => Errno::IO,
    }
}

fn logged(error: &CatalogError) -> Errno {
    let errno = errno(error);
    if errno != Errno::NOENT {
        tracing::warn!(%error, "the images of the repository cannot be shown");
    }
    errno
}

impl Images {
    pub(crate) fn new(repository: Repository, snapshots: Arc<Snapshots>) -> Self {
        Self {
            repository,
            snapshots,
            by_name: Memory::new(IMAGE_TTL),
            by_id: Memory::new(IMAGE_TTL),
            stable: Memory::new(SNAPSHOT_TTL),
        }
    }

    fn catalog(&self) -> &Arc<dyn Catalog> {
        self.repository.catalog()
    }

    fn remember(&self, image: &v1::Image) {
        self.by_name.put(image.name.clone(), image.clone());
        self.by_id.put(image.id, image.clone());
    }

    async fn get(&self, image: v1::ImageRef) -> Result<v1::Image, Errno> {
        let image = self.catalog().get_image(image).await.map_err(|error| logged(&error))?;
        self.remember(&image);
        Ok(image)
    }

    pub(crate) async fn by_name(&self, name: &str) -> Result<v1::Image, Errno> {
        if let Some(image) = self.by_name.get(&name.to_owned()) {
            return Ok(image);
        }
        self.get(v1::ImageRef { name: name.to_owned(), id: 0 }).await
    }

    pub(crate) async fn by_id(&self, id: u64) -> Result<v1::Image, Errno> {
        match self.by_id.get(&id) {
            Some(image) => Ok(image),
            None => self.by_id_now(id).await,
        }
    }

    pub(crate) async fn by_id_now(&self, id: u64) -> Result<v1::Image, Errno> {
        self.get(v1::ImageRef { name: String::new(), id }).await
    }

    pub(crate) fn known_snapshot(&self, id: u64, number: u64) -> Option<v1::Snapshot> {
        self.stable.get(&(id, number))
    }

    /// A snapshot that is stable.
    pub(crate) async fn snapshot(&self, id: u64, number: u64) -> Result<v1::Snapshot, Errno> {
        let key = (id, number);
        if let Some(snapshot) = self.stable.get(&key) {
            return Ok(snapshot);
        }
        let image = Some(v1::ImageRef { name: String::new(), id });
        match self.catalog().get_snapshot(v1::SnapshotRef { image, number }).await {
            Ok(snapshot) if snapshot.state() == v1::SnapshotState::Stable => {
                self.stable.put(key, snapshot.clone());
                Ok(snapshot)
            }
            Ok(_) => {
                self.stable.forget(&key);
                Err(Errno::NOENT)
            }
            Err(error) => match (errno(&error), self.stable.get_old(&key)) {
                // It was stable once: that has not changed while nobody can be asked.
                (Errno::TIMEDOUT, Some(snapshot)) => Ok(snapshot),
                _ => Err(logged(&error)),
            },
        }
    }

    pub(crate) async fn open(&self, id: u64, number: u64) -> Result<Arc<ImageFile>, Errno> {
        let snapshot = self.snapshot(id, number).await?;
        let pool = self.by_id(id).await?.pool;
        let root = snapshot.root.as_ref().map(Root::try_from);
        let Some(Ok(root)) = root else {
            tracing::warn!(image = snapshot.image, number, ?root, "a snapshot has no usable root");
            return Err(Errno::IO);
        };
        let name = format!("{}@{number}", snapshot.image);
        Ok(Arc::new(ImageFile { name, base: self.snapshots.base(pool, root) }))
    }

    pub(crate) async fn list(&self, after: &str) -> Result<(Vec<v1::Image>, bool), Errno> {
        let request = v1::ListImagesRequest { after_name: after.to_owned(), limit: PAGE };
        let page = self.catalog().list_images(request).await.map_err(|error| logged(&error))?;
        page.images.iter().for_each(|image| self.remember(image));
        Ok((page.images, page.more))
    }

    pub(crate) async fn list_snapshots(
        &self,
        id: u64,
        after_number: u64,
    ) -> Result<(Vec<v1::Snapshot>, bool), Errno> {
        let image = Some(v1::ImageRef { name: String::new(), id });
        let request = v1::ListSnapshotsRequest { image, after_number, limit: PAGE };
        let page = self.catalog().list_snapshots(request).await.map_err(|error| logged(&error))?;
        for snapshot in &page.snapshots {
            if snapshot.state() == v1::SnapshotState::Stable {
                self.stable.put((id, snapshot.number), snapshot.clone());
            }
        }
        Ok((page.snapshots, page.more))
    }
}

/// A snapshot that somebody has open.
#[derive(Debug)]
pub(crate) struct ImageFile {
    /// `IMAGE@N`, for the log.
    pub(crate) name: String,
    base: Arc<SnapshotBase>,
}

impl ImageFile {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    /// The part of a range that is within the file.
    fn clip(&self, offset: u64, len: usize) -> ByteRange {
        let start = offset.min(self.size_bytes());
        ByteRange { start, len: (len as u64).min(self.size_bytes() - start) }
    }

    /// Reads what is on this host: how many bytes, up to the end of the file; `None` when some of
    /// them must be fetched.
    pub(crate) fn try_read(&self, offset: u64, out: &mut [u8]) -> Result<Option<usize>, BaseError> {
        let range = self.clip(offset, out.len());
        let mut rest = &mut out[..range.len as usize];
        for (chunk, piece) in range.by_chunk(self.base.chunk_size()) {
            let (part, tail) = rest.split_at_mut(piece.len as usize);
            if !self.base.read_local(chunk, piece.start, part)? {
                return Ok(None);
            }
            rest = tail;
        }
        Ok(Some(range.len as usize))
    }

    /// Reads, and fetches what is missing, all at once.
    pub(crate) async fn read(&self, offset: u64, len: usize) -> Result<Bytes, BaseError> {
        let range = self.clip(offset, len);
        let mut out = BytesMut::zeroed(range.len as usize);
        let mut rest = &mut out[..];
        let mut missing = Vec::new();
        for (chunk, piece) in range.by_chunk(self.base.chunk_size()) {
            let (part, tail) = rest.split_at_mut(piece.len as usize);
            rest = tail;
            if !self.base.read_local(chunk, piece.start, part)? {
                missing.push((chunk, piece, part));
            }
        }
        try_join_all(missing.into_iter().map(|(chunk, piece, part)| async move {
            match self.base.fetch(chunk).await? {
                Some(bytes) => {
                    part.copy_from_slice(&bytes[piece.start as usize..piece.end() as usize]);
                }
                None => part.fill(0),
            }
            Ok(())
        }))
        .await?;
        Ok(out.freeze())
    }

    /// As `lseek` has it. `None` behind the last data, or behind the end.
    pub(crate) async fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>, BaseError> {
        if offset >= self.size_bytes() {
            return Ok(None);
        }
        let found = self.base.seek(offset, data).await?;
        Ok((!data || found < self.size_bytes()).then_some(found))
    }
}
