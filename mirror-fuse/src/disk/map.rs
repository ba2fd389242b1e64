//! The `map` file: which sectors are in the delta, and which chunks are dirty. A sparse file,
//! mapped shared, so that what a write records is in the page cache at once and survives the death
//! of the daemon without a system call.
//!
//! ```text
//! offset       bytes
//!      0        4096  head: magic "BCDM", what disk and generation this is
//!   4096    2 * 4096  the volatile facts, two slots
//!  12288        4096  two words: see `break_snapshot`
//!  16384           …  one record for each chunk, in native (little-endian) words:
//!                       word 0    mark: epoch of the last change << 1 | captured
//!                       word 1 …  presence: a bit for each sector that is in the delta
//! ```
//!
//! *Order.* A chunk's mark is set **before** its bytes in the delta change and its presence bits
//! **after**. So whenever the daemon dies, a changed chunk is known to be dirty, and a present
//! sector is really in the delta. Presence bits are never cleared.
//!
//! *No SIGBUS.* A store to a hole of a mapped file needs a block, and without space left the
//! kernel kills the writer. So the blocks below a record are allocated before its first store
//! ([`Map::reserve`]), where the lack of space is an ordinary error.
//!
//! *Host crash.* The kernel writes mapped pages back in any order: a presence bit may be durable
//! while the sector's bytes are not. After a host crash this file is not believed; it is made anew
//! from the journal.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::SeekFrom;

use super::DiskError;
use super::facts::{self, Facts};
use super::files::Files;
use super::frame::{self, Kind};
use super::io::Which;
use super::shape::{Sectors, Shape, run_of_bits};

#[cfg(target_endian = "big")]
compile_error!("map records are native words and meant to be little endian");

/// Versions: 1, the first.
const KIND: Kind = Kind { magic: *b"BCDM", version: 1 };
const PAGE: usize = 4096;
const FACTS_AT: usize = PAGE;
const FACTS_SLOTS: u64 = 2;
const BROKEN_AT: usize = 3 * PAGE;
const BROKEN_WORDS: u64 = 2;
const RECORDS_AT: usize = 4 * PAGE;
const WORD: usize = 8;
/// Bits of a presence word.
const BITS: usize = 64;
/// Blocks are allocated in extents of this size: 1 GiB of disk at the default chunk size, so that
/// allocations are rare and the map stays in few extents.
const EXTENT: usize = 64 << 10;

/// Which disk and generation a map (or journal) belongs to, so that files that were mixed up are
/// noticed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Identity {
    /// 16 bytes, big endian.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) uid: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub(super) generation: u64,
    #[prost(uint64, tag = "3")]
    pub(super) size_bytes: u64,
    #[prost(uint64, tag = "4")]
    pub(super) chunk_size: u64,
}

/// When a chunk was last changed, and whether the snapshot of that change has its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Mark {
    /// 0: never.
    pub(super) epoch: u64,
    /// The persister has read the chunk for the snapshot that covers `epoch` (the paper's `Idle`
    /// after `Pending`). Means nothing once that snapshot or the daemon is gone.
    pub(super) captured: bool,
}

/// A mapped map file.
pub(super) struct Map {
    files: Arc<Files>,
    file: File,
    memory: MmapRaw,
    shape: Shape,
    /// Words of a record.
    record_words: usize,
    /// A bit for each extent whose blocks are allocated.
    reserved: Box<[AtomicU64]>,
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Map").field("shape", &self.shape).finish_non_exhaustive()
    }
}

const fn record_words(shape: Shape) -> usize {
    1 + (shape.chunk_size.sectors() as usize).div_ceil(BITS)
}

const fn file_len(shape: Shape) -> u64 {
    let records = shape.chunks() * (record_words(shape) * WORD) as u64;
    (RECORDS_AT as u64 + records).next_multiple_of(EXTENT as u64)
}

impl Map {
    /// Makes an empty map. Costs the same for every size of disk.
    pub(super) fn create(
        files: &Arc<Files>,
        path: &Path,
        shape: Shape,
        identity: &Identity,
    ) -> Result<Self, DiskError> {
        let file = files.create(Which::Map, path)?;
        files.set_len(Which::Map, &file, file_len(shape))?;
        files.allocate(Which::Map, &file, 0, RECORDS_AT as u64)?;
        files.write_all_at(Which::Map, &file, &frame::encode(KIND, identity), 0)?;
        Self::mapped(files, file, shape)
    }

