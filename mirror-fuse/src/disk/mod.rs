//! The local mirror: a writable disk over a snapshot of the repository. Knows nothing of FUSE.

mod budget;
mod error;
mod io;
mod spec;
mod upstreams;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use bytes::Bytes;

pub use budget::{Budget, Budgets};
pub use error::{BaseError, DiskError, UpstreamError};
pub use io::{FileIo, HostFiles, Which};
pub use spec::{DiskDeps, DiskSpec};
pub use upstreams::{
    Base, BaseOpener, Persisted, SnapshotChunks, SnapshotKey, Source, Upstream, Work,
};

/// Bytes of an idempotency key at most: it is kept in one sector with other facts.
pub const KEY_BYTES_MAX: usize = 256;

/// How far a request got that must not wait for the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Attempt {
    /// It is done.
    Done,
    /// Its first `done` bytes are done (0 for a read); the rest must go to the asynchronous form.
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
#[derive(Debug)]
pub struct Disk {
    spec: DiskSpec,
}

impl Disk {
    /// Makes a disk in the directory `dir`, which is made too. Costs the same for every size.
    ///
    /// # Errors
    /// When there is a disk already, the specification makes no sense, or the host fails.
    pub fn create(dir: &Path, spec: DiskSpec, _deps: DiskDeps) -> Result<Arc<Self>, DiskError> {
        if dir.join("record").exists() {
            return Err(DiskError::Exists(dir.display().to_string()));
        }
        Ok(Arc::new(Self { spec }))
    }

    /// Opens the disk in `dir`: after a clean stop, after the daemon was killed, or after the host
    /// went down. Needs no network.
    ///
    /// # Errors
    /// [`DiskError::Absent`] when there is none (or its making was interrupted), and when its files
    /// are damaged or in use.
    pub fn open(dir: &Path, _deps: DiskDeps) -> Result<Arc<Self>, DiskError> {
        Err(DiskError::Absent(dir.display().to_string()))
    }

    fn stopped<T>(&self) -> Result<T, DiskError> {
        Err(DiskError::Stopped(self.name().to_owned()))
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.spec.name.as_str()
    }

