//! Making a snapshot's bytes durable: read → zero test → hash → ask which are missing → compress
//! and put in parallel → tree nodes. What the caller publishes afterwards is the root.

mod bandwidth;
mod pipeline;
mod retry;

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;

pub use bandwidth::Bandwidth;
pub(crate) use retry::Retry;

use crate::source::{ChunkSource, SourceError};
use crate::tree::{Geometry, NodeSource, Root, TreeError};
use crate::{ObjectStore, StoreError};

/// What a persist may use.
#[derive(Debug, Clone)]
pub struct PersistLimits {
    /// Bytes of chunks in memory at once, read but not durable yet.
    pub bytes_in_flight: usize,
    /// Chunks read (and hashed) at once.
    pub reads: usize,
    /// Puts under way at once.
    pub puts: usize,
    /// Bytes of chunks in one put at most (one chunk may be larger).
    pub put_bytes: usize,
    /// Identities in one question which of them are missing, at most.
    pub touch_batch: usize,
    /// For how long an operation that fails for reasons that may pass is tried again.
    pub give_up_after: Duration,
    /// A cap shared with other persists.
    pub bandwidth: Option<Arc<Bandwidth>>,
}

impl Default for PersistLimits {
    fn default() -> Self {
        Self {
            // Hides 20 ms of round trip and fsync at 3 GB/s.
            bytes_in_flight: 64 << 20,
            reads: 8,
            puts: 8,
            // Sixteen default chunks share a request, a group commit and what it takes to wake the others.
            put_bytes: 4 << 20,
            touch_batch: 256,
            give_up_after: Duration::from_secs(600),
            bandwidth: None,
        }
    }
}

/// How far a persist is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Chunks of the job.
    pub chunks_total: u64,
    /// Chunks that are durable, or zero.
    pub chunks_done: u64,
    /// Bytes that were new to the repository so far, after compression.
    pub stored_bytes: u64,
    /// Why nothing moves just now; `None` when it does.
    pub stalled: Option<String>,
}

/// One snapshot to make durable.
pub struct PersistJob<'a> {
    /// The tree that the snapshot is a change of.
    pub base: Root,
    /// The new snapshot's size, chunk size and fan-out.
    pub geometry: Geometry,
    /// The chunks that may differ from `base`: sorted, each once.
    pub chunks: Vec<u64>,
    /// The generation of the writer's lease.
    pub generation: u64,
    /// Where the chunks' bytes are.
    pub source: &'a dyn ChunkSource,
    /// Called after every step; must return quickly.
    pub progress: &'a (dyn Fn(Progress) + Send + Sync),
    /// What the job may use.
    pub limits: PersistLimits,
}

impl std::fmt::Debug for PersistJob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PersistJob")
            .field("base", &self.base)
            .field("geometry", &self.geometry)
            .field("chunks", &self.chunks.len())
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// A snapshot whose chunks and tree nodes are all durable.
#[derive(Debug, Clone)]
pub struct Persisted {
    /// What to publish.
    pub root: Root,
    /// What it took. `stored_bytes` counts chunks and tree nodes.
    pub stats: v1::SnapshotStats,
}

/// Why a snapshot was not made durable. Nothing was published; what was stored is an orphan that
/// the collector takes.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The job makes no sense.
    #[error("a snapshot cannot be persisted: {0}")]
    Invalid(String),
    /// The source could not read one of its chunks.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The repository failed for good, or for longer than the limit.
    #[error("a snapshot could not be made durable: {0}")]
    Store(#[from] StoreError),
    /// The tree could not be updated.
    #[error("a snapshot's tree could not be made: {0}")]
    Tree(#[from] TreeError),
}

impl PersistError {
    /// Whether the same job may succeed later without anybody mending the data.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Invalid(_) | Self::Source(_) => false,
            Self::Store(error) => error.is_transient(),
            Self::Tree(error) => error.is_transient(),
        }
    }
}

/// Makes the chunks of `job` and the tree over them durable, and returns the root to publish.
///
/// Memory is bounded by the limits, plus about 100 bytes for each chunk of the job. Each missing
/// chunk is sent once, however often it occurs. Failures that may pass are tried again until the
/// limit. Dropping the future at any point leaves orphans at the most. While the future is not
/// polled, reads from the source do not finish: do not park it.
///
/// # Errors
/// When the source fails, or the repository fails for good or for longer than the limit.
pub async fn persist(
    pool: &dyn ObjectStore,
    nodes: &dyn NodeSource,
    job: PersistJob<'_>,
) -> Result<Persisted, PersistError> {
    pipeline::run(pool, nodes, job).await
}

#[cfg(test)]
mod tests;
