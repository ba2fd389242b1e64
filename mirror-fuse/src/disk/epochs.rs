//! Epochs: which changes belong to which snapshot.
//!
//! The current epoch `e` is part of every chunk's mark when the chunk is first changed in it; the
//! chunk also goes to the dirty list then. COMMIT ends the epoch: it takes the list away by
//! swapping a pointer, and `e` becomes `e + 1`. A snapshot holds the changes of the epochs
//! `first..=last`, which is one epoch unless a snapshot before it failed and left it its own.
//!
//! # Why a snapshot is a consistent cut of one disk
//!
//! A write to a chunk decides, under the chunk's lock, to which epoch it belongs: either it finds
//! that the chunk is on the dirty list already ([`Epochs::is_dirty`], one atomic load), or it puts
//! it there ([`Epochs::make_dirty`], under the same mutex as the cut). Call that the write's
//! *check*, and say it is before the cut if it saw the epochs as they were before.
//!
//! * A write whose check is before the cut is in the snapshot as a whole (as far as that chunk is
//!   concerned), even when its bytes reach the delta after the cut: it holds the chunk's lock until
//!   they have, and the persister takes that lock before it reads the chunk, as does a later write
//!   that would copy the chunk aside.
//! * A write whose check is after the cut is not in it: the chunk's mark is then older than the
//!   current epoch, so the bytes that it is about to change are copied aside if the snapshot still
//!   needs them.
//! * If a write is in the snapshot, so is every write acknowledged before it was issued: the check
//!   of that one came first, and the epochs only grow, so it was before the cut too.
//!
//! A write that spans chunks may be cut between them, as a power failure may cut it on any disk; it
//! was not acknowledged at that time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blobcr_proto::v1::TreeRoot;

use super::PENDING_MAX;
use super::facts::{Answer, Facts, Pending};
use super::map::{Map, Mark};

/// Chunks in one segment of a list: 64 KiB. A list grows by whole segments, so no push copies what
/// is in it already, however long it is.
const SEGMENT: usize = 8192;

/// A list of chunks, some perhaps more than once.
#[derive(Debug, Default)]
pub(super) struct List {
    segments: Vec<Vec<u64>>,
    len: u64,
}

/// The lists that make up what a snapshot holds: more than one when a snapshot before it failed.
type Lists = Vec<Arc<List>>;

impl List {
    pub(super) fn push(&mut self, chunk: u64) {
        match self.segments.last_mut() {
            Some(segment) if segment.len() < segment.capacity() => segment.push(chunk),
            _ => {
                let mut segment = Vec::with_capacity(SEGMENT);
                segment.push(chunk);
                self.segments.push(segment);
            }
        }
        self.len += 1;
    }
}

/// The chunks of several lists: sorted, each once.
fn sorted(lists: &[Arc<List>]) -> Vec<u64> {
    let segments = lists.iter().flat_map(|list| &list.segments);
    let mut chunks: Vec<u64> = segments.flatten().copied().collect();
    chunks.sort_unstable();
    chunks.dedup();
    chunks
}

fn listed(lists: &[Arc<List>]) -> u64 {
    lists.iter().map(|list| list.len).sum()
}

/// The epochs of one generation of a disk.
#[derive(Debug)]
pub(super) struct Epochs {
    /// [`Facts::first`], for writers that need nothing else.
    first: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    facts: Facts,
    dirty: List,
    /// Lists of snapshots that failed: dirty too.
    returned: Lists,
    /// The chunks of each pending snapshot.
    pending: Vec<Lists>,
}

/// To what a chunk's content belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Belongs {
    /// To the next snapshot: it is on the dirty list.
    Dirty,
    /// To a pending snapshot that has not read it yet: the paper's `Scheduled`.
    Scheduled,
    /// To a pending snapshot that has it elsewhere already.
    Captured,
    /// To nothing that needs it.
    Free,
}

/// What a COMMIT made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) number: u64,
    /// Entries on the dirty list: some chunks may be on it more than once.
    pub(super) listed: u64,
}

/// Why there was no cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoCut {
    /// Two snapshots are pending.
    Busy,
    /// Numbers must be reserved first.
    NoNumber,
}

