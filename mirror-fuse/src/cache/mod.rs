//! The clean chunks of a host, shared by all its disks and kept over restarts.
//!
//! A thousand disks of one base image keep each chunk of it once, because chunks are addressed by
//! identity. The cache never holds the only copy of anything: whenever something is wrong with it
//! (no space, a damaged slot, a lost index) a chunk is simply not cached, and is fetched again.
//!
//! | file | holds |
//! |---|---|
//! | `index` | the on-disk index of a slab |
//! | `slab` | the slots of one chunk size: lookup, reading without a global lock, the clock |
//! | this one | the bound on all slabs together, and what a caller sees |

mod index;
mod slab;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use blobcr_proto::{ChunkSize, Hash};
use bytes::Bytes;

use slab::{Found, Slab};

/// 64 KiB, 128 KiB, … 4 MiB.
const CHUNK_SIZES: usize = (ChunkSize::MAX.bytes().trailing_zeros()
    - ChunkSize::MIN.bytes().trailing_zeros()) as usize
    + 1;

/// How much a cache may take.
#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    /// Bytes of chunks at most.
    pub capacity_bytes: u64,
    /// The cache does not grow when this little would be left free in its file system, and
    /// [`ChunkCache::yield_space`] makes it smaller: the writes of guests go first.
    pub keep_free_bytes: u64,
}

/// The cache of one host. All methods may be called from many threads at once.
#[derive(Debug)]
pub struct ChunkCache {
    dir: PathBuf,
    /// For asking how much space is left.
    dir_handle: File,
    limits: CacheLimits,
    slabs: [OnceLock<Slab>; CHUNK_SIZES],
    opening: Mutex<()>,
    /// Bytes of all slots that hold a chunk or are being filled.
    used_bytes: Arc<AtomicU64>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
    evicted: AtomicU64,
    refused: AtomicU64,
}

/// What a cache holds and did since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStatus {
    /// Bytes of chunks now.
    pub used_bytes: u64,
    /// Bytes of chunks at most.
    pub capacity_bytes: u64,
    /// Reads that were served.
    pub hits: u64,
    /// Reads that were not.
    pub misses: u64,
    /// Chunks that made room for others.
    pub evicted: u64,
    /// Chunks that were not kept, for want of space.
    pub refused: u64,
}

fn class(chunk_size: ChunkSize) -> usize {
    (chunk_size.bytes().trailing_zeros() - ChunkSize::MIN.bytes().trailing_zeros()) as usize
}

