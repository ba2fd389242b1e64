//! Fetching ahead of a guest what an earlier one read that started from the same snapshot.
//!
//! | module | holds |
//! |---|---|
//! | `recorder` | in which order the chunks of a snapshot were read first |
//! | `chunk_set` | a set of chunks that any thread adds to and looks into |
//! | `replay` | fetching what a trace names |
//! | `keeper` | getting the trace from the repository, and keeping the own one there |
//! | this one | what the disks of a host that lie on one snapshot have in common |
//!
//! Nothing happens before a disk waits for its first chunk: a disk that is not read costs nothing. Then
//! the snapshot's trace is asked for and replayed, and a trace of what is read from now on is kept with
//! the snapshot from time to time. A trace is a hint: without one, or with one that is wrong, reads are
//! as right as ever.

mod chunk_set;
mod keeper;
mod recorder;
mod replay;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use blobcr_repository::{Bandwidth, Repository};
use tokio::sync::watch;

use crate::base::SnapshotBase;
use crate::disk::Base;
use chunk_set::ChunkSet;
use keeper::Keeper;
use recorder::Recorder;

/// What is fetched before a guest asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing, and no trace is kept.
    Off,
    /// What disks of the same snapshot, or of one before it, were seen to read first.
    #[default]
    Trace,
}

/// A snapshot by image and number.
type Snapshot = (u64, u64);

/// Fetches ahead for all disks of a host.
#[derive(Debug)]
pub struct Prefetcher {
    repository: Repository,
    /// What all of it together may take of the network.
    rate: Option<Bandwidth>,
    open: Mutex<HashMap<Snapshot, Weak<ReadAhead>>>,
}

impl Prefetcher {
    /// Traces are kept in `repository`, and at most so many bytes a second are fetched.
    #[must_use]
    pub fn new(repository: Repository, bytes_per_second: Option<NonZeroU64>) -> Arc<Self> {
        let rate = bytes_per_second.map(Bandwidth::new);
        Arc::new(Self { repository, rate, open: Mutex::default() })
    }

    /// For a disk that lies on `snapshot`, whose bytes are `base`.
    pub(crate) fn of(
        self: &Arc<Self>,
        snapshot: Snapshot,
        base: &Arc<SnapshotBase>,
    ) -> Arc<ReadAhead> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ahead) = open.get(&snapshot).and_then(Weak::upgrade) {
            return ahead;
        }
        let ahead = Arc::new(ReadAhead {
            prefetcher: Arc::clone(self),
            snapshot,
            base: Arc::clone(base),
            seen: OnceLock::new(),
            in_use: watch::Sender::new(()),
        });
        open.retain(|_, ahead| ahead.strong_count() > 0);
        open.insert(snapshot, Arc::downgrade(&ahead));
        ahead
    }
}

/// What was read from a snapshot and fetched of it, since its first read that waited.
#[derive(Debug)]
struct Seen {
    recorder: Recorder,
    fetched: ChunkSet,
}

/// What the disks of a host that lie on one snapshot read, and are likely to read. Fetching ahead ends
/// when it is dropped, with the last of them.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    prefetcher: Arc<Prefetcher>,
    snapshot: Snapshot,
    base: Arc<SnapshotBase>,
    seen: OnceLock<Arc<Seen>>,
    /// Never sent to; closed when the last disk is gone.
    in_use: watch::Sender<()>,
}

impl ReadAhead {
    /// A guest is about to wait for a chunk of the snapshot. To be called on the mirror's runtime.
    pub(crate) fn awaited(&self, chunk: u64) {
        let mut keeper = None;
        let seen = self.seen.get_or_init(|| {
            let chunks = self.base.chunk_size().chunks_in(self.base.size_bytes());
            let (recorder, fetched) = (Recorder::new(chunks), ChunkSet::new(chunks));
            let seen = Arc::new(Seen { recorder, fetched });
            keeper = Some(Keeper::new(self, Arc::clone(&seen)));
            seen
        });
        self.record(seen, chunk);
        // Only now, so that this chunk is not fetched ahead too.
        if let Some(keeper) = keeper {
            tokio::spawn(keeper.run());
        }
    }

    /// A guest asked for bytes of a chunk. Takes no lock.
    pub(crate) fn was_read(&self, chunk: u64) {
        if let Some(seen) = self.seen.get() {
            self.record(seen, chunk);
        }
    }

    fn record(&self, seen: &Seen, chunk: u64) {
        seen.recorder.was_read(chunk, || self.base.may_have_data(chunk) == Some(true));
    }

    /// Bytes that were fetched ahead, and those of them that were read since.
    pub(crate) fn fetched_and_used(&self) -> (u64, u64) {
        let Some(seen) = self.seen.get() else { return (0, 0) };
        let used = seen.fetched.count_in(seen.recorder.read());
        let chunk_bytes = self.base.chunk_size().bytes();
        (seen.fetched.count() * chunk_bytes, used * chunk_bytes)
    }
}