    pub(super) fn open(
        files: &Arc<Files>,
        path: &Path,
        shape: Shape,
        identity: &Identity,
    ) -> Result<Self, DiskError> {
        let file = files.open(Which::Map, path)?;
        let len = file.metadata().map_err(|error| files.error(Which::Map, "read", error))?.len();
        if len != file_len(shape) {
            let detail = format!("it has {len} bytes instead of {}", file_len(shape));
            return Err(files.damaged(Which::Map, detail));
        }
        files.allocate(Which::Map, &file, 0, RECORDS_AT as u64)?;
        let map = Self::mapped(files, file, shape)?;
        let head: Identity = frame::decode(KIND, &map.copy_page(0))
            .map_err(|detail| files.damaged(Which::Map, detail))?;
        if head != *identity {
            return Err(files.damaged(Which::Map, "it belongs to another disk"));
        }
        Ok(map)
    }

    fn mapped(files: &Arc<Files>, file: File, shape: Shape) -> Result<Self, DiskError> {
        let memory = MmapOptions::new()
            .map_raw(&file)
            .map_err(|error| files.error(Which::Map, "map", error))?;
        // Readahead would fill megabytes of memory with what is mostly holes, at the first touch.
        memory
            .advise(Advice::Random)
            .map_err(|error| files.error(Which::Map, "advise on", error))?;
        let extents = memory.len() / EXTENT;
        let reserved: Box<[AtomicU64]> =
            (0..extents.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        let record_words = record_words(shape);
        Ok(Self { files: Arc::clone(files), file, memory, shape, record_words, reserved })
    }

    /// The word at byte `at`.
    fn word_at(&self, at: usize) -> &AtomicU64 {
        assert!(at + WORD <= self.memory.len() && at.is_multiple_of(WORD), "word beyond the map");
        // SAFETY: the word lies in the mapping (checked above), which lives as long as `self`, is
        // aligned (pages are, and `at` is), and is only ever accessed as an atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().add(at).cast()) }
    }

    fn word(&self, chunk: u64, index: usize) -> &AtomicU64 {
        debug_assert!(chunk < self.shape.chunks() && index < self.record_words);
        self.word_at(RECORDS_AT + (chunk as usize * self.record_words + index) * WORD)
    }

    fn copy_page(&self, at: usize) -> Vec<u8> {
        let words = (at..at + PAGE).step_by(WORD);
        words.flat_map(|at| self.word_at(at).load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Allocates the blocks below a chunk's record, so that stores to it cannot fail.
    pub(super) fn reserve(&self, chunk: u64) -> Result<(), DiskError> {
        let start = RECORDS_AT + chunk as usize * self.record_words * WORD;
        let last = start + self.record_words * WORD - 1;
        for extent in start / EXTENT..=last / EXTENT {
            let bit = 1 << (extent % BITS);
            let word = &self.reserved[extent / BITS];
            if word.load(Ordering::Acquire) & bit == 0 {
                let offset = (extent * EXTENT) as u64;
                self.files.allocate(Which::Map, &self.file, offset, EXTENT as u64)?;
                word.fetch_or(bit, Ordering::Release);
            }
        }
        Ok(())
    }

    pub(super) fn mark(&self, chunk: u64) -> Mark {
        let word = self.word(chunk, 0).load(Ordering::Acquire);
        Mark { epoch: word >> 1, captured: word & 1 == 1 }
    }

    /// The chunk's record must be reserved, and its lock held.
    pub(super) fn set_mark(&self, chunk: u64, mark: Mark) {
        let word = mark.epoch << 1 | u64::from(mark.captured);
        self.word(chunk, 0).store(word, Ordering::Release);
    }

    /// The presence words of a chunk.
    pub(super) fn presence(&self, chunk: u64) -> impl Iterator<Item = u64> + '_ {
        (1..self.record_words).map(move |index| self.word(chunk, index).load(Ordering::Acquire))
    }

    /// How many presence words a record has.
    pub(super) const fn presence_words(&self) -> usize {
        self.record_words - 1
    }

    pub(super) fn is_present(&self, chunk: u64, sector: usize) -> bool {
        let word = self.word(chunk, 1 + sector / BITS).load(Ordering::Acquire);
        word >> (sector % BITS) & 1 == 1
    }

    /// Whether the delta holds `sectors.first`, and the first sector up to `sectors.end` for which
    /// that is otherwise.
    pub(super) fn run(&self, chunk: u64, sectors: Sectors) -> (bool, usize) {
        run_of_bits(|index| self.word(chunk, 1 + index).load(Ordering::Acquire), sectors)
    }

    /// The runs of sectors of a chunk that are in the delta.
    pub(super) fn present_runs(&self, chunk: u64) -> Vec<Sectors> {
        let end = self.shape.chunk_sectors(chunk);
        let mut runs = Vec::new();
        let mut first = 0;
        while first < end {
            let (present, next) = self.run(chunk, Sectors { first, end });
            if present {
                runs.push(Sectors { first, end: next });
            }
            first = next;
        }
        runs
    }

    /// Records that the delta holds the sectors; returns how many it did not hold before. The
    /// chunk's record must be reserved.
    pub(super) fn add_present(&self, chunk: u64, sectors: Sectors) -> u32 {
        let mut added = 0;
        let mut at = sectors.first;
        while at < sectors.end {
            let end = sectors.end.min((at / BITS + 1) * BITS);
            let bits = bit_range(at % BITS, end - at);
            let word = self.word(chunk, 1 + at / BITS);
            // Most writes overwrite: spare the cache line.
            if word.load(Ordering::Acquire) & bits != bits {
                let before = word.fetch_or(bits, Ordering::AcqRel);
                added += (bits & !before).count_ones();
            }
            at = end;
        }
        added
    }

    /// Sets a chunk's presence to what the journal says; the record must be reserved.
    pub(super) fn restore_presence(&self, chunk: u64, presence: &[u64]) {
        for (index, bits) in presence.iter().enumerate() {
            self.word(chunk, 1 + index).fetch_or(*bits, Ordering::AcqRel);
        }
    }

    /// Visits every chunk that was ever changed, in order.
    pub(super) fn scan(&self, mut visit: impl FnMut(u64, Mark)) -> Result<(), DiskError> {
        let record = (self.record_words * WORD) as u64;
        let end_of_records = RECORDS_AT as u64 + self.shape.chunks() * record;
        let mut next = 0;
        let mut at = RECORDS_AT as u64;
        while let Some((start, end)) = self.next_data(at)? {
            if start >= end_of_records {
                break;
            }
            // Only for speed: these are pages that do hold something.
            let _ = self.memory.advise_range(
                Advice::WillNeed,
                start as usize,
                (end.min(self.memory.len() as u64) - start) as usize,
            );
            let first = (start.max(RECORDS_AT as u64) - RECORDS_AT as u64) / record;
            let behind = end.min(end_of_records) - RECORDS_AT as u64;
            for chunk in first.max(next)..behind.div_ceil(record) {
                let mark = self.mark(chunk);
                if mark.epoch > 0 {
                    visit(chunk, mark);
                }
                next = chunk + 1;
            }
            at = end;
        }
        Ok(())
    }

    /// The next part of the file from `at` on that may hold anything but zeros.
    fn next_data(&self, at: u64) -> Result<Option<(u64, u64)>, DiskError> {
        let failed = |error: rustix::io::Errno| self.files.error(Which::Map, "scan", error.into());
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).map_err(failed)?;
        Ok(Some((start, end)))
    }

    /// Writes the facts into the older slot; one caller at a time.
    pub(super) fn write_facts(&self, facts: &Facts) {
        let bytes = facts::encode(facts);
        assert!(bytes.len() <= PAGE, "keys and roots are bounded: the facts fit a page");
        let slot = FACTS_AT + (facts.seq % FACTS_SLOTS) as usize * PAGE;
        for (index, word) in bytes.chunks(WORD).enumerate() {
            let mut padded = [0; WORD];
            padded[..word.len()].copy_from_slice(word);
            self.word_at(slot + index * WORD).store(u64::from_le_bytes(padded), Ordering::Release);
        }
    }

    /// The latest facts that are whole; `None` when there are none.
    pub(super) fn facts(&self) -> Option<Facts> {
        (0..FACTS_SLOTS as usize)
            .filter_map(|slot| facts::decode(&self.copy_page(FACTS_AT + slot * PAGE)).ok())
            .max_by_key(|facts| facts.seq)
    }

    /// Records that the delta no longer has all bytes of the snapshot whose last epoch is `last`:
    /// should the daemon die, it cannot be persisted any more. Done before the bytes change.
    ///
    /// Two snapshots are pending at most and each COMMIT ends one epoch, so the last epochs of
    /// those pending differ in their last bit: a word for each.
    pub(super) fn break_snapshot(&self, last: u64) {
        self.broken_word(last).store(last, Ordering::Release);
    }

    pub(super) fn is_broken(&self, last: u64) -> bool {
        self.broken_word(last).load(Ordering::Acquire) == last
    }

    fn broken_word(&self, last: u64) -> &AtomicU64 {
        self.word_at(BROKEN_AT + (last % BROKEN_WORDS) as usize * WORD)
    }

    /// Makes the map durable, for a clean stop. `fdatasync` covers what was stored to a mapping.
    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.files.sync_data(Which::Map, &self.file)
    }
}

