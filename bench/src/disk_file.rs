//! A disk's file under the mount, with the ioctls of `guest/include/blobcr.h`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::ioctl::{Updater, ioctl};

/// `struct blobcr_commit`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Commit {
    version: u32,
    size: u32,
    flags: u32,
    state: u32,
    timeout_ms: u64,
    number: u64,
    image_id: u64,
    dirty_bytes: u64,
    downtime_ns: u64,
    image: [u8; 136],
}

const COMMIT_WAIT: u32 = 1;
const IOC_COMMIT: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<Commit>(0xBC, 2);

/// What a COMMIT returned, and how long the call took.
#[derive(Debug, Clone, Copy)]
pub struct Committed {
    /// Number of the snapshot.
    pub number: u64,
    /// Bytes of the chunks that had changed.
    pub dirty_bytes: u64,
    /// From the caller's side.
    pub call: Duration,
    /// As the disk itself measured it.
    pub downtime: Duration,
}

/// An open disk.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
}

impl DiskFile {
    /// Opens the file for reading and writing.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self { file: file.with_context(|| format!("open {}", path.display()))? })
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// When the write fails.
    pub fn write(&self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        self.file.write_all_at(data, offset).context("write to the disk")
    }

    /// COMMIT; with `wait`, until the snapshot is stable.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn commit(&self, wait: bool) -> anyhow::Result<Committed> {
        let mut commit = Commit {
            version: 1,
            size: size_of::<Commit>() as u32,
            flags: if wait { COMMIT_WAIT } else { 0 },
            state: 0,
            timeout_ms: 0,
            number: 0,
            image_id: 0,
            dirty_bytes: 0,
            downtime_ns: 0,
            image: [0; 136],
        };
        let start = Instant::now();
        // SAFETY: the opcode's structure is `Commit`, which has no padding and holds only numbers.
        unsafe { ioctl(&self.file, Updater::<IOC_COMMIT, _>::new(&mut commit)) }
            .context("COMMIT")?;
        Ok(Committed {
            number: commit.number,
            dirty_bytes: commit.dirty_bytes,
            call: start.elapsed(),
            downtime: Duration::from_nanos(commit.downtime_ns),
        })
    }
}
