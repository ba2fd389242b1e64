//! Every change to a disk's files goes through here, so that tests can make the host's file
//! system full or faulty, and can tell what a power failure would have left.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FallocateFlags;

/// Which of a disk's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Which {
    /// The immutable specification.
    Record,
    /// The durable facts.
    State,
    /// The guest's bytes.
    Delta,
    /// Which sectors are in the delta, and which chunks are dirty.
    Map,
    /// The durable form of the map.
    Journal,
    /// Old versions of chunks that wait to be persisted.
    Spill,
    /// A directory.
    Directory,
}

impl Which {
    /// For messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Record => "record file",
            Self::State => "state file",
            Self::Delta => "delta file",
            Self::Map => "map file",
            Self::Journal => "journal file",
            Self::Spill => "spill file",
            Self::Directory => "directory",
        }
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The calls that change files. The provided methods are the real thing.
pub trait FileIo: Send + Sync + 'static {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// As `pwrite`; part of the bytes may then have been written.
    fn write_all_at(
        &self,
        _which: Which,
        file: &File,
        bytes: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    /// Makes the bytes of `file`, and what is needed to find them, durable.
    ///
    /// # Errors
    /// As `fdatasync`. What is durable is unknown after that.
    fn sync_data(&self, _which: Which, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    /// Begins to write out what is only in the host's memory, and does not wait for it. A hint: what it
    /// cannot do, the next sync does and tells of.
    fn start_write_out(&self, _which: Which, file: &File) {
        const WHOLE_FILE: i64 = 0;
        let flags = libc::SYNC_FILE_RANGE_WRITE;
        // SAFETY: it takes no memory, and the descriptor is open. Without its other flags it neither
        // waits nor takes an error from who syncs.
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, WHOLE_FILE, flags) };
    }

    /// Makes the names in the directory `path` durable.
    ///
    /// # Errors
    /// As `fsync`.
    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    /// Allocates the blocks of a range, so that no later write to it lacks space.
    ///
    /// # Errors
    /// As `fallocate`.
    fn allocate(&self, _which: Which, file: &File, offset: u64, len: u64) -> io::Result<()> {
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    /// Makes a range read as zeros and gives its blocks back.
    ///
    /// # Errors
    /// As `fallocate`.
    fn punch_hole(&self, _which: Which, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, how, offset, len)?;
        Ok(())
    }
}

/// The host's own file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostFiles;

impl FileIo for HostFiles {}
