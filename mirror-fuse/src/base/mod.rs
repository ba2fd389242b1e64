//! The read-only bytes of snapshots: what a disk shows where nothing was written to it, and what
//! the files of MOUNT/images show.
//!
//! | file | holds |
//! |---|---|
//! | `leaves` | which chunk lies where, as far as this host knows |
//! | `nodes` | the tree nodes that this host has read, kept over restarts |
//! | `fetcher` | bringing chunks here, each once; waiting while the repository is away |
//! | `flights` | one piece of work for all who ask for its result |
//! | `stall` | who waits just now, and why |
//! | `turns` | whose fetches go first |
//! | `below` | the snapshot below a disk: who waits for it, and what its disks read first |

mod below;
mod fetcher;
mod flights;
mod leaves;
mod nodes;
mod stall;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::{ChunkSize, Hash};
use blobcr_repository::Repository;
use blobcr_repository::tree::Root;
use bytes::Bytes;

use crate::cache::ChunkCache;
use crate::disk::{Base, BaseError};
use fetcher::{Brought, FetchError, Fetcher};
use leaves::{Leaf, LeafBudget, Leaves, RUN_CHUNKS};
use nodes::LocalNodes;
use stall::Stall;

pub use below::DiskBases;
pub use fetcher::FetchLimits;

/// Bytes of chunk identities that all snapshots of a host keep in memory: the whole maps of two
/// terabytes of 256 KiB chunks.
const LEAF_BYTES_MAX: u64 = 256 << 20;

/// How long a fetch for which nobody waits stays under way while the repository cannot be reached.
const AHEAD_PATIENCE: Duration = Duration::from_secs(5);

/// What became of a fetch for which nobody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// It was on this host already, is all zeros, or is no longer wanted.
    Here,
    /// It is on this host now.
    Fetched,
    /// The cache has no room that is not in use.
    NoRoom,
}

/// For [`crate::fuzzing`].
#[cfg(feature = "fuzzing")]
pub(crate) fn kept_nodes(dir: &Path, ids: &[Hash]) -> io::Result<Vec<Option<Bytes>>> {
    Ok(LocalNodes::open(dir)?.get(ids))
}

/// All snapshots of one host: they share what is fetched, and a snapshot that several disks lie on
/// is open once.
#[derive(Debug)]
pub struct Snapshots {
    fetcher: Arc<Fetcher>,
    leaf_budget: LeafBudget,
    open: Mutex<HashMap<(u32, Root), Weak<SnapshotBase>>>,
}

impl Snapshots {
    /// Reads through `cache` from `repository`, and keeps tree nodes in `dir`.
    ///
    /// # Errors
    /// When `dir` or a file in it cannot be made or read.
    pub fn open(
        dir: &Path,
        repository: Repository,
        cache: Arc<ChunkCache>,
        limits: FetchLimits,
    ) -> io::Result<Arc<Self>> {
        let nodes = LocalNodes::open(dir)?;
        Ok(Arc::new(Self {
            fetcher: Arc::new(Fetcher::new(repository, cache, nodes, limits)),
            leaf_budget: LeafBudget::new(LEAF_BYTES_MAX),
            open: Mutex::default(),
        }))
    }

    /// The bytes of `root` in `pool`. Asks nobody.
    #[must_use]
    pub fn base(self: &Arc<Self>, pool: u32, root: Root) -> Arc<SnapshotBase> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = open.get(&(pool, root)).and_then(Weak::upgrade) {
            return base;
        }
        let base = Arc::new(SnapshotBase {
            pool,
            root,
            snapshots: Arc::clone(self),
            leaves: Arc::new(Leaves::new(root.geometry.chunks())),
            stall: Stall::default(),
        });
        open.retain(|_, base| base.strong_count() > 0);
        open.insert((pool, root), Arc::downgrade(&base));
        base
    }

    /// Ends all waiting for the repository; whoever waits gets an error.
    pub fn stop(&self) {
        self.fetcher.stop();
    }
}

/// The bytes of one snapshot. Reading what is on this host takes no lock and never waits for the
/// network.
#[derive(Debug)]
pub struct SnapshotBase {
    pool: u32,
    root: Root,
    snapshots: Arc<Snapshots>,
    leaves: Arc<Leaves>,
    stall: Stall,
}

impl SnapshotBase {
    /// Bytes of a chunk.
    #[must_use]
    pub const fn chunk_size(&self) -> ChunkSize {
        self.root.geometry.chunk_size
    }

    /// What is known of a chunk without asking anybody.
    fn leaf(&self, chunk: u64) -> Leaf {
        if self.root.node.is_none() || chunk >= self.root.geometry.chunks() {
            return Leaf::Hole;
        }
        self.leaves.get(chunk)
    }