    /// Its bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.spec.size_bytes
    }

    /// Reads what is on this host; no allocation, no lock, no network.
    ///
    /// # Errors
    /// When the range is beyond the end, or the host fails.
    pub fn try_read(&self, _offset: u64, _out: &mut [u8]) -> Result<Attempt, DiskError> {
        self.stopped()
    }

    /// Reads, and fetches what is missing.
    ///
    /// # Errors
    /// As [`Self::try_read`], and when the repository was not reached within the limit.
    pub async fn read(&self, _offset: u64, _len: usize) -> Result<Bytes, DiskError> {
        self.stopped()
    }

    /// Writes as far as that needs neither the network nor a wait for room.
    ///
    /// # Errors
    /// When the range is beyond the end, the host is full or fails, or the disk is poisoned.
    pub fn try_write(&self, _offset: u64, _data: &[u8]) -> Result<Attempt, DiskError> {
        self.stopped()
    }

    /// Writes; waits for the rest of a sector that was never fetched, and for room for copies.
    ///
    /// # Errors
    /// As [`Self::try_write`], and when the repository was not reached within the limit.
    pub async fn write(self: &Arc<Self>, _offset: u64, _data: Bytes) -> Result<(), DiskError> {
        self.stopped()
    }

    /// Zeros a range, as far as that needs neither the network nor a wait.
    ///
    /// # Errors
    /// As [`Self::try_write`].
    pub fn try_zero(&self, _offset: u64, _len: u64, _how: Zero) -> Result<Attempt, DiskError> {
        self.stopped()
    }

    /// Zeros a range.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn zero(
        self: &Arc<Self>,
        _offset: u64,
        _len: u64,
        _how: Zero,
    ) -> Result<(), DiskError> {
        self.stopped()
    }

    /// Makes every write that was acknowledged before the call survive the host. Blocks; several
    /// callers share one sync.
    ///
    /// # Errors
    /// When the host is full (nothing is lost, try again), or an fsync fails: the disk is then
    /// poisoned.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.stopped()
    }

    /// The first byte at or behind `offset` that may be other than zero; `None` up to the end.
    #[must_use]
    pub fn seek_data(&self, offset: u64) -> Option<u64> {
        (offset < self.size_bytes()).then_some(offset)
    }

    /// The first byte at or behind `offset` that is known to be in a hole, or the end.
    #[must_use]
    pub fn seek_hole(&self, _offset: u64) -> u64 {
        self.size_bytes()
    }

    /// CLONE (algorithm 1 of the paper): makes the checkpoint image, on the first call.
    ///
    /// # Errors
    /// When the repository does not do it.
    pub async fn ensure_clone(&self) -> Result<CheckpointImage, DiskError> {
        self.stopped()
    }

    /// The checkpoint image, once there is one.
    #[must_use]
    pub fn checkpoint_image(&self) -> Option<CheckpointImage> {
        None
    }

    /// COMMIT (algorithm 2): what the disk holds now becomes a snapshot. Costs the same however
    /// much has changed. `None`: two are being persisted already.
    ///
    /// # Errors
    /// [`DiskError::NotCloned`], and when the host fails.
    pub fn try_commit(&self) -> Result<Option<Committed>, DiskError> {
        self.stopped()
    }

    /// CLONE where it is the first, then COMMIT; waits until fewer than two are being persisted.
    ///
    /// # Errors
    /// As [`Self::ensure_clone`] and [`Self::try_commit`].
    pub async fn commit(&self) -> Result<Committed, DiskError> {
        self.stopped()
    }

    /// CLONE where it is the first, then COMMIT of several disks behind one barrier: a write that
    /// was issued after another one was acknowledged is in the snapshots only if that one is, even
    /// on another disk. A repeated call with the same key that is not empty, and the same disks,
    /// returns the first one's answer.
    ///
    /// # Errors
    /// As [`Self::commit`]; the disks cut before the error keep their snapshots.
    pub async fn commit_all(disks: &[Arc<Self>], _key: &str) -> Result<Vec<Committed>, DiskError> {
        disks.first().map_or(Ok(Vec::new()), |disk| disk.stopped())
    }

    /// Waits until the snapshot is stable or has failed.
    ///
    /// # Errors
    /// [`DiskError::NoSnapshot`] for a number never handed out.
    pub async fn wait_stable(&self, _number: u64) -> Result<Settled, DiskError> {
        self.stopped()
    }

    /// Waits until no snapshot is being persisted.
    pub async fn settle(&self) {}

    /// Facts and figures. `path` is empty: it is the mount's to say.
    #[must_use]
    pub fn status(&self) -> v1::Disk {
        v1::Disk { name: self.name().to_owned(), ..v1::Disk::default() }
    }

    /// Throws away what was written since snapshot `number` of the checkpoint image (0: the newest
    /// stable one; the attached one before the first CLONE). Costs the same however much that is.
    /// Waits first for the snapshots that are being persisted: they were promised.
    ///
    /// # Errors
    /// When there is no such stable snapshot, or the repository or the host fails; the disk is then
    /// as before.
    pub async fn rollback(&self, _number: u64) -> Result<(), DiskError> {
        self.stopped()
    }

    /// Stops persisting, flushes, and leaves the directory for a quick start. Snapshots that are
    /// pending go on at the next open, unless something they need was in memory only: call
    /// [`Self::settle`] first (with a limit) to let them finish.
    ///
    /// # Errors
    /// When the flush fails.
    pub async fn shutdown(&self) -> Result<(), DiskError> {
        self.stopped()
    }

    /// Stops the disk and deletes its directory. Pending snapshots are reported as failed.
    ///
    /// # Errors
    /// When the files cannot be deleted.
    pub async fn remove(self: Arc<Self>) -> Result<(), DiskError> {
        self.stopped()
    }
}
