//! The chunks of one size: a data file cut into slots, and who holds each slot.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use blobcr_proto::{ChunkSize, Hash};
use rustix::fs::{Advice, FallocateFlags};

use super::index::IndexFile;

/// Parts of the map from identity to slot, each under its own lock: enough that the few threads
/// of a host rarely meet.
const SHARDS: usize = 64;
/// Slots are made known in runs of this many, so that a large bound costs no memory before use.
const SEGMENT_SLOTS: usize = 4096;
/// The kernel's large folios make later small reads slow when a file was written in bigger pieces.
const WRITE_BYTES_MAX: usize = 256 << 10;

/// How far before the hand of the clock an idle chunk is looked for: few enough to look at each time.
const IDLE_WITHIN: usize = 64;

/// Was read since the hand of the clock last came by.
const REFERENCED: u64 = 1;
/// Its bytes were compared with its identity since this process opened the slab.
const VERIFIED: u64 = 2;
/// The rest of a slot's word counts the chunks that it has held.
const GENERATION_UNIT: u64 = 4;

fn generation(word: u64) -> u64 {
    word / GENERATION_UNIT
}

/// What a slab has of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The bytes asked for are in the caller's buffer.
    Hit,
    /// There may be a chunk, but it has to be compared with its identity first.
    Unverified,
    /// Nothing.
    Miss,
}

#[derive(Clone, Copy, Debug)]
enum Holder {
    Nobody,
    /// Being written; the hand of the clock passes it by.
    Filling,
    Chunk(Hash),
}

#[derive(Debug, Default)]
struct Clock {
    hand: usize,
    holders: Vec<Holder>,
    empty: Vec<u32>,
}

/// One slab. Readers take a shared lock on one of [`SHARDS`] maps and nothing else.
#[derive(Debug)]
pub(super) struct Slab {
    chunk_size: ChunkSize,
    data: File,
    index: IndexFile,
    slots_max: u32,
    segments: Box<[OnceLock<Box<[AtomicU64]>>]>,
    shards: [RwLock<HashMap<Hash, u32>>; SHARDS],
    clock: Mutex<Clock>,
    held_bytes: AtomicU64,
    /// The same for all slabs of the cache together.
    used_bytes: Arc<AtomicU64>,
}