    /// What there is at a chunk.
    pub(crate) async fn look_up(
        &self,
        chunk: u64,
        patience: Duration,
    ) -> Result<Option<Hash>, BaseError> {
        let known = self.leaf(chunk);
        let (Leaf::Unknown, Some(top)) = (known, self.root.node) else {
            return Ok(if let Leaf::Chunk(id) = known { Some(id) } else { None });
        };
        let run = chunk / RUN_CHUNKS;
        let first = run * RUN_CHUNKS;
        let chunks = first..(first + RUN_CHUNKS).min(self.root.geometry.chunks());
        let fetcher = &self.snapshots.fetcher;
        let waiting = (&self.stall, patience);
        let found = fetcher.run(self.pool, self.root, top, chunks, waiting).await;
        let ids = found.map_err(|error| base_error(chunk, error))?;
        self.snapshots.leaf_budget.keep(&self.leaves, run, &ids);
        Ok(ids.get((chunk - first) as usize).copied().flatten())
    }

    /// Bytes that the cache of the host holds at most.
    pub(crate) fn cache_bytes(&self) -> u64 {
        self.snapshots.fetcher.cache.capacity_bytes()
    }

    /// How long a guest's read waits.
    fn patience(&self) -> Duration {
        self.snapshots.fetcher.patience()
    }

    /// The chunk with this identity, for somebody who waits for it.
    async fn bring(&self, chunk: u64, id: Hash) -> Result<Brought, BaseError> {
        let fetcher = &self.snapshots.fetcher;
        let _guest = fetcher.turns.guest();
        let waiting = (&self.stall, self.patience());
        let brought = fetcher.chunk(self.pool, id, self.chunk_size(), waiting).await;
        brought.map_err(|error| base_error(chunk, error))
    }

    /// Has a chunk brought to this host for which nobody waits yet, as soon as those who wait for
    /// others leave the network to it and if it `is_wanted` then. Nothing that is in use makes room for
    /// it in the cache.
    ///
    /// # Errors
    /// Soon when the repository cannot be reached.
    pub(crate) async fn bring_ahead(
        &self,
        chunk: u64,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Ahead, BaseError> {
        let Some(id) = self.look_up(chunk, AHEAD_PATIENCE).await? else { return Ok(Ahead::Here) };
        let fetcher = &self.snapshots.fetcher;
        let _turn = fetcher.turns.ahead().await;
        if !is_wanted() || fetcher.cache.holds(&id, self.chunk_size()) {
            return Ok(Ahead::Here);
        }
        if !fetcher.cache.has_idle_room(self.chunk_size()) {
            return Ok(Ahead::NoRoom);
        }
        // Nobody is stalled by it.
        let waiting = (&Stall::default(), AHEAD_PATIENCE);
        match fetcher.chunk(self.pool, id, self.chunk_size(), waiting).await {
            Ok(Brought { was_here: true, .. }) => Ok(Ahead::Here),
            Ok(_) => Ok(Ahead::Fetched),
            Err(error) => Err(base_error(chunk, error)),
        }
    }

    /// The first byte at or behind `offset` that may be no zero (`data`), or that is surely one
    /// (`!data`), by whole chunks; the size of the snapshot when there is none.
    ///
    /// # Errors
    /// As [`Base::fetch`].
    pub async fn seek(&self, offset: u64, data: bool) -> Result<u64, BaseError> {
        let size = self.root.geometry.size_bytes;
        let chunk_bytes = self.chunk_size().bytes();
        for chunk in offset / chunk_bytes..self.root.geometry.chunks() {
            if self.look_up(chunk, self.patience()).await?.is_some() == data {
                return Ok((chunk * chunk_bytes).max(offset).min(size));
            }
        }
        Ok(size)
    }
}

fn base_error(chunk: u64, error: FetchError) -> BaseError {
    match error {
        FetchError::Unavailable(reason) => BaseError::Unavailable { chunk, reason },
        FetchError::Lost(reason) => BaseError::Lost { chunk, reason },
    }
}

#[async_trait]
impl Base for SnapshotBase {
    fn size_bytes(&self) -> u64 {
        self.root.geometry.size_bytes
    }

    fn read_local(&self, chunk: u64, within: u64, out: &mut [u8]) -> Result<bool, BaseError> {
        match self.leaf(chunk) {
            Leaf::Unknown => Ok(false),
            Leaf::Hole => {
                out.fill(0);
                Ok(true)
            }
            Leaf::Chunk(id) => {
                let cache = &self.snapshots.fetcher.cache;
                Ok(cache.read(&id, self.chunk_size(), within as usize, out))
            }
        }
    }

    async fn fetch(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        let Some(id) = self.look_up(chunk, self.patience()).await? else { return Ok(None) };
        Ok(Some(self.bring(chunk, id).await?.bytes))
    }

    fn may_have_data(&self, chunk: u64) -> Option<bool> {
        match self.leaf(chunk) {
            Leaf::Unknown => None,
            Leaf::Hole => Some(false),
            Leaf::Chunk(_) => Some(true),
        }
    }
}
