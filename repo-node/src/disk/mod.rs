//! The little that the store asks of a disk: one flat directory of files.
//!
//! Every byte that the store reads or writes passes through [`Disk`] and [`DiskFile`], so that the
//! crash tests can put a disk underneath that loses what was not synced, tears writes, runs full
//! and fails.

mod direct;
mod real;

use std::fmt;
use std::io::{self, IoSlice};
use std::sync::Arc;

pub use real::{LockError, RealDisk};

/// One directory of files.
///
/// Names are plain file names. A created, renamed or unlinked name survives a power cut only after
/// [`Disk::sync_dir`].
pub trait Disk: Send + Sync + fmt::Debug + 'static {
    /// Creates a file that must not exist.
    ///
    /// # Errors
    /// As `open(2)`.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Opens a file that must exist.
    ///
    /// # Errors
    /// As `open(2)`.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// The names of all files, in no order.
    ///
    /// # Errors
    /// As `readdir(3)`.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Removes a name; files that are open stay readable.
    ///
    /// # Errors
    /// As `unlink(2)`.
    fn unlink(&self, name: &str) -> io::Result<()>;
    /// Gives a file another name, replacing what had it.
    ///
    /// # Errors
    /// As `rename(2)`.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Makes all creates, renames and unlinks so far durable.
    ///
    /// # Errors
    /// As `fsync(2)`.
    fn sync_dir(&self) -> io::Result<()>;
    /// How much the file system can hold.
    ///
    /// # Errors
    /// As `statvfs(3)`.
    fn space(&self) -> io::Result<Space>;
}

/// Room on a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Size of the file system.
    pub capacity: u64,
    /// What an unprivileged process may still use.
    pub free: u64,
}

/// An open file.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Its length in bytes.
    ///
    /// # Errors
    /// As `fstat(2)`.
    fn length(&self) -> io::Result<u64>;
    /// Up to `len` bytes from `offset`: fewer only at the end of the file.
    ///
    /// # Errors
    /// As `pread(2)`.
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Writes all of `pieces`, one after the other, from `offset`. After an error any part of the
    /// range may have been written.
    ///
    /// # Errors
    /// As `pwritev(2)`.
    fn write_at(&self, offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()>;
    /// Makes data and length durable.
    ///
    /// # Errors
    /// As `fdatasync(2)`. What was written since the last success may then be lost, whatever a
    /// later sync says.
    fn sync(&self) -> io::Result<()>;
    /// Cuts the file to `len` bytes.
    ///
    /// # Errors
    /// As `ftruncate(2)`.
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Takes `len` bytes of the file system for the file, without writing them.
    ///
    /// # Errors
    /// As `fallocate(2)`.
    fn allocate(&self, len: u64) -> io::Result<()>;
}

/// Whether `error` says that there is no room: the disk is full, or the user's quota is.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
