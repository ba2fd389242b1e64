//! The segments that a store has, and how much of each is in use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::disk::DiskFile;

/// A segment's open file and what is known of it. Cheap to hold: a reader that holds it reads on
/// after the segment was compacted away.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) number: u32,
    pub(crate) file: Arc<dyn DiskFile>,
    /// Bytes of the file that are records (and the header).
    len: AtomicU64,
    /// Of these, bytes of records that the index points to.
    live_bytes: AtomicU64,
    /// How many these are.
    live_records: AtomicU64,
    /// Bytes between records that could not be read as records.
    pub(crate) unreadable: u64,
}

impl Segment {
    pub(crate) fn new(number: u32, file: Arc<dyn DiskFile>, len: u64, unreadable: u64) -> Self {
        let zero = || AtomicU64::new(0);
        let (live_bytes, live_records) = (zero(), zero());
        Self { number, file, len: AtomicU64::new(len), live_bytes, live_records, unreadable }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    pub(crate) fn set_len(&self, len: u64) {
        self.len.store(len, Ordering::Relaxed);
    }

    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn live_records(&self) -> u64 {
        self.live_records.load(Ordering::Relaxed)
    }

    pub(crate) fn add_live(&self, bytes: u64) {
        self.live_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.live_records.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn remove_live(&self, bytes: u64) {
        self.live_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.live_records.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All segments, by number.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    all: RwLock<BTreeMap<u32, Arc<Segment>>>,
    /// Segments that may hold copies of records whose newest copy is in a later segment, without a
    /// tombstone for the older copy: a compaction was interrupted, or is under way. While one is
    /// there, tombstones of later places are kept.
    leftovers: Mutex<BTreeSet<u32>>,
}

impl Segments {
    pub(crate) fn get(&self, number: u32) -> Option<Arc<Segment>> {
        self.all.read().expect("no holder of this lock panics").get(&number).cloned()
    }

    pub(crate) fn insert(&self, segment: Arc<Segment>) {
        let mut all = self.all.write().expect("no holder of this lock panics");
        all.insert(segment.number, segment);
    }

    pub(crate) fn remove(&self, number: u32) {
        self.all.write().expect("no holder of this lock panics").remove(&number);
        self.leftovers.lock().expect("no holder of this lock panics").remove(&number);
    }

    /// All of them, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<Segment>> {
        self.all.read().expect("no holder of this lock panics").values().cloned().collect()
    }

    pub(crate) fn mark_leftover(&self, number: u32) {
        self.leftovers.lock().expect("no holder of this lock panics").insert(number);
    }

    /// Whether a copy that a tombstone for `target` hides may still be on the disk, once segment
    /// `without` is gone.
    pub(crate) fn hides_something(&self, target: u32, without: u32) -> bool {
        let leftovers = self.leftovers.lock().expect("no holder of this lock panics");
        if leftovers.range(..=target).any(|leftover| *leftover != without) {
            return true;
        }
        drop(leftovers);
        target != without && self.get(target).is_some()
    }
}
