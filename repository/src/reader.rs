//! Reading snapshots.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use blobcr_proto::v1::RecordKind;
use blobcr_proto::{ByteRange, Hash};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};

use crate::tree::{self, NodeSource, Present, Root, TreeError};
use crate::{ObjectStore, StoreError};

/// Chunks fetched at once for one call: enough to keep a 10 Gbit link busy across 5 ms with
/// default chunks, and at most 64 MiB of the largest.
pub const PREFETCH_DEFAULT: usize = 16;

/// Why a snapshot could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The range is not within the snapshot.
    #[error("bytes {start}..{end} are beyond the snapshot's end at {size}")]
    BeyondEnd {
        /// First byte asked for.
        start: u64,
        /// Behind the last byte asked for.
        end: u64,
        /// Bytes of the snapshot.
        size: u64,
    },
    /// The tree could not be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A chunk could not be read.
    #[error("chunk {chunk} of the snapshot: {error}")]
    Chunk {
        /// Its index.
        chunk: u64,
        /// What the repository said.
        error: StoreError,
    },
}

impl ReadError {
    /// Whether the same call may succeed later without anybody mending the data.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::BeyondEnd { .. } => false,
            Self::Tree(error) => error.is_transient(),
            Self::Chunk { error, .. } => error.is_transient(),
        }
    }

    /// Whether what is stored is damaged or lost.
    #[must_use]
    pub const fn is_damage(&self) -> bool {
        match self {
            Self::BeyondEnd { .. } => false,
            Self::Tree(error) => error.is_damage(),
            Self::Chunk { error, .. } => {
                matches!(error, StoreError::Damaged { .. } | StoreError::Missing { .. })
            }
        }
    }
}

/// Reads one snapshot. Clones are cheap. Holds no bytes between calls.
#[derive(Clone)]
pub struct SnapshotReader {
    root: Root,
    nodes: Arc<dyn NodeSource>,
    pool: Arc<dyn ObjectStore>,
    prefetch: usize,
}

impl std::fmt::Debug for SnapshotReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotReader").field("root", &self.root).finish_non_exhaustive()
    }
}

impl SnapshotReader {
    /// Reads the snapshot of `root`, whose nodes and chunks are in `pool`.
    #[must_use]
    pub fn new(root: Root, nodes: Arc<dyn NodeSource>, pool: Arc<dyn ObjectStore>) -> Self {
        Self { root, nodes, pool, prefetch: PREFETCH_DEFAULT }
    }

    /// Fetches up to `chunks` chunks at once.
    #[must_use]
    pub fn with_prefetch(self, chunks: usize) -> Self {
        Self { prefetch: chunks.max(1), ..self }
    }

    /// What is read.
    #[must_use]
    pub const fn root(&self) -> &Root {
        &self.root
    }

    /// Bytes of the snapshot.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.root.geometry.size_bytes
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// When the range is not within the snapshot, or the repository fails; `out` then holds
    /// rubbish.
    pub async fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let (start, size) = (offset, self.size_bytes());
        let end = offset.saturating_add(out.len() as u64);
        if end > size {
            return Err(ReadError::BeyondEnd { start, end, size });
        }
        if out.is_empty() {
            return Ok(());
        }
        let chunk_size = self.root.geometry.chunk_size;
        let first = start / chunk_size.bytes();
        let count = (end - 1) / chunk_size.bytes() - first + 1;
        let ids = tree::lookup(&*self.nodes, &self.root, first, count as usize).await?;
        let range = ByteRange { start, len: out.len() as u64 };
        let mut rest = out;
        let mut pieces = VecDeque::new();
        for ((index, within), id) in range.by_chunk(chunk_size).zip(ids) {
            let (piece, behind) = rest.split_at_mut(within.len as usize);
            rest = behind;
            match id {
                Some(id) => pieces.push_back((index, id, within, piece)),
                None => piece.fill(0),
            }
        }
        stream::iter(pieces)
            .map(|(index, id, within, piece)| async move {
                let plain = self.fetch(index, id).await?;
                piece.copy_from_slice(&plain[within.start as usize..within.end() as usize]);
                Ok::<(), ReadError>(())
            })
            .buffer_unordered(self.prefetch)
            .try_collect()
            .await
    }

    /// One whole chunk; `None` when it is all zeros.
    ///
    /// # Errors
    /// When the repository fails.
    pub async fn chunk(&self, index: u64) -> Result<Option<Bytes>, ReadError> {
        let ids = tree::lookup(&*self.nodes, &self.root, index, 1).await?;
        match ids.into_iter().next().flatten() {
            Some(id) => self.fetch(index, id).await.map(Some),
            None => Ok(None),
        }
    }

    /// The whole chunk of an identity that is known to be at `chunk`, as [`tree::diff`] tells.
    ///
    /// # Errors
    /// When the repository fails.
    pub async fn fetch(&self, chunk: u64, id: Hash) -> Result<Bytes, ReadError> {
        fetch_chunk(&*self.pool, id, self.root.geometry.chunk_size.len())
            .await
            .map_err(|error| ReadError::Chunk { chunk, error })
    }

    /// The chunks of `range` (indices) that are present, in ascending order, fetched ahead of the
    /// consumer. Memory is bounded by the prefetch and one page of identities. The stream ends
    /// after its first error.
    #[must_use]
    pub fn present(&self, range: Range<u64>) -> BoxStream<'_, Result<(u64, Bytes), ReadError>> {
        let pages = Present::new(&self.root, range);
        stream::try_unfold(pages, move |mut pages| async move {
            let page = pages.next(&*self.nodes).await?;
            Ok::<_, ReadError>(page.map(|page| (page, pages)))
        })
        .map_ok(|page| stream::iter(page.into_iter().map(Ok)))
        .try_flatten()
        .map_ok(move |(index, id)| async move { Ok((index, self.fetch(index, id).await?)) })
        .try_buffered(self.prefetch)
        .boxed()
    }
}

/// A chunk's bytes. One of another length than its image's chunks is as good as damaged.
pub(crate) async fn fetch_chunk(
    pool: &dyn ObjectStore,
    id: Hash,
    chunk_bytes: usize,
) -> Result<Bytes, StoreError> {
    let plain = pool.get(RecordKind::Chunk, &id).await?;
    if plain.len() != chunk_bytes {
        let detail = format!("it has {} bytes instead of {chunk_bytes}", plain.len());
        return Err(StoreError::Damaged { kind: RecordKind::Chunk, id, detail });
    }
    Ok(plain)
}

#[cfg(test)]
#[path = "tests/reader.rs"]
mod tests;
