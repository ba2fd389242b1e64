//! Where a persist reads from.

use async_trait::async_trait;
use blobcr_proto::Hash;
use bytes::Bytes;

use crate::zero;

/// A chunk that its source could not read.
#[derive(Debug, thiserror::Error)]
#[error("chunk {chunk} cannot be read from its source: {cause}")]
pub struct SourceError {
    /// Index of the chunk.
    pub chunk: u64,
    /// Why.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl SourceError {
    /// An error of `chunk`.
    pub fn new(chunk: u64, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { chunk, cause: cause.into() }
    }
}

/// A chunk that is not all zeros, and its identity.
#[derive(Debug, Clone)]
pub struct Identified {
    /// The hash of its plain bytes.
    pub id: Hash,
    /// The plain bytes.
    pub plain: Bytes,
}

impl Identified {
    /// `None` when all of it is zeros. Takes a core for as long as hashing takes: not to be called on
    /// a thread of the asynchronous runtime.
    #[must_use]
    pub fn of(plain: Bytes) -> Option<Self> {
        (!zero::is_zero(&plain)).then(|| Self { id: Hash::of(&plain), plain })
    }
}

/// The bytes that a snapshot is made of.
#[async_trait]
pub trait ChunkSource: Send + Sync {
    /// Chunk `index` as of the snapshot: a whole chunk, with zeros behind the image's end. `None`: all
    /// zeros. The thread that reads it is the one to find out its identity: the bytes are in that
    /// core's cache, and no other has to be woken. Asked once for each chunk of a job, several at a
    /// time.
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError>;
}
