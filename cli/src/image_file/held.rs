//! A raw file that holds one snapshot and is about to hold another.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blobcr_proto::{ChunkSize, Hash};
use blobcr_repository::Identified;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::read_chunk;
use crate::exit::{Exit, Refusal};

/// See the module. All calls block.
#[derive(Debug)]
pub struct HeldFile {
    file: File,
    size_bytes: u64,
    chunk_size: ChunkSize,
}

impl HeldFile {
    /// A file of `size_bytes` that others may see.
    ///
    /// # Errors
    /// When it is no regular file of that size, or must not be written.
    pub fn open(path: &Path, size_bytes: u64, chunk_size: ChunkSize) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() != size_bytes {
            let message = format!(
                "it is no raw file of {size_bytes} bytes; export the snapshot whole, to another file"
            );
            return Err(Refusal::new(Exit::Conflict, message).into());
        }
        Ok(Self { file, size_bytes, chunk_size })
    }

    /// Where a chunk begins, and how much of it there is before the file's end.
    fn place(&self, chunk: u64) -> (u64, usize) {
        let start = chunk * self.chunk_size.bytes();
        let len = self.size_bytes.saturating_sub(start).min(self.chunk_size.bytes());
        (start, len as usize)
    }

    /// What the file holds at a chunk; `None`: zeros.
    ///
    /// # Errors
    /// When the disk breaks.
    pub fn identity(&self, chunk: u64) -> io::Result<Option<Hash>> {
        let (start, _) = self.place(chunk);
        let plain = read_chunk(&self.file, self.size_bytes, start, self.chunk_size)?;
        Ok(Identified::of(plain).map(|found| found.id))
    }

    /// Writes a whole chunk; `None`: zeros, as a hole where the file system can.
    ///
    /// # Errors
    /// When the disk is full, or breaks.
    pub fn write(&self, chunk: u64, plain: Option<&[u8]>) -> io::Result<()> {
        let (start, len) = self.place(chunk);
        if let Some(plain) = plain {
            return self.file.write_all_at(&plain[..len], start);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, start, len as u64) {
            Err(Errno::OPNOTSUPP) => self.file.write_all_at(&vec![0; len], start),
            punched => Ok(punched?),
        }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When the disk breaks.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: ChunkSize = ChunkSize::MIN;

    #[test]
    fn chunks_are_told_and_written_as_a_snapshot_has_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let len = SIZE.bytes() + 100;
        file.as_file().set_len(len).unwrap();
        let held = HeldFile::open(file.path(), len, SIZE).unwrap();
        let mut last = vec![0; SIZE.len()];
        last[..100].fill(7);
        assert_eq!(held.identity(1).unwrap(), None);
        held.write(1, Some(&last)).unwrap();
        assert_eq!(held.identity(1).unwrap(), Some(Hash::of(&last)));
        assert_eq!(file.as_file().metadata().unwrap().len(), len, "zeros behind the end are none");
        held.write(1, None).unwrap();
        assert_eq!((held.identity(0).unwrap(), held.identity(1).unwrap()), (None, None));
        assert_eq!(file.as_file().metadata().unwrap().len(), len);
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let refusal = HeldFile::open(file.path(), 5, SIZE).unwrap_err();
        assert_eq!(crate::exit::code(&refusal), Exit::Conflict);
        let refusal = HeldFile::open(Path::new("/"), 5, SIZE).unwrap_err();
        assert_ne!(crate::exit::code(&refusal), Exit::NotFound, "{refusal}");
    }
}
