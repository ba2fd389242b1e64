//! Reading a whole snapshot.

use blobcr_proto::{Hash, v1};
use blobcr_repository::tree::{NodeSource, Present, Root};
use blobcr_repository::{ObjectStore, StoreError};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

/// Fetches every chunk that is no hole, `reads` at once, and gives it to `each` with its index
/// and identity, in no order. The store has checked its identity.
///
/// # Errors
/// When the tree cannot be read, and what `each` says.
pub(super) async fn for_each_chunk(
    store: &dyn ObjectStore,
    nodes: &dyn NodeSource,
    root: &Root,
    reads: usize,
    each: impl AsyncFn(u64, Hash, Result<Bytes, StoreError>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut present = Present::new(root, 0..root.geometry.chunks());
    while let Some(page) = present.next(nodes).await? {
        fetch_all(store, page, reads, &each).await?;
    }
    Ok(())
}

/// Fetches these chunks, `reads` at once.
///
/// # Errors
/// What `each` says.
pub(super) async fn fetch_all(
    store: &dyn ObjectStore,
    chunks: Vec<(u64, Hash)>,
    reads: usize,
    each: &impl AsyncFn(u64, Hash, Result<Bytes, StoreError>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    stream::iter(chunks)
        .map(|(index, id)| async move {
            each(index, id, store.get(v1::RecordKind::Chunk, &id).await).await
        })
        .buffer_unordered(reads)
        .try_collect()
        .await
}
