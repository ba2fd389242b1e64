//! An attached disk as programs see it: a file with the ioctls of `guest/include/blobcr.h`.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, ensure};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::ioctl::{Updater, ioctl};

/// `struct blobcr_commit`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawCommit {
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

/// `struct blobcr_status`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawStatus {
    version: u32,
    size: u32,
    flags: u32,
    state: u32,
    number: u64,
    image_id: u64,
    last_stable: u64,
    pending: u64,
    disk_bytes: u64,
    dirty_bytes: u64,
    local_bytes: u64,
    image: [u8; 136],
    reason: [u8; 240],
}

const COMMIT_WAIT: u32 = 1;
const PENDING: u32 = 1;
const STABLE: u32 = 2;
const IOC_COMMIT: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<RawCommit>(0xBC, 2);
const IOC_STATUS: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<RawStatus>(0xBC, 3);

/// The snapshot that a COMMIT made.
#[derive(Clone, Debug)]
pub struct Committed {
    /// The disk's checkpoint image.
    pub image: String,
    /// Its number in that image.
    pub number: u64,
}

impl Committed {
    /// As the command line names it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}@{}", self.image, self.number)
    }
}

/// An attached disk, open.
#[derive(Debug)]
pub struct MountedDisk {
    file: File,
}

impl MountedDisk {
    /// Opens it for reading and writing; `direct` as hypervisors with `cache=none` do.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path, direct: bool) -> anyhow::Result<Self> {
        let flags = if direct { OFlags::DIRECT.bits() as i32 } else { 0 };
        let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        Ok(Self { file: opened.with_context(|| format!("open {}", path.display()))? })
    }

    /// For plain reads and writes.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    fn ioctl(&self, flags: u32) -> io::Result<RawCommit> {
        let mut commit = RawCommit {
            version: 1,
            size: size_of::<RawCommit>() as u32,
            flags,
            state: 0,
            timeout_ms: 0,
            number: 0,
            image_id: 0,
            dirty_bytes: 0,
            downtime_ns: 0,
            image: [0; 136],
        };
        // SAFETY: the opcode's structure is `RawCommit`, which has no padding, holds only numbers
        // and lives until the call returns.
        unsafe { ioctl(&self.file, Updater::<IOC_COMMIT, _>::new(&mut commit)) }?;
        Ok(commit)
    }

    /// COMMIT; returns as soon as it is accepted.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn commit(&self) -> io::Result<Committed> {
        self.ioctl(0).map(|made| made.committed())
    }

    /// COMMIT; returns when the snapshot is stable.
    ///
    /// # Errors
    /// When the ioctl fails, or the snapshot becomes anything else.
    pub fn commit_stable(&self) -> anyhow::Result<Committed> {
        let made = self.ioctl(COMMIT_WAIT).context("COMMIT")?;
        ensure!(made.state == STABLE, "{} is in state {}", made.committed().name(), made.state);
        Ok(made.committed())
    }

    /// Whether a snapshot is stable yet.
    ///
    /// # Errors
    /// When the ioctl fails, or the snapshot has failed.
    pub fn is_stable(&self, number: u64) -> anyhow::Result<bool> {
        let mut status = RawStatus {
            version: 1,
            size: size_of::<RawStatus>() as u32,
            flags: 0,
            state: 0,
            number,
            image_id: 0,
            last_stable: 0,
            pending: 0,
            disk_bytes: 0,
            dirty_bytes: 0,
            local_bytes: 0,
            image: [0; 136],
            reason: [0; 240],
        };
        // SAFETY: the opcode's structure is `RawStatus`, which has no padding, holds only numbers
        // and lives until the call returns.
        unsafe { ioctl(&self.file, Updater::<IOC_STATUS, _>::new(&mut status)) }
            .context("STATUS")?;
        ensure!(
            matches!(status.state, PENDING | STABLE),
            "snapshot {number} is in state {}",
            status.state
        );
        Ok(status.state == STABLE)
    }

    /// Discards a range: it reads as zeros.
    ///
    /// # Errors
    /// As the call's.
    pub fn punch(&self, range: &Range<usize>) -> io::Result<()> {
        self.fallocate(range, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
    }

    /// Writes zeros.
    ///
    /// # Errors
    /// As the call's.
    pub fn zero(&self, range: &Range<usize>) -> io::Result<()> {
        self.fallocate(range, FallocateFlags::ZERO_RANGE)
    }

    fn fallocate(&self, range: &Range<usize>, flags: FallocateFlags) -> io::Result<()> {
        Ok(fallocate(&self.file, flags, range.start as u64, range.len() as u64)?)
    }
}

impl RawCommit {
    fn committed(&self) -> Committed {
        let name = self.image.split(|byte| *byte == 0).next().unwrap_or_default();
        Committed { image: String::from_utf8_lossy(name).into_owned(), number: self.number }
    }
}