impl ChunkCache {
    /// Opens the cache in `dir`, which is made if it is not there, with all that an earlier process
    /// left in it. The caller sees to it that no other process has it open.
    ///
    /// # Errors
    /// When `dir` or a file in it cannot be made or read.
    pub fn open(dir: &Path, limits: CacheLimits) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let cache = Self {
            dir: dir.to_owned(),
            dir_handle: File::open(dir)?,
            limits,
            slabs: std::array::from_fn(|_| OnceLock::new()),
            opening: Mutex::default(),
            used_bytes: Arc::default(),
            counts: Counts::default(),
        };
        for shift in 0..CHUNK_SIZES {
            let size = ChunkSize::MIN.bytes() << shift;
            if dir.join(format!("chunks-{}k.data", size >> 10)).exists()
                && let Ok(chunk_size) = ChunkSize::new(size)
            {
                cache.slab_or_open(chunk_size)?;
            }
        }
        // The bound may be smaller than it was.
        while cache.used_bytes.load(Ordering::Relaxed) > limits.capacity_bytes
            && cache.shrink_largest()
        {}
        Ok(cache)
    }

    /// Reads part of a chunk into `out` and tells whether it could, without waiting for the
    /// network. The part must lie within the chunk.
    pub fn read(&self, id: &Hash, chunk_size: ChunkSize, within: usize, out: &mut [u8]) -> bool {
        let found = self.slabs[class(chunk_size)]
            .get()
            .map_or(Found::Miss, |slab| slab.read(id, within, out));
        let count = if found == Found::Hit { &self.counts.hits } else { &self.counts.misses };
        count.fetch_add(1, Ordering::Relaxed);
        found == Found::Hit
    }

    /// A whole chunk, compared with its identity: how a chunk that an earlier process cached is
    /// trusted again. Blocks on the disk and on hashing. A damaged chunk is dropped.
    #[must_use]
    pub fn read_verified(&self, id: &Hash, chunk_size: ChunkSize) -> Option<Bytes> {
        let slab = self.slabs[class(chunk_size)].get()?;
        slab.read_verified(id).map(Bytes::from)
    }

    /// Whether the chunk is here, as far as one can tell without reading it.
    #[must_use]
    pub fn holds(&self, id: &Hash, chunk_size: ChunkSize) -> bool {
        self.slabs[class(chunk_size)].get().is_some_and(|slab| slab.holds(id))
    }

    /// Whether a chunk can be kept without forgetting one that is in use: there is space for one more,
    /// or one of those that are next to go was not read for a whole round.
    #[must_use]
    pub fn has_idle_room(&self, chunk_size: ChunkSize) -> bool {
        let size = chunk_size.bytes();
        let used = self.used_bytes.load(Ordering::Relaxed);
        let may_grow = self.grown(used, size).is_some() && self.leaves_enough_free(size);
        may_grow || self.slabs[class(chunk_size)].get().is_some_and(Slab::next_is_idle)
    }

    /// Bytes of chunks at most.
    #[must_use]
    pub const fn capacity_bytes(&self) -> u64 {
        self.limits.capacity_bytes
    }

    /// Keeps a chunk, whose identity the caller has checked. Blocks on the disk. Without space for
    /// it the chunk is not kept, and nothing else happens.
    pub fn insert(&self, id: Hash, chunk: &[u8]) {
        let Ok(chunk_size) = ChunkSize::new(chunk.len() as u64) else { return };
        debug_assert_eq!(Hash::of(chunk), id, "the caller checks identities");
        if self.limits.capacity_bytes < chunk_size.bytes() || self.holds(&id, chunk_size) {
            return;
        }
        let kept = self.slab_or_open(chunk_size).and_then(|slab| {
            let Some(slot) = self.claim(slab) else {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            };
            slab.fill(slot, id, chunk)
        });
        if let Err(error) = kept {
            self.counts.refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%error, chunk = %id, "a chunk is not cached");
        }
    }

    /// Makes the cache smaller until the file system has the space that is to be kept free.
    /// Returns how many bytes it gave back.
    pub fn yield_space(&self) -> u64 {
        let before = self.used_bytes.load(Ordering::Relaxed);
        while self.free_bytes() < self.limits.keep_free_bytes && self.shrink_largest() {}
        before.saturating_sub(self.used_bytes.load(Ordering::Relaxed))
    }

    /// Makes the cache smaller by `bytes`, or by all that it has: for somebody who found the file
    /// system full. Returns how many bytes it gave back.
    pub fn give_back(&self, bytes: u64) -> u64 {
        let before = self.used_bytes.load(Ordering::Relaxed);
        let given = || before.saturating_sub(self.used_bytes.load(Ordering::Relaxed));
        while given() < bytes && self.shrink_largest() {}
        given()
    }

    /// What the cache holds and did.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CacheStatus {
            used_bytes: get(&self.used_bytes),
            capacity_bytes: self.limits.capacity_bytes,
            hits: get(&self.counts.hits),
            misses: get(&self.counts.misses),
            evicted: get(&self.counts.evicted),
            refused: get(&self.counts.refused),
        }
    }

    fn slab_or_open(&self, chunk_size: ChunkSize) -> io::Result<&Slab> {
        let place = &self.slabs[class(chunk_size)];
        if let Some(slab) = place.get() {
            return Ok(slab);
        }
        let _one_at_a_time = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if place.get().is_none() {
            let slots = self.limits.capacity_bytes / chunk_size.bytes();
            let slots = u32::try_from(slots).unwrap_or(u32::MAX);
            let slab = Slab::open(&self.dir, chunk_size, slots, Arc::clone(&self.used_bytes))?;
            let _ = place.set(slab);
        }
        Ok(place.get().expect("it was set under the lock"))
    }

    /// A slot of `slab` to fill: a new one while the cache may grow, otherwise that of an old chunk,
    /// of this chunk size or of the one that takes the most.
    fn claim(&self, slab: &Slab) -> Option<u32> {
        let size = slab.chunk_size().bytes();
        if let Some(slot) = self.claim_grown(slab, size) {
            return Some(slot);
        }
        let largest = self.largest()?;
        if largest.chunk_size() != slab.chunk_size() && largest.held_bytes() / 2 > slab.held_bytes()
        {
            let mut given = 0;
            while given < size && self.shrink_one(largest) {
                given += largest.chunk_size().bytes();
            }
            if let Some(slot) = self.claim_grown(slab, size) {
                return Some(slot);
            }
        }
        let slot = slab.claim_oldest()?;
        self.counts.evicted.fetch_add(1, Ordering::Relaxed);
        Some(slot)
    }

    fn claim_grown(&self, slab: &Slab, size: u64) -> Option<u32> {
        if !self.leaves_enough_free(size) {
            return None;
        }
        let grow = |used| self.grown(used, size);
        self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow).ok()?;
        let slot = slab.claim_empty();
        if slot.is_none() {
            self.used_bytes.fetch_sub(size, Ordering::Relaxed);
        }
        slot
    }

    /// Whether the file system has `size` bytes besides those that are to be kept free.
    fn leaves_enough_free(&self, size: u64) -> bool {
        self.free_bytes() >= self.limits.keep_free_bytes.saturating_add(size)
    }

    /// What is used with `size` bytes more, if that may be.
    fn grown(&self, used: u64, size: u64) -> Option<u64> {
        used.checked_add(size).filter(|grown| *grown <= self.limits.capacity_bytes)
    }

    fn largest(&self) -> Option<&Slab> {
        self.slabs.iter().filter_map(OnceLock::get).max_by_key(|slab| slab.held_bytes())
    }

    fn shrink_largest(&self) -> bool {
        self.largest().is_some_and(|slab| self.shrink_one(slab))
    }

    fn shrink_one(&self, slab: &Slab) -> bool {
        let shrunk = slab.shrink();
        if shrunk {
            self.counts.evicted.fetch_add(1, Ordering::Relaxed);
        }
        shrunk
    }

    /// Free for us in the file system; when it does not tell, writing will.
    fn free_bytes(&self) -> u64 {
        rustix::fs::fstatvfs(&self.dir_handle)
            .map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}
