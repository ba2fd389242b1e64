//! What the handle of a disk, its persister and its blocking calls have in common.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};

use super::alarm::Alarm;
use super::gate::Gate;
use super::generation::{Common, Generation};
use super::state_file::StateFile;
use super::upstreams::SnapshotKey;
use super::{CheckpointImage, DiskError, DiskSpec, Settled, UpstreamError};

/// Numbers that are reserved durably at a time: one fsync for so many COMMITs. After a host crash
/// at most so many are skipped.
pub(super) const NUMBERS_RESERVED: u64 = 64;

/// Outcomes that are kept in memory for who waits; the repository knows the older ones.
const SETTLED_MAX: usize = 1024;

/// How a mirror's disk is called where it holds a pin.
pub(crate) fn pin_holder(writer: &str, disk: &str) -> String {
    format!("{writer}/{disk}")
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) spec: DiskSpec,
    pub(super) common: Common,
    pub(super) state: StateFile,
    pub(super) generation: ArcSwap<Generation>,
    pub(super) gate: Gate,
    /// Held by who cuts or rolls back: one at a time.
    pub(super) commit: tokio::sync::Mutex<()>,
    /// Held by who makes the checkpoint image. Taken after `commit` by who takes both.
    pub(super) clone: tokio::sync::Mutex<()>,
    pub(super) checkpoint: OnceLock<CheckpointImage>,
    /// As in the state file: numbers below may be handed out.
    pub(super) reserved_until: AtomicU64,
    /// Numbers below were handed out by an earlier process.
    pub(super) first_number: u64,
    /// Tells the persister that there is something to do.
    wake: Notify,
    /// The same, a while later. Made once the disk has a checkpoint image.
    pub(super) alarm: OnceLock<Alarm>,
    settled: Mutex<BTreeMap<u64, Settled>>,
    /// Changes whenever a snapshot settles, and when the disk stops.
    changes: watch::Sender<u64>,
    stalled: Mutex<Option<String>>,
    pub(super) throttled: AtomicU64,
    /// Keeps other processes out.
    lock_file: Mutex<Option<File>>,
}

/// What an open disk starts with.
pub(super) struct Start {
    pub(super) spec: DiskSpec,
    pub(super) common: Common,
    pub(super) state: StateFile,
    pub(super) generation: Generation,
    pub(super) lock_file: File,
}

impl Shared {
    pub(super) fn new(start: Start) -> Arc<Self> {
        let durable = start.state.get();
        let checkpoint = OnceLock::new();
        if let Some(image) = durable.checkpoint {
            let _ = checkpoint.set(image);
        }
        Arc::new(Self {
            spec: start.spec,
            common: start.common,
            state: start.state,
            first_number: start.generation.epochs.facts().next_number,
            generation: ArcSwap::from_pointee(start.generation),
            gate: Gate::default(),
            commit: tokio::sync::Mutex::default(),
            clone: tokio::sync::Mutex::default(),
            checkpoint,
            reserved_until: AtomicU64::new(durable.reserved_until),
            wake: Notify::new(),
            alarm: OnceLock::new(),
            settled: Mutex::default(),
            changes: watch::Sender::new(0),
            stalled: Mutex::default(),
            throttled: AtomicU64::new(0),
            lock_file: Mutex::new(Some(start.lock_file)),
        })
    }

    pub(super) fn disk(&self) -> &str {
        self.spec.name.as_str()
    }

    pub(super) fn upstream_error(&self, source: UpstreamError) -> DiskError {
        DiskError::Upstream { disk: self.disk().to_owned(), source }
    }

    /// How the disk is called where it holds a pin.
    pub(super) fn pin_holder(&self) -> String {
        pin_holder(&self.spec.writer, self.disk())
    }

    /// Refuses what is beyond the end.
    pub(super) fn check_range(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let size = self.spec.size_bytes;
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(DiskError::OutOfRange { disk: self.disk().to_owned(), offset, len, size })
    }

    pub(super) fn checkpoint(&self) -> Result<&CheckpointImage, DiskError> {
        self.checkpoint.get().ok_or_else(|| DiskError::NotCloned(self.disk().to_owned()))
    }

    pub(super) fn key(&self, image: &CheckpointImage, number: u64) -> SnapshotKey {
        SnapshotKey { image_id: image.id, number, writer: self.spec.writer.clone() }
    }

    /// Makes sure, durably, that numbers can be handed out.
    pub(super) fn reserve_numbers(&self) -> Result<(), DiskError> {
        let until = self.generation.load().epochs.facts().next_number + NUMBERS_RESERVED;
        self.state.update(|facts| facts.reserved_until = facts.reserved_until.max(until))?;
        self.reserved_until.fetch_max(until, Ordering::AcqRel);
        Ok(())
    }

    /// Whether few numbers are left before a COMMIT would have to sync.
    pub(super) fn wants_numbers(&self) -> bool {
        let next = self.generation.load().epochs.facts().next_number;
        self.reserved_until.load(Ordering::Acquire) < next + NUMBERS_RESERVED / 2
    }

    /// Has a snapshot that was just cut persisted; whoever asked for it is told first.
    pub(super) fn persist_soon(&self) {
        let after = self.common.deps.persist_after;
        let is_set = |alarm: &Alarm| !after.is_zero() && alarm.set(after).is_ok();
        if !self.alarm.get().is_some_and(is_set) {
            self.persist_now();
        }
    }

    /// Has what is pending persisted: somebody waits for it.
    pub(super) fn persist_now(&self) {
        self.wake.notify_one();
    }

    /// Returns when the persister is to look for something to do.
    pub(super) async fn woken(&self) {
        if self.alarm.get().is_none() && self.checkpoint.get().is_some() {
            match Alarm::new() {
                // Only the persister makes one.
                Ok(alarm) => drop(self.alarm.set(alarm)),
                Err(error) => {
                    tracing::debug!(disk = self.disk(), %error, "COMMITs are persisted at once");
                }
            }
        }
        let rang = async {
            match self.alarm.get() {
                Some(alarm) if alarm.rang().await.is_ok() => {}
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.wake.notified() => {}
            () = rang => {}
        }
    }

    fn settled(&self) -> MutexGuard<'_, BTreeMap<u64, Settled>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn outcome(&self, number: u64) -> Option<Settled> {
        self.settled().get(&number).cloned()
    }

    /// Records what became of a snapshot. [`Self::changed`] is to be called once it is no longer
    /// pending.
    pub(super) fn settle(&self, number: u64, outcome: Settled) {
        let mut settled = self.settled();
        settled.insert(number, outcome);
        if settled.len() > SETTLED_MAX {
            settled.pop_first();
        }
    }

    /// Tells everybody who waits to look again.
    pub(super) fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(super) fn set_stalled(&self, why: Option<String>) {
        *self.stalled.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub(super) fn stalled(&self) -> Option<String> {
        self.stalled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets other processes have the disk.
    pub(super) fn unlock(&self) {
        self.lock_file.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
