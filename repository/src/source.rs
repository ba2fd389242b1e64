//! Where a persist reads from.

use async_trait::async_trait;
use bytes::Bytes;

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

/// The bytes that a snapshot is made of.
#[async_trait]
pub trait ChunkSource: Send + Sync {
    /// The plain bytes of chunk `index` as of the snapshot: a whole chunk, with zeros behind the
    /// image's end. `None`: all zeros (a source that does not know returns the zeros themselves).
    /// Asked once for each chunk of a job, several at a time.
    async fn chunk(&self, index: u64) -> Result<Option<Bytes>, SourceError>;
}
