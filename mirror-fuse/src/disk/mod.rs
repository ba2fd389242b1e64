//! The local mirror: a writable disk over a snapshot of the repository. Knows nothing of FUSE.
//!
//! | module | holds |
//! |---|---|
//! | `upstreams` | the traits through which a disk sees the attached snapshot and the repository |
//! | `write`, `zero`, `read`, `seek` | what a guest does |
//! | `flush`, `early` | the promise that a guest's flush makes, and starting on it before it comes |
//! | `epochs`, `gate`, `commit` | CLONE, COMMIT, and why a snapshot is a consistent cut |
//! | `stripes`, `aside`, `parts`, `content`, `spill`, `budget`, `buffers` | selective copy-on-write |
//! | `strategy` | what else a snapshot could be kept by, for comparison |
//! | `persister`, `alarm`, `capture` | making snapshots durable in the background |
//! | `map`, `facts`, `delta`, `journal`, `state_file`, `record`, `frame` | the files |
//! | `create`, `recovery`, `rollback`, `generation` | making; opening after whatever happened; going back |
//! | `io`, `files` | every change to a file, where tests inject faults |
//!
//! # Files of a disk
//!
//! ```text
//! DIR/record         what it is; written last, never changed
//! DIR/state          the durable facts: generation, checkpoint image, reserved numbers
//! DIR/gen-N/delta    the guest's bytes at their natural offsets, sparse
//! DIR/gen-N/map      presence of sectors, marks of chunks, volatile facts: mapped, never synced
//! DIR/gen-N/journal  the durable form of the presence bits, appended to by flush
//! DIR/spill          old versions of chunks when memory for them is full; dies with the process
//! ```
//!
//! # Promises
//!
//! * A write that was acknowledged survives the death of the daemon; after a flush, that of the host.
//! * A COMMIT is one version: the disk as it was at one moment, whatever is written meanwhile.
//! * What is in no stable snapshot is never evicted and never forgotten: a snapshot that fails leaves
//!   its changes to the next.
//! * A snapshot never holds a byte that was not the disk's at its moment. Where the bytes of that
//!   moment are gone, it fails.

mod alarm;
mod aside;
mod base_view;
mod budget;
mod buffers;
mod capture;
mod commit;
mod content;
mod create;
mod delta;
mod early;
mod epochs;
mod error;
mod facts;
mod files;
mod flush;
mod frame;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod gate;
mod generation;
mod io;
mod journal;
mod map;
mod parts;
mod persister;
mod read;
mod record;
mod recovery;
mod rollback;
mod seek;
mod shape;
mod shared;
mod spec;
mod spill;
mod state_file;
mod status;
mod strategy;
mod stripes;
#[cfg(test)]
mod tests;
mod upstreams;
mod write;
mod zero;

use std::path::Path;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blobcr_proto::v1;
use bytes::Bytes;
use tokio::task::JoinHandle;

pub use budget::{Budget, Budgets};
pub(crate) use commit::PersistOnDrop;
pub use create::Plan;
pub use error::{BaseError, DiskError, UpstreamError};
pub use io::{FileIo, HostFiles, Which};
pub use read::{ColdRead, QuickRead};
pub use spec::{DiskDeps, DiskSpec};
pub use strategy::Strategy;
pub use upstreams::{
    Base, BaseOpener, Persisted, SnapshotChunks, SnapshotKey, Source, Upstream, Work,
};

pub(crate) use shared::pin_holder;

use aside::Room;
use generation::Generation;
use shared::{Shared, Start};
use write::{Fetched, Progress};

/// Snapshots of one disk that may be pending at once: one is persisted while the next waits, and a
/// guest that checkpoints faster than that is told by waiting.
const PENDING_MAX: usize = 2;

/// Bytes of an idempotency key at most: it is kept in one sector with other facts.
pub const KEY_BYTES_MAX: usize = 256;

/// How far a request got that must not wait for the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Attempt {
    /// It is done.
    Done,
    /// Its first `done` bytes are done; the rest must go to the asynchronous form.
    NeedsAsync {
        /// Bytes from the request's offset on that need no more work.
        done: u64,
    },
}

/// What a range of zeros is meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// The guest no longer needs the bytes. Whole sectors become zeros, others are left alone.
    Discard,
    /// The guest wants zeros: every byte of the range becomes one.
    WriteZeroes,
}

/// The image that a disk's COMMITs go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointImage {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: u64,
}

