//! The `delta` file: the guest's bytes at their natural offsets. Sparse; never read where the map
//! does not say that a sector is present.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::DiskError;
use super::files::Files;
use super::io::Which;
use super::shape::Shape;

/// An open delta file.
#[derive(Debug)]
pub(super) struct Delta {
    files: Arc<Files>,
    file: File,
}

impl Delta {
    pub(super) fn create(files: &Arc<Files>, path: &Path, shape: Shape) -> Result<Self, DiskError> {
        let file = files.create(Which::Delta, path)?;
        files.set_len(Which::Delta, &file, shape.delta_len())?;
        Self::advised(files, file)
    }

    pub(super) fn open(files: &Arc<Files>, path: &Path, shape: Shape) -> Result<Self, DiskError> {
        let file = files.open(Which::Delta, path)?;
        let len = file.metadata().map_err(|error| files.error(Which::Delta, "read", error))?.len();
        if len != shape.delta_len() {
            let detail = format!("it has {len} bytes instead of {}", shape.delta_len());
            return Err(files.damaged(Which::Delta, detail));
        }
        Self::advised(files, file)
    }

    fn advised(files: &Arc<Files>, file: File) -> Result<Self, DiskError> {
        // Readahead would make large folios of the page cache, and ext4 overwrites parts of those
        // more than ten times as slowly.
        rustix::fs::fadvise(&file, 0, None, Advice::Random)
            .map_err(|error| files.error(Which::Delta, "advise on", error.into()))?;
        Ok(Self { files: Arc::clone(files), file })
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let read = self.file.read_exact_at(out, offset);
        read.map_err(|error| self.files.error(Which::Delta, "read", error))
    }

    /// Reads into memory that was not cleared for it.
    pub(super) fn read_new(&self, offset: u64, len: usize) -> Result<Vec<u8>, DiskError> {
        let failed = |error| self.files.error(Which::Delta, "read", error);
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            match rustix::io::pread(&self.file, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
        // There may be more room than was asked for.
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Reads what is in the host's page cache; `false`: not all of it is.
    pub(super) fn read_cached(&self, offset: u64, out: &mut [u8]) -> Result<bool, DiskError> {
        let len = out.len();
        let flags = ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(out)], offset, flags) {
            Ok(read) => Ok(read == len),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            // A file system that cannot tell.
            Err(Errno::OPNOTSUPP) => self.read(offset, out).map(|()| true),
            Err(error) => Err(self.files.error(Which::Delta, "read", error.into())),
        }
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.files.write_all_at(Which::Delta, &self.file, bytes, offset)
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Makes a range of whole sectors zero and gives its blocks back.
    pub(super) fn punch(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.files.punch_hole(Which::Delta, &self.file, offset, len)
    }

    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.files.sync_data(Which::Delta, &self.file)
    }

    /// Has the host begin to write out what is only in its memory, and does not wait for that. A hint:
    /// what it cannot do, the next sync does and tells of.
    pub(super) fn start_write_out(&self) {
        self.files.start_write_out(Which::Delta, &self.file);
    }

    /// The first byte from `offset` on that may be other than zero; `None`: none up to the end.
    pub(super) fn seek_data(&self, offset: u64) -> Result<Option<u64>, DiskError> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(self.files.error(Which::Delta, "search", error.into())),
        }
    }

    /// The first byte from `offset` on that is in a hole, or the end of the file.
    pub(super) fn seek_hole(&self, offset: u64) -> Result<u64, DiskError> {
        rustix::fs::seek(&self.file, SeekFrom::Hole(offset))
            .map_err(|error| self.files.error(Which::Delta, "search", error.into()))
    }
}
