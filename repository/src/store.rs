//! The content-addressed objects of one pool.

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::RecordKind;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

/// Gets that the provided [`ObjectStore::get_many`] has under way at once: enough to hide round
/// trips, few enough that tree walks leave room for data.
const GETS_AT_ONCE: usize = 16;

/// Why the repository did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No node that could answer was reached in time. Trying again later helps.
    #[error("the repository cannot be reached: {0}")]
    Unavailable(String),
    /// A node refused a write for want of space. Trying again helps once there is space.
    #[error("repository node {node} is full: {detail}; add space or remove snapshots")]
    Full {
        /// Address of the node.
        node: String,
        /// What it said.
        detail: String,
    },
    /// No node holds the object.
    #[error("{kind:?} {id} is in no node of its pool")]
    Missing {
        /// What was asked for.
        kind: RecordKind,
        /// Its identity.
        id: Hash,
    },
    /// Every copy that was found is damaged.
    #[error("{kind:?} {id} is damaged: {detail}")]
    Damaged {
        /// What was asked for.
        kind: RecordKind,
        /// Its identity.
        id: Hash,
        /// What is wrong with it.
        detail: String,
    },
    /// A node refused the request for good.
    #[error("repository node {node} refused: {detail}")]
    Refused {
        /// Address of the node.
        node: String,
        /// What it said.
        detail: String,
    },
}

impl StoreError {
    /// Whether the same call may succeed later without anybody mending the data.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full { .. })
    }
}

/// Plain bytes under their identity.
#[derive(Debug, Clone)]
pub struct Object {
    /// Chunk or tree node.
    pub kind: RecordKind,
    /// BLAKE3-256 of `plain`.
    pub id: Hash,
    /// The bytes before any codec.
    pub plain: Bytes,
}

/// What a put added to the repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Objects that were new.
    pub objects: u64,
    /// Their bytes after compression, before redundancy.
    pub bytes: u64,
}

/// The objects of one pool. Every call has a deadline of its own.
#[async_trait]
pub trait ObjectStore: Send + Sync + 'static {
    /// Stores objects; on return all are durable to the pool's policy and touched with
    /// `generation`, whether they were new or not.
    async fn put(&self, generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError>;

    /// The plain bytes of one object, checked against its identity.
    async fn get(&self, kind: RecordKind, id: &Hash) -> Result<Bytes, StoreError>;

    /// The plain bytes of several objects, in order, each checked against its identity. Meant for
    /// small objects: all are in memory at once.
    async fn get_many(&self, kind: RecordKind, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        // Owned ids: a closure over borrowed ones is not general enough for a boxed future.
        stream::iter(ids.to_vec())
            .map(|id| async move { self.get(kind, &id).await })
            .buffered(GETS_AT_ONCE)
            .try_collect()
            .await
    }

    /// Tells, in order, which objects the pool holds to its policy, and touches those with
    /// `generation`, so that the collector leaves them to this writer.
    async fn touch(
        &self,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError>;
}