impl Epochs {
    /// `lists` are the chunks of the pending snapshots of `facts`, `dirty` those of none.
    pub(super) fn new(facts: Facts, dirty: List, lists: Vec<List>) -> Self {
        assert_eq!(facts.pending.len(), lists.len(), "a list for each pending snapshot");
        let first = AtomicU64::new(facts.first);
        let pending = lists.into_iter().map(|list| vec![Arc::new(list)]).collect();
        Self { first, state: Mutex::new(State { facts, dirty, returned: Vec::new(), pending }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a chunk with this mark is on the dirty list. The answer decides to which snapshot a
    /// write belongs (see above); the chunk's lock must be held from here to the write's end.
    pub(super) fn is_dirty(&self, mark: Mark) -> bool {
        mark.epoch >= self.first.load(Ordering::Acquire)
    }

    pub(super) fn belongs(&self, mark: Mark) -> Belongs {
        let state = self.lock();
        if mark.epoch >= state.facts.first {
            Belongs::Dirty
        } else if state.facts.pending.iter().all(|s| !s.covers(mark.epoch)) {
            Belongs::Free
        } else if mark.captured {
            Belongs::Captured
        } else {
            Belongs::Scheduled
        }
    }

    /// Puts a chunk on the dirty list and marks it; its lock must be held and its record reserved.
    /// Returns the current epoch, and the snapshots that are pending.
    pub(super) fn make_dirty(&self, map: &Map, chunk: u64, mark: Mark) -> (u64, Vec<Pending>) {
        let mut state = self.lock();
        // Whatever was cut since the chunk was last changed holds its present content, as far as
        // it holds the chunk: from now on that content is not in the delta.
        let holds = state.facts.pending.iter().position(|s| s.covers(mark.epoch));
        for pending in state.facts.pending.iter().skip(holds.unwrap_or(PENDING_MAX)) {
            map.break_snapshot(pending.last);
        }
        let epoch = state.facts.epoch;
        map.set_mark(chunk, Mark { epoch, captured: false });
        state.dirty.push(chunk);
        (epoch, state.facts.pending.clone())
    }

    /// COMMIT. Writes the facts before they hold, so that a daemon killed in between finds a
    /// snapshot that nobody was told of, which is harmless.
    pub(super) fn cut(
        &self,
        map: &Map,
        reserved_until: u64,
        answer: impl FnOnce(Cut) -> Option<Answer>,
    ) -> Result<Cut, NoCut> {
        let mut state = self.lock();
        if state.facts.pending.len() >= PENDING_MAX {
            return Err(NoCut::Busy);
        }
        let number = state.facts.next_number;
        if number >= reserved_until {
            return Err(NoCut::NoNumber);
        }
        let cut = Cut { number, listed: state.dirty.len + listed(&state.returned) };
        let (first, last) = (state.facts.first, state.facts.epoch);
        state.facts.pending.push(Pending { number, first, last });
        state.facts.epoch = last + 1;
        state.facts.first = last + 1;
        state.facts.next_number = number + 1;
        if let Some(answer) = answer(cut) {
            state.facts.answer = Some(answer);
        }
        state.write(map);
        let dirty = Arc::new(std::mem::take(&mut state.dirty));
        let mut lists = std::mem::take(&mut state.returned);
        lists.push(dirty);
        state.pending.push(lists);
        self.first.store(last + 1, Ordering::Release);
        Ok(cut)
    }

    /// The checkpoint image was made: this is the number of its next snapshot.
    pub(super) fn set_next_number(&self, map: &Map, number: u64) {
        let mut state = self.lock();
        state.facts.next_number = number;
        state.write(map);
    }

    /// The oldest pending snapshot.
    pub(super) fn oldest(&self) -> Option<Pending> {
        self.lock().facts.pending.first().cloned()
    }

    pub(super) fn pending(&self) -> Vec<Pending> {
        self.lock().facts.pending.clone()
    }

    pub(super) fn facts(&self) -> Facts {
        self.lock().facts.clone()
    }

    /// Entries on the dirty list.
    pub(super) fn listed(&self) -> u64 {
        let state = self.lock();
        state.dirty.len + listed(&state.returned)
    }

    /// The chunks of a pending snapshot: sorted, each once.
    pub(super) fn chunks(&self, number: u64) -> Vec<u64> {
        let state = self.lock();
        let index = state.facts.pending.iter().position(|snapshot| snapshot.number == number);
        // Only pointers are copied under the mutex.
        let lists = index.map(|index| state.pending[index].clone());
        drop(state);
        sorted(&lists.unwrap_or_default())
    }

    /// The oldest pending snapshot is stable.
    pub(super) fn stable(&self, map: &Map, root: TreeRoot) {
        let mut state = self.lock();
        let done = state.facts.pending.remove(0);
        state.facts.last_stable = done.number;
        state.facts.stable_root = Some(root);
        state.write(map);
        let lists = state.pending.remove(0);
        drop(state);
        // What may be a long list is freed without the mutex.
        drop(lists);
    }

    /// The oldest pending snapshot failed: its changes become part of the next one, whether that is
    /// pending already or not yet made.
    pub(super) fn failed(&self, map: &Map) {
        let mut state = self.lock();
        let failed = state.facts.pending.remove(0);
        let lists = state.pending.remove(0);
        if let Some(next) = state.facts.pending.first_mut() {
            next.first = failed.first;
            state.pending[0].extend(lists);
        } else {
            state.facts.first = failed.first;
            state.returned.extend(lists);
        }
        state.write(map);
        self.first.store(state.facts.first, Ordering::Release);
    }
}

impl State {
    fn write(&mut self, map: &Map) {
        self.facts.seq += 1;
        map.write_facts(&self.facts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_everything_once_sorted() {
        let mut list = List::default();
        let mut other = List::default();
        for chunk in 0..20_000 {
            list.push(chunk * 7 % 20_000);
            other.push(19_000 + chunk % 3000);
        }
        let lists = [Arc::new(list), Arc::new(other), Arc::default()];
        assert_eq!(listed(&lists), 40_000);
        assert_eq!(sorted(&lists), (0..22_000).collect::<Vec<_>>());
    }
}
