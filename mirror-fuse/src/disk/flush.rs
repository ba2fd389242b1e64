//! Flush: what was acknowledged survives the host.
//!
//! 1. Take the list of chunks whose presence changed, and read their presence bits.
//! 2. fdatasync the delta. Every bit that was read in step 1 was set after its sector's bytes were
//!    written, so those bytes are durable now.
//! 3. Append the bits to the journal and fdatasync that; not needed when no bit changed.
//!
//! A write that was acknowledged before the flush began is either on the list of step 1, or found
//! its sectors present under the chunk's lock, and then the write that made them so had put the
//! chunk on the list before that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::DiskError;
use super::early::Early;
use super::generation::Generation;
use super::journal::{Entry, Journal};

/// Lets callers of flush share syncs: who comes while a round is under way waits for it and takes
/// part in the next, which begins after its call.
#[derive(Debug)]
pub(super) struct Flusher {
    rounds: Mutex<Rounds>,
    ended: Condvar,
    /// Something was written since the last round began.
    touched: AtomicBool,
    /// The journal may lack chunks that are in no list of changes: the next round writes it anew.
    incomplete: AtomicBool,
    journal: Mutex<Journal>,
    /// The generation was rolled back: its files are about to go.
    retired: AtomicBool,
    early: Early,
    made: Instant,
}

#[derive(Debug, Default)]
struct Rounds {
    begun: u64,
    running: bool,
    /// The newest round that succeeded.
    done: u64,
    /// The newest round that failed, and how.
    failed: u64,
    error: Option<Failure>,
}

/// What can be told to each of those who took part in a round.
#[derive(Debug, Clone)]
enum Failure {
    NoSpace(&'static str),
    Other(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flusher {
    pub(super) fn new(journal: Journal) -> Self {
        Self {
            rounds: Mutex::default(),
            ended: Condvar::new(),
            touched: AtomicBool::new(false),
            incomplete: AtomicBool::new(false),
            journal: Mutex::new(journal),
            retired: AtomicBool::new(false),
            early: Early::default(),
            made: Instant::now(),
        }
    }

    fn now(&self) -> u64 {
        self.made.elapsed().as_nanos() as u64
    }

    /// Something was written. Told after the write and before it is acknowledged.
    pub(super) fn touched(&self) {
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Release);
            self.early.written(self.now());
        }
    }

    /// The daemon died before its last flush: which chunks that one lacks is not known.
    pub(super) fn set_incomplete(&self) {
        self.incomplete.store(true, Ordering::Release);
        self.touched.store(true, Ordering::Release);
    }
}

impl Generation {
    /// Blocks until everything acknowledged before the call is durable.
    pub(super) fn flush(&self) -> Result<(), DiskError> {
        let flusher = &self.flusher;
        let mut rounds = lock(&flusher.rounds);
        // A round that is running may have begun before the caller's last write.
        let wanted = rounds.begun + 1;
        loop {
            if rounds.done >= wanted {
                return Ok(());
            }
            if rounds.failed >= wanted {
                return Err(self.failure(rounds.error.as_ref()));
            }
            if rounds.running {
                rounds = flusher.ended.wait(rounds).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            rounds.running = true;
            rounds.begun += 1;
            let round = rounds.begun;
            drop(rounds);
            let result = self.flush_round();
            rounds = lock(&flusher.rounds);
            rounds.running = false;
            match &result {
                Ok(()) => rounds.done = round,
                Err(error) => {
                    rounds.failed = round;
                    rounds.error = Some(Failure::of(error));
                }
            }
            flusher.ended.notify_all();
        }
    }

    /// Starts the device on what was written, if a flush is likely to come at once. To be called after
    /// a write was answered: nobody waits for it, and nothing depends on it.
    pub(super) fn write_out_early(&self) {
        if self.flusher.early.take() {
            self.delta.start_write_out();
        }
    }

    fn failure(&self, failure: Option<&Failure>) -> DiskError {
        // A failed fsync is what everybody is told from then on.
        if let Err(poisoned) = self.files().check() {
            return poisoned;
        }
        let disk = self.disk().to_owned();
        match failure {
            Some(Failure::NoSpace(file)) => DiskError::NoSpace { disk, file },
            Some(Failure::Other(text)) => DiskError::Io {
                disk,
                action: "flush to",
                file: "files",
                source: std::io::Error::other(text.clone()),
            },
            None => DiskError::Stopped(disk),
        }
    }

    fn flush_round(&self) -> Result<(), DiskError> {
        self.files().check()?;
        if !self.flusher.touched.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.flusher.early.flushed(self.flusher.now());
        let changed = self.stripes.take_changed();
        let done = self.make_durable(&changed);
        if done.is_err() {
            // Nothing is forgotten: the next round tries the same again.
            self.stripes.put_back_changed(&changed);
            self.flusher.touched.store(true, Ordering::Release);
        }
        done
    }

    fn make_durable(&self, changed: &[u64]) -> Result<(), DiskError> {
        let mut journal = lock(&self.flusher.journal);
        if self.flusher.retired.load(Ordering::Acquire) {
            // What was written here was thrown away, by whoever asked for the rollback.
            return Ok(());
        }
        let incomplete = self.flusher.incomplete.load(Ordering::Acquire);
        if incomplete || journal.wants_rewrite() {
            let mut all = Vec::new();
            self.map.scan(|chunk, _| all.push(chunk))?;
            let entries = self.entries(&all);
            self.delta.sync()?;
            match journal.rewrite(entries.into_iter()) {
                // There is no room for a second journal: the first one will do a while longer.
                Err(DiskError::NoSpace { .. }) if !incomplete => {}
                Err(error) => return Err(error),
                Ok(()) => {
                    self.flusher.incomplete.store(false, Ordering::Release);
                    return Ok(());
                }
            }
        }
        let entries = self.entries(changed);
        self.delta.sync()?;
        journal.append(entries.into_iter())
    }

    /// The generation's files are about to be deleted: waits for a flush that uses them, and keeps
    /// others from it.
    pub(super) fn retire(&self) {
        self.flusher.retired.store(true, Ordering::Release);
        drop(lock(&self.flusher.journal));
    }

    /// The presence bits as they are now: to be read before the delta is synced.
    fn entries(&self, chunks: &[u64]) -> Vec<Entry> {
        let entry =
            |chunk: &u64| Entry { chunk: *chunk, presence: self.map.presence(*chunk).collect() };
        chunks.iter().map(entry).filter(|entry| entry.presence.iter().any(|w| *w != 0)).collect()
    }
}

impl Failure {
    fn of(error: &DiskError) -> Self {
        match error {
            DiskError::NoSpace { file, .. } => Self::NoSpace(file),
            other => Self::Other(other.to_string()),
        }
    }
}
