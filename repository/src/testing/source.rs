//! A disk in memory.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use blobcr_proto::ChunkSize;

use crate::import::SparseSource;
use crate::source::{ChunkSource, Identified, SourceError};

/// A disk in memory, to persist or import, that remembers which chunks were read.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Vec<u8>,
    chunk_size: ChunkSize,
    reads: Mutex<Vec<u64>>,
}

impl MemoryDisk {
    /// A disk that holds `bytes`.
    #[must_use]
    pub const fn new(bytes: Vec<u8>, chunk_size: ChunkSize) -> Self {
        Self { bytes, chunk_size, reads: Mutex::new(Vec::new()) }
    }

    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The chunks that were read so far, in the order of the calls.
    #[must_use]
    pub fn reads(&self) -> Vec<u64> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn piece(&self, index: u64) -> &[u8] {
        let chunk = self.chunk_size.len();
        let start = (index as usize * chunk).min(self.bytes.len());
        &self.bytes[start..(start + chunk).min(self.bytes.len())]
    }
}

#[async_trait]
impl ChunkSource for MemoryDisk {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).push(index);
        let mut chunk = self.piece(index).to_vec();
        chunk.resize(self.chunk_size.len(), 0);
        Ok(Identified::of(chunk.into()))
    }
}

#[async_trait]
impl SparseSource for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    async fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, SourceError> {
        let chunks = self.chunk_size.chunks_in(self.size_bytes());
        let data = |index: &u64| !crate::is_zero(self.piece(*index));
        let Some(start) = (from..chunks).find(data) else { return Ok(None) };
        let end = (start..chunks).find(|index| !data(index)).unwrap_or(chunks);
        Ok(Some(start..end))
    }
}