/// A COMMIT that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Number of the snapshot.
    pub number: u64,
    /// The image that it belongs to.
    pub image: String,
    /// The image's id.
    pub image_id: u64,
    /// Bytes of the chunks that had changed.
    pub dirty_bytes: u64,
    /// How long the COMMIT held the disk.
    pub downtime: Duration,
}

/// What became of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// It is durable; restart may use it.
    Stable,
    /// It never will be; its changes are part of the next one.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A writable disk. All methods may be called by many threads at once.
///
/// Dropping it is like the death of the daemon: nothing is lost, but [`Self::shutdown`] makes the
/// next start quick.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    persister: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(persister) = self.take_persister() {
            persister.abort();
        }
    }
}

impl Disk {
    /// Makes a disk in the directory `dir`, which is made too. Costs the same for every size.
    ///
    /// # Errors
    /// When there is a disk already, the specification makes no sense, or the host fails.
    pub fn create(dir: &Path, spec: DiskSpec, deps: DiskDeps) -> Result<Arc<Self>, DiskError> {
        let made = Self::create_all(&[Plan { dir: dir.to_owned(), spec, deps }])?;
        Ok(made.into_iter().next().expect("as many as were planned"))
    }

    /// Makes several disks, for less than each of them alone would cost: all of them, or none.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_all(plans: &[Plan]) -> Result<Vec<Arc<Self>>, DiskError> {
        Ok(create::create(plans)?.into_iter().map(Self::start).collect())
    }

    /// Opens the disk in `dir`: after a clean stop, after the daemon was killed, or after the host
    /// went down. Needs no network.
    ///
    /// # Errors
    /// [`DiskError::Absent`] when there is none (or its making was interrupted), and when its files
    /// are damaged or in use.
    pub fn open(dir: &Path, deps: DiskDeps) -> Result<Arc<Self>, DiskError> {
        recovery::open(dir, deps).map(Self::start)
    }

    fn start(start: Start) -> Arc<Self> {
        let shared = Shared::new(start);
        let background = shared.common.deps.background.clone();
        let persister = background.spawn(persister::run(Arc::clone(&shared)));
        Arc::new(Self { shared, persister: Mutex::new(Some(persister)) })
    }

    fn take_persister(&self) -> Option<JoinHandle<()>> {
        self.persister.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &DiskSpec {
        &self.shared.spec
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.shared.disk()
    }

    /// Its bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.spec.size_bytes
    }

    /// Reads, and fetches what is missing.
    ///
    /// # Errors
    /// As [`Self::quick_read`], and when the repository was not reached within the limit.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, DiskError> {
        self.shared.check_range(offset, len as u64)?;
        self.shared.generation.load_full().read_all(offset, len).await
    }

    /// Writes as far as that needs neither the network nor a wait for room.
    ///
    /// # Errors
    /// When the range is beyond the end, the host is full or fails, or the disk is poisoned.
    pub fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt, DiskError> {
        self.shared.check_range(offset, data.len() as u64)?;
        if !self.shared.gate.enter() {
            return Ok(Attempt::NeedsAsync { done: 0 });
        }
        let generation = self.shared.generation.load();
        generation.write(offset, data, None, Room::Memory).map(Attempt::from)
    }

    /// To be called after a write was answered: starts the device on it, if a flush is likely to
    /// come.
    pub(crate) fn write_out_early(&self) {
        self.shared.generation.load().write_out_early();
    }

    /// Writes; waits for the rest of a sector that was never fetched, and for room for copies.
    ///
    /// # Errors
    /// As [`Self::try_write`], and when the repository was not reached within the limit.
    pub async fn write(self: &Arc<Self>, offset: u64, data: Bytes) -> Result<(), DiskError> {
        self.shared.check_range(offset, data.len() as u64)?;
        self.change(move |generation, done, fetched| {
            let rest = &data[done as usize..];
            generation.write(offset + done, rest, fetched, Room::MemoryOrSpill)
        })
        .await
    }

    /// Zeros a range, as far as that needs neither the network nor a wait.
    ///
    /// # Errors
    /// As [`Self::try_write`].
    pub fn try_zero(&self, offset: u64, len: u64, how: Zero) -> Result<Attempt, DiskError> {
        self.shared.check_range(offset, len)?;
        if !self.shared.gate.enter() {
            return Ok(Attempt::NeedsAsync { done: 0 });
        }
        let generation = self.shared.generation.load();
        generation.zero(offset, len, how, None, Room::Memory).map(Attempt::from)
    }

    /// Zeros a range.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn zero(self: &Arc<Self>, offset: u64, len: u64, how: Zero) -> Result<(), DiskError> {
        self.shared.check_range(offset, len)?;
        self.change(move |generation, done, fetched| {
            generation.zero(offset + done, len - done, how, fetched, Room::MemoryOrSpill)
        })
        .await
    }

    /// Calls `step`, which goes on where it stopped, until it is done, and gets it what it needs.
    async fn change(
        &self,
        step: impl Fn(&Generation, u64, Option<&Fetched>) -> Result<Progress, DiskError>
        + Send
        + Sync
        + 'static,
    ) -> Result<(), DiskError> {
        let step = Arc::new(step);
        let mut done = 0;
        let mut fetched: Option<Fetched> = None;
        loop {
            // Before the try, so that no room is given back unnoticed.
            let mut freed = pin!(self.shared.common.budgets().freed().notified());
            freed.as_mut().enable();
            let mut changes = self.shared.changes();
            let (shared, step, have) =
                (Arc::clone(&self.shared), Arc::clone(&step), fetched.take());
            let call = move || {
                if !shared.gate.enter() {
                    return Ok((None, have));
                }
                let generation = shared.generation.load_full();
                let progress = step(&generation, done, have.as_ref())?;
                Ok((Some((generation, progress)), have))
            };
            let (tried, have) = self.shared.common.blocking(call).await?;
            let Some((generation, progress)) = tried else {
                fetched = have;
                self.shared.gate.released().await;
                continue;
            };
            match progress {
                Progress::Done => return Ok(()),
                Progress::Long { done: more } => done += more,
                Progress::NeedsRoom { done: more } => {
                    done += more;
                    self.shared.throttled.fetch_add(1, Ordering::Relaxed);
                    // Room was given back, or a snapshot settled and copies nothing any more.
                    tokio::select! {
                        () = freed => {}
                        _ = changes.changed() => {}
                    }
                }
                Progress::NeedsChunk { done: more, chunk } => {
                    done += more;
                    let bytes = generation.base.fetch(chunk).await;
                    let bytes = bytes.map_err(|error| generation.base_error(error))?;
                    fetched = Some(Fetched { generation: generation.number, chunk, bytes });
                }
            }
        }
    }

    /// Makes every write that was acknowledged before the call survive the host. Blocks; several
    /// callers share one sync.
    ///
    /// # Errors
    /// When the host is full (nothing is lost, try again), or an fsync fails: the disk is then
    /// poisoned.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.shared.generation.load_full().flush()
    }

    /// The first byte at or behind `offset` that may be other than zero; `None` up to the end.
    #[must_use]
    pub fn seek_data(&self, offset: u64) -> Option<u64> {
        // Where the host cannot tell, there may be data.
        let found = self.shared.generation.load().seek(offset, true);
        found.unwrap_or_else(|_| (offset < self.size_bytes()).then_some(offset))
    }

    /// The first byte at or behind `offset` that is known to be in a hole, or the end.
    #[must_use]
    pub fn seek_hole(&self, offset: u64) -> u64 {
        let found = self.shared.generation.load().seek(offset, false);
        found.ok().flatten().unwrap_or_else(|| self.size_bytes())
    }

    /// CLONE (algorithm 1 of the paper): makes the checkpoint image, on the first call.
    ///
    /// # Errors
    /// When the repository does not do it.
    pub async fn ensure_clone(&self) -> Result<CheckpointImage, DiskError> {
        self.shared.ensure_clone().await
    }

    /// The checkpoint image, once there is one.
    #[must_use]
    pub fn checkpoint_image(&self) -> Option<CheckpointImage> {
        self.shared.checkpoint.get().cloned()
    }

    #[cfg(test)]
    fn try_commit(&self) -> Result<Option<Committed>, DiskError> {
        Ok(self.try_commit_held()?.map(|(committed, _)| committed))
    }

    /// CLONE where it is the first, then COMMIT; waits until fewer than two are being persisted.
    ///
    /// # Errors
    /// As [`Self::ensure_clone`], and when the host fails.
    pub async fn commit(&self) -> Result<Committed, DiskError> {
        self.commit_when_possible().await
    }

    /// CLONE where it is the first, then COMMIT of several disks behind one barrier: a write that
    /// was issued after another one was acknowledged is in the snapshots only if that one is, even
    /// on another disk. A repeated call with the same key that is not empty, and the same disks,
    /// returns the first one's answer (until one of them makes another COMMIT with a key).
    ///
    /// # Errors
    /// As [`Self::commit`]; the disks cut before the error keep their snapshots.
    pub async fn commit_all(disks: &[Arc<Self>], key: &str) -> Result<Vec<Committed>, DiskError> {
        Self::commit_behind_barrier(disks, key).await
    }

    /// Waits until the snapshot is stable or has failed.
    ///
    /// # Errors
    /// [`DiskError::NoSnapshot`] for a number never handed out.
    pub async fn wait_stable(&self, number: u64) -> Result<Settled, DiskError> {
        self.shared.wait_stable(number).await
    }

    /// Waits until no snapshot is being persisted.
    ///
    /// # Errors
    /// When the disk is stopped or poisoned meanwhile.
    pub async fn settle(&self) -> Result<(), DiskError> {
        self.shared.settle_all().await
    }

    /// Facts and figures. `path` is empty: it is the mount's to say.
    #[must_use]
    pub fn status(&self) -> v1::Disk {
        self.shared.status()
    }

    /// Throws away what was written since snapshot `number` of the checkpoint image (0: the newest
    /// stable one; the attached one before the first CLONE). Costs the same however much that is.
    /// Waits first for the snapshots that are being persisted: they were promised.
    ///
    /// # Errors
    /// When there is no such stable snapshot, or the repository or the host fails; the disk is then
    /// as before.
    pub async fn rollback(&self, number: u64) -> Result<(), DiskError> {
        self.shared.rollback(number).await
    }

    /// The snapshots that the repository must keep while the disk is attached, by image and number.
    #[must_use]
    pub fn needed_pins(&self) -> Vec<(u64, u64)> {
        self.shared.needed_pins()
    }

    /// Takes a pin of this disk away that an earlier run left, unless it is needed. A rollback
    /// cannot come to need it meanwhile.
    pub(crate) async fn drop_pin_if_unneeded(&self, snapshot: (u64, u64)) {
        self.shared.drop_pin_if_unneeded(snapshot).await;
    }

    /// Stops persisting, flushes, and leaves the directory for a quick start. Snapshots that are
    /// pending go on at the next open, unless something they need was in memory only: call
    /// [`Self::settle`] first (with a limit) to let them finish.
    ///
    /// # Errors
    /// When the flush fails.
    pub async fn shutdown(&self) -> Result<(), DiskError> {
        self.stop().await;
        let shared = Arc::clone(&self.shared);
        let finish = move || {
            let _busy = shared.common.busy();
            let generation = shared.generation.load_full();
            generation.flush()?;
            generation.map.sync()?;
            shared.state.update(|facts| facts.clean = true)
        };
        let done = self.shared.common.blocking(finish).await;
        self.shared.unlock();
        done
    }

    /// Nothing changes the disk any more afterwards.
    async fn stop(&self) {
        self.shared.common.stopped.store(true, Ordering::Release);
        self.shared.changed();
        if let Some(persister) = self.take_persister() {
            persister.abort();
            let _ = persister.await;
        }
        // Who cuts or rolls back just now finishes; others find the disk stopped.
        let _one = self.shared.commit.lock().await;
        // So do those who are in the middle of a write.
        self.shared.generation.load_full().stripes.each(|_| {});
    }

    /// Stops the disk and deletes its directory. Pending snapshots are reported as failed, if the
    /// repository can be reached just now.
    ///
    /// # Errors
    /// When the files cannot be deleted.
    pub async fn remove(self: Arc<Self>) -> Result<(), DiskError> {
        self.stop().await;
        if let Some(image) = self.shared.checkpoint.get() {
            for pending in self.shared.generation.load_full().epochs.pending() {
                let key = self.shared.key(image, pending.number);
                let upstream = &self.shared.common.deps.upstream;
                if let Err(error) = upstream.fail(&key, "its disk was removed").await {
                    tracing::warn!(disk = self.name(), %error, "cannot report a failed snapshot");
                }
            }
        }
        let shared = Arc::clone(&self.shared);
        self.shared.common.blocking(move || recovery::remove(&shared.common)).await
    }

    /// Ends like a process that is killed: nothing is written, nothing is waited for but what the
    /// kernel would finish too.
    #[cfg(test)]
    async fn crash(self: Arc<Self>) {
        let persister = self.take_persister();
        if let Some(persister) = persister {
            persister.abort();
            let _ = persister.await;
        }
        let shared = Arc::downgrade(&self.shared);
        drop(self);
        // Blocking calls that were under way hold on to it for a moment.
        while shared.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

impl From<Progress> for Attempt {
    fn from(progress: Progress) -> Self {
        match progress {
            Progress::Done => Self::Done,
            Progress::NeedsChunk { done, .. }
            | Progress::NeedsRoom { done }
            | Progress::Long { done } => Self::NeedsAsync { done },
        }
    }
}
