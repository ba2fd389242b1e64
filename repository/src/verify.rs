//! Reading everything that a snapshot is made of, to see whether it is whole.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::RecordKind;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use crate::persist::Retry;
use crate::reader::{PREFETCH_DEFAULT, fetch_chunk};
use crate::tree::{self, NodeSource, Present, Reached, Root, TreeError};
use crate::{ObjectStore, StoreError};

/// Findings that are told one by one; beyond them only their number is.
pub const FINDINGS_MAX: usize = 1000;

/// Something that is damaged or lost.
#[derive(Debug, Clone)]
pub struct Damage {
    /// Chunk or tree node.
    pub kind: RecordKind,
    /// Its identity.
    pub id: Hash,
    /// The chunks of the disk that cannot be read because of it.
    pub chunks: Range<u64>,
    /// What is wrong with it.
    pub detail: String,
}

/// What a verification came to.
#[derive(Debug, Clone, Default)]
pub struct Verification {
    /// Tree nodes read.
    pub nodes: u64,
    /// Chunks read.
    pub chunks: u64,
    /// Plain bytes of those.
    pub bytes: u64,
    /// The first [`FINDINGS_MAX`] findings.
    pub damage: Vec<Damage>,
    /// How many there are altogether.
    pub damaged: u64,
}

impl Verification {
    /// Whether every byte of the snapshot can be read.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.damaged == 0
    }

    fn found(&mut self, damage: Damage) {
        self.damaged += 1;
        if self.damage.len() < FINDINGS_MAX {
            self.damage.push(damage);
        }
    }
}

/// Tree nodes straight from the pool, tried again for a while.
struct Uncached<'a> {
    pool: &'a dyn ObjectStore,
    give_up_after: Duration,
}

impl Uncached<'_> {
    fn retry(&self, id: Option<&Hash>) -> Retry {
        Retry { give_up_after: self.give_up_after, spread: id.map_or(0, Hash::prefix) }
    }
}

#[async_trait]
impl NodeSource for Uncached<'_> {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let get = || self.pool.get_many(RecordKind::TreeNode, ids);
        self.retry(ids.first()).run(get, |_| ()).await
    }
}

/// Reads every tree node and every chunk of `root` from `pool`, past any cache, and compares each
/// with its identity. A second copy of an object is not looked at while the first is good (that is
/// what a scrub does). `progress` hears how many chunks are done, and of how many. What cannot be
/// reached is tried again for `give_up_after`.
///
/// # Errors
/// When the repository cannot be reached. Damage is no error: it is what was asked for.
pub async fn verify(
    pool: &Arc<dyn ObjectStore>,
    root: &Root,
    give_up_after: Duration,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<Verification, TreeError> {
    let source = Uncached { pool: &**pool, give_up_after };
    let mut verification = Verification::default();
    let (mut nodes, mut total) = (0, 0);
    let mut lost = Vec::new();
    let mut count = |reached| {
        match reached {
            Reached::Node { .. } => nodes += 1,
            Reached::Chunk { .. } => total += 1,
        }
        true
    };
    tree::survey(&source, root, &mut count, &mut |node| lost.push(node)).await?;
    verification.nodes = nodes;
    lost.sort_by_key(|node| node.chunks.start);
    let mut from = 0;
    for node in lost {
        verify_range(&source, root, from..node.chunks.start, &mut verification, |done| {
            progress(done, total);
        })
        .await?;
        from = node.chunks.end;
        let (kind, id) = (RecordKind::TreeNode, node.id);
        let detail = node.error.to_string();
        verification.found(Damage { kind, id, chunks: node.chunks, detail });
    }
    verify_range(&source, root, from..u64::MAX, &mut verification, |done| progress(done, total))
        .await?;
    Ok(verification)
}

/// Reads the chunks of a range whose nodes are good.
async fn verify_range(
    source: &Uncached<'_>,
    root: &Root,
    range: Range<u64>,
    verification: &mut Verification,
    progress: impl Fn(u64),
) -> Result<(), TreeError> {
    let chunk_bytes = root.geometry.chunk_size.len();
    let mut pages = Present::new(root, range);
    while let Some(page) = pages.next(source).await? {
        let mut read = stream::iter(page)
            .map(|(index, id)| async move {
                let fetch = || fetch_chunk(source.pool, id, chunk_bytes);
                match source.retry(Some(&id)).run(fetch, |_| ()).await {
                    Ok(plain) => Ok(Ok(plain.len() as u64)),
                    Err(error) if error.is_transient() => Err(error),
                    Err(error) => Ok(Err(Damage {
                        kind: RecordKind::Chunk,
                        id,
                        chunks: index..index + 1,
                        detail: error.to_string(),
                    })),
                }
            })
            .buffered(PREFETCH_DEFAULT);
        while let Some(chunk) = read.try_next().await? {
            verification.chunks += 1;
            match chunk {
                Ok(bytes) => verification.bytes += bytes,
                Err(damage) => verification.found(damage),
            }
            progress(verification.chunks);
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tests/verify.rs"]
mod tests;
