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

mod fetcher;
mod flights;
mod leaves;
mod nodes;
mod stall;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use blobcr_proto::{ChunkSize, Hash};
use blobcr_repository::Repository;
use blobcr_repository::tree::Root;
use bytes::Bytes;

use crate::cache::ChunkCache;
use crate::disk::{Base, BaseError, BaseOpener, Source};
use fetcher::{FetchError, Fetcher};
use leaves::{Leaf, LeafBudget, Leaves, RUN_CHUNKS};
use nodes::LocalNodes;
use stall::Stall;

pub use fetcher::FetchLimits;

/// Bytes of chunk identities that all snapshots of a host keep in memory: the whole maps of two
/// terabytes of 256 KiB chunks.
const LEAF_BYTES_MAX: u64 = 256 << 20;

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

/// Opens the snapshots below one disk, and knows which one that is now.
#[derive(Debug)]
pub struct DiskBases {
    snapshots: Arc<Snapshots>,
    newest: Mutex<Weak<SnapshotBase>>,
}

impl DiskBases {
    /// For a disk that is about to be made or opened.
    #[must_use]
    pub fn new(snapshots: Arc<Snapshots>) -> Arc<Self> {
        Arc::new(Self { snapshots, newest: Mutex::default() })
    }

    /// Why reads of the snapshot below the disk wait just now; `None` when none does.
    #[must_use]
    pub fn stalled(&self) -> Option<String> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        newest.upgrade()?.stall.reason()
    }
}

impl BaseOpener for DiskBases {
    fn open(&self, source: &Source) -> Result<Arc<dyn Base>, BaseError> {
        let root = Root::try_from(&source.root).map_err(|error| {
            BaseError::Open(format!("{}@{}: {error}", source.image, source.number))
        })?;
        let base = self.snapshots.base(source.pool, root);
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&base);
        Ok(base)
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
    async fn look_up(&self, chunk: u64) -> Result<Option<Hash>, BaseError> {
        let known = self.leaf(chunk);
        let (Leaf::Unknown, Some(top)) = (known, self.root.node) else {
            return Ok(if let Leaf::Chunk(id) = known { Some(id) } else { None });
        };
        let run = chunk / RUN_CHUNKS;
        let first = run * RUN_CHUNKS;
        let chunks = first..(first + RUN_CHUNKS).min(self.root.geometry.chunks());
        let fetcher = &self.snapshots.fetcher;
        let found = fetcher.run(self.pool, self.root, top, chunks, &self.stall).await;
        let ids = found.map_err(|error| base_error(chunk, error))?;
        self.snapshots.leaf_budget.keep(&self.leaves, run, &ids);
        Ok(ids.get((chunk - first) as usize).copied().flatten())
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
            if self.look_up(chunk).await?.is_some() == data {
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
        let Some(id) = self.look_up(chunk).await? else { return Ok(None) };
        let fetcher = &self.snapshots.fetcher;
        let fetched = fetcher.chunk(self.pool, id, self.chunk_size(), &self.stall).await;
        fetched.map(Some).map_err(|error| base_error(chunk, error))
    }

    fn may_have_data(&self, chunk: u64) -> Option<bool> {
        match self.leaf(chunk) {
            Leaf::Unknown => None,
            Leaf::Hole => Some(false),
            Leaf::Chunk(_) => Some(true),
        }
    }
}
