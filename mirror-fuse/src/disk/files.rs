//! The files of one disk: what fails names the disk and the file, and a failed fsync stops the
//! disk for good.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::DiskError;
use super::io::{FileIo, Which};

/// Shared by everything that touches the files of one disk.
pub(super) struct Files {
    disk: String,
    io: Arc<dyn FileIo>,
    /// 0, or 1 + the index in [`FILES`] of the file whose fsync failed.
    poisoned_by: AtomicU8,
}

const FILES: [Which; 7] = [
    Which::Record,
    Which::State,
    Which::Delta,
    Which::Map,
    Which::Journal,
    Which::Spill,
    Which::Directory,
];

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Files {
    pub(super) fn new(disk: String, io: Arc<dyn FileIo>) -> Arc<Self> {
        Arc::new(Self { disk, io, poisoned_by: AtomicU8::new(0) })
    }

    pub(super) fn disk(&self) -> &str {
        &self.disk
    }

    /// Turns the system's error into the disk's.
    pub(super) fn error(&self, which: Which, action: &'static str, source: io::Error) -> DiskError {
        let disk = self.disk.clone();
        let file = which.name();
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        if full.contains(&source.kind()) {
            return DiskError::NoSpace { disk, file };
        }
        DiskError::Io { disk, action, file, source }
    }

    pub(super) fn damaged(&self, which: Which, detail: impl Into<String>) -> DiskError {
        let (disk, file) = (self.disk.clone(), which.name());
        DiskError::Damaged { disk, file, detail: detail.into() }
    }

    /// Refuses once an fsync has failed.
    pub(super) fn check(&self) -> Result<(), DiskError> {
        match self.poisoned_by.load(Ordering::Acquire) {
            0 => Ok(()),
            by => {
                let file = FILES[usize::from(by) - 1].name();
                Err(DiskError::Poisoned { disk: self.disk.clone(), file })
            }
        }
    }

    fn poison(&self, which: Which) {
        let index = FILES.iter().position(|file| *file == which);
        let by = index.expect("every file is listed") as u8 + 1;
        // The first failure is the one to report.
        let _ = self.poisoned_by.compare_exchange(0, by, Ordering::AcqRel, Ordering::Acquire);
    }

    pub(super) fn write_all_at(
        &self,
        which: Which,
        file: &File,
        bytes: &[u8],
        offset: u64,
    ) -> Result<(), DiskError> {
        let done = self.io.write_all_at(which, file, bytes, offset);
        done.map_err(|error| self.error(which, "write", error))
    }

    /// Makes a file durable. A failure poisons the disk: what of the file is durable can no longer
    /// be known, and the next fsync may well claim success.
    pub(super) fn sync_data(&self, which: Which, file: &File) -> Result<(), DiskError> {
        self.check()?;
        self.io.sync_data(which, file).map_err(|error| self.sync_failed(which, &error))
    }

    /// Has the host begin to write out what is only in its memory; see [`FileIo::start_write_out`].
    pub(super) fn start_write_out(&self, which: Which, file: &File) {
        self.io.start_write_out(which, file);
    }

    /// Makes the names in a directory durable. A failure poisons the disk.
    pub(super) fn sync_directory(&self, path: &Path) -> Result<(), DiskError> {
        self.check()?;
        self.io.sync_directory(path).map_err(|error| self.sync_failed(Which::Directory, &error))
    }

    fn sync_failed(&self, which: Which, error: &io::Error) -> DiskError {
        tracing::error!(disk = self.disk, file = which.name(), %error, "fsync failed");
        self.poison(which);
        DiskError::Poisoned { disk: self.disk.clone(), file: which.name() }
    }

    pub(super) fn allocate(
        &self,
        which: Which,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), DiskError> {
        let done = self.io.allocate(which, file, offset, len);
        done.map_err(|error| self.error(which, "allocate space for", error))
    }

    pub(super) fn punch_hole(
        &self,
        which: Which,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), DiskError> {
        let done = self.io.punch_hole(which, file, offset, len);
        done.map_err(|error| self.error(which, "punch a hole into", error))
    }

    /// Opens an existing file for reading and writing.
    pub(super) fn open(&self, which: Which, path: &Path) -> Result<File, DiskError> {
        let opened = File::options().read(true).write(true).open(path);
        opened.map_err(|error| self.error(which, "open", error))
    }

    /// Makes an empty file, in place of what was there.
    pub(super) fn create(&self, which: Which, path: &Path) -> Result<File, DiskError> {
        let made = File::options().read(true).write(true).create(true).truncate(true).open(path);
        made.map_err(|error| self.error(which, "create", error))
    }

    pub(super) fn set_len(&self, which: Which, file: &File, len: u64) -> Result<(), DiskError> {
        file.set_len(len).map_err(|error| self.error(which, "size", error))
    }

    /// Renames a synced file over another, durably.
    pub(super) fn rename(&self, which: Which, from: &Path, to: &Path) -> Result<(), DiskError> {
        std::fs::rename(from, to).map_err(|error| self.error(which, "rename", error))?;
        let parent = to.parent().expect("a disk's files are in a directory");
        self.sync_directory(parent)
    }
}