impl Slab {
    /// Opens or makes the slab of a chunk size in `dir`, with room for `slots_max` chunks. What it
    /// takes is added to `used_bytes`, and subtracted as it is given back; only [`Self::claim_empty`]
    /// leaves it to the caller to have added the slot's size.
    pub(super) fn open(
        dir: &Path,
        chunk_size: ChunkSize,
        slots_max: u32,
        used_bytes: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let stem = format!("chunks-{}k", chunk_size.bytes() >> 10);
        let index = dir.join(format!("{stem}.index"));
        let (index, known) = IndexFile::open(&index, chunk_size, slots_max)?;
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(format!("{stem}.data")))?;
        rustix::fs::fadvise(&data, 0, None, Advice::Random)?;
        let segments = (slots_max as usize).div_ceil(SEGMENT_SLOTS);
        let slab = Self {
            chunk_size,
            data,
            index,
            slots_max,
            segments: (0..segments).map(|_| OnceLock::new()).collect(),
            shards: std::array::from_fn(|_| RwLock::default()),
            clock: Mutex::default(),
            held_bytes: AtomicU64::new(0),
            used_bytes,
        };
        slab.adopt(&known)?;
        Ok(slab)
    }

    /// Takes over what an earlier process left: every chunk that the index names and the data file
    /// is long enough for, unverified. All else is given back to the file system.
    fn adopt(&self, known: &[Option<Hash>]) -> io::Result<()> {
        let size = self.chunk_size.bytes();
        let whole = self.data.metadata()?.len() / size;
        let mut clock = self.clock();
        for (id, slot) in known.iter().zip(0u32..).take(whole as usize) {
            let fresh = id.filter(|id| self.shard(id).insert_new(*id, slot));
            clock.holders.push(fresh.map_or(Holder::Nobody, Holder::Chunk));
            match fresh {
                Some(_) => {
                    self.held_bytes.fetch_add(size, Ordering::Relaxed);
                    self.used_bytes.fetch_add(size, Ordering::Relaxed);
                }
                None => {
                    clock.empty.push(slot);
                    self.give_space_back(slot);
                }
            }
        }
        self.data.set_len(clock.holders.len() as u64 * size)
    }

    pub(super) const fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// Bytes of the slots that hold a chunk or are being filled.
    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn holds(&self, id: &Hash) -> bool {
        self.shard(id).read().contains_key(id)
    }

    /// Reads part of a chunk into `out` with one `pread`.
    pub(super) fn read(&self, id: &Hash, within: usize, out: &mut [u8]) -> Found {
        debug_assert!(within + out.len() <= self.chunk_size.len());
        let Some((slot, before)) = self.find(id) else { return Found::Miss };
        if before & VERIFIED == 0 {
            return Found::Unverified;
        }
        let at = u64::from(slot) * self.chunk_size.bytes() + within as u64;
        if let Err(error) = self.data.read_exact_at(out, at) {
            tracing::warn!(%error, chunk = %id, "a cached chunk cannot be read and is dropped");
            self.drop_chunk(id, before);
            return Found::Miss;
        }
        if !self.still(slot, before) {
            return Found::Miss;
        }
        if before & REFERENCED == 0 {
            self.word(slot).fetch_or(REFERENCED, Ordering::Relaxed);
        }
        Found::Hit
    }

    /// Reads a whole chunk and compares it with its identity. A chunk that is not what it should
    /// be is dropped.
    pub(super) fn read_verified(&self, id: &Hash) -> Option<Vec<u8>> {
        let (slot, before) = self.find(id)?;
        let mut bytes = vec![0; self.chunk_size.len()];
        let at = u64::from(slot) * self.chunk_size.bytes();
        let read = self.data.read_exact_at(&mut bytes, at);
        if read.is_ok() && Hash::of(&bytes) == *id {
            // If the slot changed hands meanwhile, the bit of another chunk must not be set.
            let word = self.word(slot);
            let seen = before & !REFERENCED;
            for expected in [seen, seen | REFERENCED] {
                let verified = expected | VERIFIED | REFERENCED;
                let _ =
                    word.compare_exchange(expected, verified, Ordering::Relaxed, Ordering::Relaxed);
            }
            return Some(bytes);
        }
        if self.still(slot, before) {
            tracing::warn!(chunk = %id, "a cached chunk is damaged and is dropped");
            self.drop_chunk(id, before);
        }
        None
    }

    /// Writes a chunk into a slot that [`Self::claim`] gave, and makes it known. `Ok(false)`: it
    /// was there already, and the slot is free again.
    pub(super) fn fill(&self, slot: u32, id: Hash, bytes: &[u8]) -> io::Result<bool> {
        debug_assert_eq!(bytes.len(), self.chunk_size.len());
        let at = u64::from(slot) * self.chunk_size.bytes();
        let written = bytes
            .chunks(WRITE_BYTES_MAX)
            .zip((at..).step_by(WRITE_BYTES_MAX))
            .try_for_each(|(piece, at)| self.data.write_all_at(piece, at))
            .and_then(|()| self.index.set(slot, &id));
        let mut clock = self.clock();
        let new = written.is_ok() && {
            let mut shard = self.shard(&id).write();
            let new = !shard.contains_key(&id);
            if new {
                self.word(slot).fetch_or(VERIFIED, Ordering::Relaxed);
                shard.insert(id, slot);
            }
            new
        };
        if new {
            clock.holders[slot as usize] = Holder::Chunk(id);
        } else {
            self.release(&mut clock, slot);
        }
        written.map(|()| new)
    }

    /// A slot to fill, out of those that hold nothing. `None` when all of them hold something.
    pub(super) fn claim_empty(&self) -> Option<u32> {
        let mut clock = self.clock();
        let slot = clock.empty.pop().or_else(|| {
            let next = clock.holders.len() as u32;
            (next < self.slots_max).then(|| {
                clock.holders.push(Holder::Nobody);
                next
            })
        })?;
        clock.holders[slot as usize] = Holder::Filling;
        self.held_bytes.fetch_add(self.chunk_size.bytes(), Ordering::Relaxed);
        Some(slot)
    }

    /// A slot to fill, taken from the chunk that was not read for longest. `None` when every slot
    /// is being filled.
    pub(super) fn claim_oldest(&self) -> Option<u32> {
        let mut clock = self.clock();
        let slot = self.evict(&mut clock)?;
        clock.holders[slot as usize] = Holder::Filling;
        Some(slot)
    }

    /// Gives the space of the chunk that was not read for longest back to the file system.
    pub(super) fn shrink(&self) -> bool {
        let mut clock = self.clock();
        let Some(slot) = self.evict(&mut clock) else { return false };
        self.release(&mut clock, slot);
        true
    }

    /// Whether one of the chunks that the hand of the clock comes to next was not read since it last
    /// came by.
    pub(super) fn next_is_idle(&self) -> bool {
        let clock = self.clock();
        let slots = clock.holders.len();
        (clock.hand..clock.hand + slots.min(IDLE_WITHIN)).map(|at| at % slots).any(|at| {
            matches!(clock.holders[at], Holder::Chunk(_))
                && self.word(at as u32).load(Ordering::Relaxed) & REFERENCED == 0
        })
    }

    fn evict(&self, clock: &mut Clock) -> Option<u32> {
        // Twice round: the first may only clear the marks of all.
        for _ in 0..2 * clock.holders.len() {
            let at = clock.hand;
            clock.hand = (at + 1) % clock.holders.len();
            let Holder::Chunk(id) = clock.holders[at] else { continue };
            let slot = at as u32;
            if self.word(slot).fetch_and(!REFERENCED, Ordering::Relaxed) & REFERENCED == 0 {
                self.forget(&id, slot);
                return Some(slot);
            }
        }
        None
    }

    /// Unmaps a chunk, and then tells readers that are half way through it that it is gone. Both
    /// happen before its slot can be written to.
    fn forget(&self, id: &Hash, slot: u32) {
        let mut shard = self.shard(id).write();
        shard.remove(id);
        let word = self.word(slot);
        let next = (generation(word.load(Ordering::Relaxed)) + 1) * GENERATION_UNIT;
        word.store(next, Ordering::SeqCst);
    }

    fn drop_chunk(&self, id: &Hash, seen: u64) {
        let mut clock = self.clock();
        let Some((slot, word)) = self.find(id) else { return };
        if generation(word) == generation(seen) {
            self.forget(id, slot);
            self.release(&mut clock, slot);
        }
    }

    fn release(&self, clock: &mut Clock, slot: u32) {
        clock.holders[slot as usize] = Holder::Nobody;
        clock.empty.push(slot);
        self.held_bytes.fetch_sub(self.chunk_size.bytes(), Ordering::Relaxed);
        self.used_bytes.fetch_sub(self.chunk_size.bytes(), Ordering::Relaxed);
        self.give_space_back(slot);
    }

    fn give_space_back(&self, slot: u32) {
        let size = self.chunk_size.bytes();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(&self.data, flags, u64::from(slot) * size, size);
        if let Err(error) = punched.map_err(io::Error::from).and_then(|()| self.index.clear(slot)) {
            // Only space is lost: the next chunk in this slot overwrites both.
            tracing::debug!(%error, slot, "the space of a cache slot was not given back");
        }
    }

    fn find(&self, id: &Hash) -> Option<(u32, u64)> {
        let shard = self.shard(id).read();
        let slot = *shard.get(id)?;
        // Under the lock: the word is that of this very chunk.
        Some((slot, self.word(slot).load(Ordering::Acquire)))
    }

    fn still(&self, slot: u32, before: u64) -> bool {
        fence(Ordering::SeqCst);
        generation(self.word(slot).load(Ordering::SeqCst)) == generation(before)
    }

    fn word(&self, slot: u32) -> &AtomicU64 {
        let (segment, within) = (slot as usize / SEGMENT_SLOTS, slot as usize % SEGMENT_SLOTS);
        let segment = self.segments[segment]
            .get_or_init(|| (0..SEGMENT_SLOTS).map(|_| AtomicU64::new(0)).collect());
        &segment[within]
    }

    fn shard(&self, id: &Hash) -> Shard<'_> {
        Shard(&self.shards[(id.prefix() % SHARDS as u64) as usize])
    }

    fn clock(&self) -> std::sync::MutexGuard<'_, Clock> {
        // Nothing that can panic runs half way through a change of the clock.
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Shard<'a>(&'a RwLock<HashMap<Hash, u32>>);

impl<'a> Shard<'a> {
    fn read(&self) -> std::sync::RwLockReadGuard<'a, HashMap<Hash, u32>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'a, HashMap<Hash, u32>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert_new(&self, id: Hash, slot: u32) -> bool {
        let mut map = self.write();
        let new = !map.contains_key(&id);
        if new {
            map.insert(id, slot);
        }
        new
    }
}