/// `count` ones from bit `first` on.
const fn bit_range(first: usize, count: usize) -> u64 {
    if count == BITS { u64::MAX } else { ((1 << count) - 1) << first }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::HostFiles;
    use blobcr_proto::ChunkSize;
    use proptest::prelude::*;

    fn identity(shape: Shape) -> Identity {
        Identity {
            uid: vec![1; 16],
            generation: 1,
            size_bytes: shape.size_bytes,
            chunk_size: shape.chunk_size.bytes(),
        }
    }

    fn make(chunk_size: ChunkSize, chunks: u64) -> (tempfile::TempDir, Arc<Files>, Map) {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new("d".into(), Arc::new(HostFiles));
        let shape = Shape { size_bytes: chunk_size.bytes() * chunks, chunk_size };
        let map = Map::create(&files, &dir.path().join("map"), shape, &identity(shape)).unwrap();
        (dir, files, map)
    }

    #[test]
    fn what_was_stored_survives_without_a_sync() {
        let (dir, files, map) = make(ChunkSize::MAX, 1 << 21);
        let far = (1 << 21) - 1;
        for chunk in [0, 5, 481, 482, far] {
            map.reserve(chunk).unwrap();
            map.set_mark(chunk, Mark { epoch: 3 + chunk, captured: chunk == 5 });
            assert_eq!(map.add_present(chunk, Sectors { first: 60, end: 200 }), 140);
            assert_eq!(map.add_present(chunk, Sectors { first: 60, end: 201 }), 1);
        }
        map.write_facts(&Facts { seq: 1, epoch: 4, ..Facts::default() });
        map.write_facts(&Facts { seq: 2, epoch: 5, ..Facts::default() });
        let shape = map.shape;
        drop(map);
        let map = Map::open(&files, &dir.path().join("map"), shape, &identity(shape)).unwrap();
        let mut seen = Vec::new();
        map.scan(|chunk, mark| seen.push((chunk, mark.epoch, mark.captured))).unwrap();
        let expected = [0, 5, 481, 482, far].map(|chunk| (chunk, 3 + chunk, chunk == 5));
        assert_eq!(seen, expected);
        assert_eq!(map.run(far, Sectors { first: 0, end: 1024 }), (false, 60));
        assert_eq!(map.run(far, Sectors { first: 60, end: 1024 }), (true, 201));
        assert_eq!(map.run(far, Sectors { first: 201, end: 1024 }), (false, 1024));
        assert_eq!(map.facts().unwrap().epoch, 5);
        // Sparse: 8 TiB of disk take a few extents of map.
        let blocks = std::os::unix::fs::MetadataExt::blocks(&map.file.metadata().unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    }

    #[test]
    fn facts_that_were_torn_leave_those_before() {
        let (_dir, _files, map) = make(ChunkSize::MIN, 4);
        assert_eq!(map.facts(), None);
        for seq in 1..6 {
            map.write_facts(&Facts { seq, epoch: seq, first: seq, ..Facts::default() });
            assert_eq!(map.facts().unwrap().seq, seq);
        }
        map.word_at(FACTS_AT + PAGE + 16).store(99, Ordering::Release);
        assert_eq!(map.facts().unwrap().seq, 4, "slot 1 had number 5");
    }

    #[test]
    fn a_map_of_another_disk_is_refused() {
        let (dir, files, map) = make(ChunkSize::MIN, 4);
        let path = dir.path().join("map");
        let shape = map.shape;
        drop(map);
        let other = Identity { generation: 2, ..identity(shape) };
        assert!(matches!(Map::open(&files, &path, shape, &other), Err(DiskError::Damaged { .. })));
        let larger = Shape { size_bytes: 1 << 40, ..shape };
        assert!(matches!(
            Map::open(&files, &path, larger, &identity(larger)),
            Err(DiskError::Damaged { .. })
        ));
    }

    proptest! {
        #[test]
        fn presence_is_a_set_of_sectors(
            ranges in proptest::collection::vec((0usize..1024, 0usize..300), 1..12),
            from in 0usize..1024,
        ) {
            let (_dir, _files, map) = make(ChunkSize::MAX, 2);
            map.reserve(1).unwrap();
            let mut model = vec![false; 1024];
            for (first, len) in ranges {
                let end = (first + len).min(1024);
                let new = model[first..end].iter().filter(|present| !**present).count();
                prop_assert_eq!(map.add_present(1, Sectors { first, end }) as usize, new);
                model[first..end].fill(true);
            }
            for (sector, present) in model.iter().enumerate() {
                prop_assert_eq!(map.is_present(1, sector), *present);
            }
            let same = model[from..].iter().take_while(|present| **present == model[from]).count();
            prop_assert_eq!(
                map.run(1, Sectors { first: from, end: 1024 }),
                (model[from], from + same)
            );
            prop_assert!(map.presence(0).all(|word| word == 0));
        }
    }
}
