//! The locks of chunks, and what is only touched under them.
//!
//! Many chunks share a lock; who changes a chunk's bytes or mark holds its lock from the first
//! look to the last store. The persister takes it before and after it reads a chunk, and counts only
//! what nobody changed in between (see [`super::capture`]): the paper's state `Pending`.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::aside::Aside;

/// Enough that writers of different chunks rarely meet; neighbouring chunks never share one.
const STRIPES: usize = 256;
/// Lists of changed chunks. Each is locked for a push at a time.
const LISTS: usize = 16;

/// What is guarded by the locks of some chunks.
#[derive(Debug, Default)]
pub(super) struct Stripe {
    /// Old versions of chunks, oldest first.
    pub(super) asides: HashMap<u64, Vec<Aside>>,
}

/// The locks of all chunks of a disk.
#[derive(Debug)]
pub(super) struct Stripes {
    stripes: Box<[Mutex<Stripe>]>,
    /// Chunks whose presence changed since the last flush.
    changed: Box<[Mutex<Vec<u64>>]>,
}

impl Default for Stripes {
    fn default() -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            changed: (0..LISTS).map(|_| Mutex::default()).collect(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stripes {
    /// Locks a chunk (and others with it).
    pub(super) fn lock(&self, chunk: u64) -> MutexGuard<'_, Stripe> {
        lock(&self.stripes[chunk as usize % STRIPES])
    }

    /// Locks each stripe once, one after the other.
    pub(super) fn each(&self, mut visit: impl FnMut(&mut Stripe)) {
        for stripe in &self.stripes {
            visit(&mut lock(stripe));
        }
    }

    /// Records that a chunk's presence changed; its lock must be held, so that nobody can rely on
    /// the new presence before it is recorded here.
    pub(super) fn changed(&self, chunk: u64) {
        let mut list = lock(&self.changed[chunk as usize % LISTS]);
        if list.last() != Some(&chunk) {
            list.push(chunk);
        }
    }

    /// Takes the list of changed chunks: sorted, each once.
    pub(super) fn take_changed(&self) -> Vec<u64> {
        let mut all = Vec::new();
        for list in &self.changed {
            all.append(&mut lock(list));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Puts back what was taken, after it could not be made durable.
    pub(super) fn put_back_changed(&self, chunks: &[u64]) {
        for chunk in chunks {
            lock(&self.changed[*chunk as usize % LISTS]).push(*chunk);
        }
    }
}
