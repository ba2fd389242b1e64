//! What a disk needs of the world: the attached snapshot's bytes, and the repository.

use std::sync::Arc;

use async_trait::async_trait;
use blobcr_proto::v1;
use blobcr_repository::Identified;
use bytes::Bytes;

use super::{BaseError, UpstreamError};

/// The snapshot below a disk: all that is needed to read it without asking anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Name of its image when the disk was attached (or rolled back).
    pub image: String,
    /// Id of its image.
    pub image_id: u64,
    /// Number of the snapshot.
    pub number: u64,
    /// Pool of the image.
    pub pool: u32,
    /// Root of its tree.
    pub root: v1::TreeRoot,
}

/// The read-only bytes of a snapshot.
#[async_trait]
pub trait Base: Send + Sync + 'static {
    /// Bytes of the snapshot. A disk may be larger: behind this it reads zeros and asks nobody.
    fn size_bytes(&self) -> u64;

    /// Fills `out` with bytes of `chunk` from `within` on, from what is on this host; never blocks
    /// on the network. `Ok(false)`: the chunk must be fetched first, and `out` holds rubbish.
    /// Never asked for more than one chunk. Bytes behind the snapshot's end are zeros.
    fn read_local(&self, chunk: u64, within: u64, out: &mut [u8]) -> Result<bool, BaseError>;

    /// The whole chunk, with zeros behind the snapshot's end; `None`: all zeros. Fetched once,
    /// whoever asks. Waits while the repository cannot be reached, up to the configured limit.
    async fn fetch(&self, chunk: u64) -> Result<Option<Bytes>, BaseError>;

    /// The same for a snapshot that is being persisted: no guest waits for it.
    async fn fetch_unawaited(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        self.fetch(chunk).await
    }

    /// Whether the chunk may hold anything but zeros; `None` when that is not known without the
    /// network.
    fn may_have_data(&self, chunk: u64) -> Option<bool>;
}

/// Opens the snapshot below a disk.
pub trait BaseOpener: Send + Sync + 'static {
    /// Opens `source` without asking the network.
    ///
    /// # Errors
    /// When the source makes no sense.
    fn open(&self, source: &Source) -> Result<Arc<dyn Base>, BaseError>;
}

/// A snapshot of a disk's checkpoint image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SnapshotKey {
    /// Id of the checkpoint image.
    pub image_id: u64,
    /// Number of the snapshot.
    pub number: u64,
    /// Who alone may add snapshots to the image.
    pub writer: String,
}

/// The bytes of a snapshot that is being persisted.
#[async_trait]
pub trait SnapshotChunks: Send + Sync {
    /// The whole chunk as of the snapshot, with zeros behind the disk's end, and its identity;
    /// `None`: all zeros. May be asked once for each chunk of the work, several at a time.
    ///
    /// # Errors
    /// When the bytes cannot be had; the snapshot then fails.
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, String>;
}

/// What is to be made durable as one snapshot.
pub struct Work<'a> {
    /// Pool of the image.
    pub pool: u32,
    /// The tree that the snapshot is a change of.
    pub base: v1::TreeRoot,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Chunks that may differ from `base`: sorted, each once.
    pub chunks: Vec<u64>,
    /// Where their bytes are.
    pub source: &'a dyn SnapshotChunks,
    /// Told why nothing moves just now; `None` when it does again. Returns at once.
    pub stalled: &'a (dyn Fn(Option<String>) + Send + Sync),
}

impl std::fmt::Debug for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("base", &self.base)
            .field("size_bytes", &self.size_bytes)
            .field("chunks", &self.chunks.len())
            .finish_non_exhaustive()
    }
}

/// Chunks and tree nodes that are durable.
#[derive(Debug, Clone, PartialEq)]
pub struct Persisted {
    /// What to publish.
    pub root: v1::TreeRoot,
    /// What it took.
    pub stats: v1::SnapshotStats,
}

/// What a disk needs of the repository. [`super::super::upstream::RepositoryUpstream`] is the real
/// one.
#[async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Makes image `name` as a clone of `source` that only `writer` may add to. Idempotent: an
    /// image of this name and writer is taken as the answer to an earlier call.
    async fn clone_image(
        &self,
        name: &str,
        source: &v1::SnapshotRef,
        writer: &str,
    ) -> Result<v1::CloneImageResponse, UpstreamError>;

    /// Records that the snapshot is pending. Idempotent for a snapshot that is still pending.
    async fn begin(&self, snapshot: &SnapshotKey) -> Result<(), UpstreamError>;

    /// Makes the work durable. Waits, and tells `work.stalled`, for as long as the repository
    /// cannot be reached: each chunk is read only once, so there is no second try. An error is
    /// final.
    async fn persist(
        &self,
        snapshot: &SnapshotKey,
        work: Work<'_>,
    ) -> Result<Persisted, UpstreamError>;

    /// Makes the snapshot stable, in one step. Idempotent. Sees to it that what was persisted is
    /// still there, whatever has become of the lease meanwhile.
    async fn publish(
        &self,
        snapshot: &SnapshotKey,
        persisted: &Persisted,
    ) -> Result<v1::Snapshot, UpstreamError>;

    /// Records that the snapshot failed, whether or not it was begun. Idempotent.
    async fn fail(&self, snapshot: &SnapshotKey, reason: &str) -> Result<(), UpstreamError>;

    /// The snapshot's record; number 0 is the newest stable one.
    async fn snapshot(&self, image_id: u64, number: u64) -> Result<v1::Snapshot, UpstreamError>;

    /// Keeps the collector from a stable snapshot, and its image from being removed, for `holder`.
    /// Idempotent.
    async fn pin(&self, image_id: u64, number: u64, holder: &str) -> Result<(), UpstreamError>;

    /// Takes the holder's pin away; nothing happens when there is none.
    async fn unpin(&self, image_id: u64, number: u64, holder: &str) -> Result<(), UpstreamError>;

    /// The numbers of the image's pending snapshots.
    async fn pending(&self, image_id: u64) -> Result<Vec<u64>, UpstreamError>;
}

/// A chunk that did not come as it should.
pub(super) const fn lost(chunk: u64, reason: String) -> BaseError {
    BaseError::Lost { chunk, reason }
}
