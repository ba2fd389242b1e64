//! A raw image file as the source of an import.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::Arc;

use anyhow::Context;
use async_trait::async_trait;
use blobcr_proto::ChunkSize;
use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_repository::{ChunkSource, SourceError};
use bytes::Bytes;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use super::extents::{chunks_of, data_ranges};
use crate::exit::{Exit, Refusal};

/// A raw file that is being imported.
#[derive(Debug)]
pub struct RawFile {
    file: Arc<File>,
    size_bytes: u64,
    /// What the file looked like when it was opened; `None` when nobody else can change it.
    stamp: Option<Stamp>,
}

/// What changes when somebody writes to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { len: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl RawFile {
    /// A file or block device that others may see.
    ///
    /// # Errors
    /// When it is neither, or too large.
    pub fn open(file: File) -> anyhow::Result<Self> {
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let message = "it is neither a regular file nor a block device (for a pipe give `-`)";
            return Err(Refusal::new(Exit::Usage, message).into());
        }
        Self::new(file, kind.is_file().then(|| Stamp::of(&metadata)))
    }

    /// A file that only this process has.
    ///
    /// # Errors
    /// When it is too large.
    pub fn temporary(file: File) -> anyhow::Result<Self> {
        Self::new(file, None)
    }

    fn new(file: File, stamp: Option<Stamp>) -> anyhow::Result<Self> {
        let size_bytes = seek(&file, SeekFrom::End(0)).context("it has no size")?;
        if size_bytes > IMAGE_SIZE_MAX {
            let message =
                format!("it has {size_bytes} bytes; an image has at most {IMAGE_SIZE_MAX}");
            return Err(Refusal::new(Exit::Usage, message).into());
        }
        // Advice that is not taken costs time only.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Ok(Self { file: Arc::new(file), size_bytes, stamp })
    }

    /// Of the disk.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The chunks that may hold something else than zeros: sorted, each once.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn data_chunks(&self, chunk_size: ChunkSize) -> io::Result<Vec<u64>> {
        Ok(chunks_of(&data_ranges(&self.file, self.size_bytes)?, chunk_size.bytes()))
    }

    /// Refuses a file that somebody wrote to while it was read.
    ///
    /// # Errors
    /// When it changed.
    pub fn check_unchanged(&self) -> anyhow::Result<()> {
        let Some(before) = self.stamp else { return Ok(()) };
        if Stamp::of(&self.file.metadata()?) == before {
            return Ok(());
        }
        let message = "the file changed while it was read; stop what writes to it and try again";
        Err(Refusal::new(Exit::Conflict, message).into())
    }

    /// A source of whole chunks for a persist.
    #[must_use]
    pub fn source(&self, chunk_size: ChunkSize) -> RawSource {
        RawSource { file: Arc::clone(&self.file), size_bytes: self.size_bytes, chunk_size }
    }
}

/// Reads whole chunks; behind the file's end there are zeros.
#[derive(Debug)]
pub struct RawSource {
    file: Arc<File>,
    size_bytes: u64,
    chunk_size: ChunkSize,
}

#[async_trait]
impl ChunkSource for RawSource {
    async fn chunk(&self, index: u64) -> Result<Option<Bytes>, SourceError> {
        let file = Arc::clone(&self.file);
        let start = index * self.chunk_size.bytes();
        let wanted = self.size_bytes.saturating_sub(start).min(self.chunk_size.bytes()) as usize;
        let mut chunk = vec![0; self.chunk_size.len()];
        let read = tokio::task::spawn_blocking(move || {
            file.read_exact_at(&mut chunk[..wanted], start).map(|()| Bytes::from(chunk))
        });
        match read.await {
            Ok(Ok(chunk)) => Ok(Some(chunk)),
            Ok(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Err(SourceError::new(
                index,
                Refusal::new(Exit::Conflict, "the file became shorter while it was read"),
            )),
            Ok(Err(e)) => Err(SourceError::new(index, e)),
            Err(e) => Err(SourceError::new(index, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_chunk_ends_in_zeros() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 70_000], 0).unwrap();
        let raw = RawFile::temporary(file).unwrap();
        assert_eq!(raw.data_chunks(ChunkSize::MIN).unwrap(), [0, 1]);
        let source = raw.source(ChunkSize::MIN);
        assert_eq!(source.chunk(0).await.unwrap().unwrap(), vec![7; 65_536]);
        let last = source.chunk(1).await.unwrap().unwrap();
        assert_eq!(last.len(), 65_536);
        assert!(last[..70_000 - 65_536].iter().all(|b| *b == 7));
        assert!(last[70_000 - 65_536..].iter().all(|b| *b == 0));
    }

    #[tokio::test]
    async fn a_file_that_changes_is_refused() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(1 << 20).unwrap();
        let raw = RawFile::open(File::open(named.path()).unwrap()).unwrap();
        raw.check_unchanged().unwrap();
        named.as_file().set_len(1 << 10).unwrap();
        assert_eq!(crate::exit::code(&raw.check_unchanged().unwrap_err()), Exit::Conflict);
        let error = raw.source(ChunkSize::MIN).chunk(0).await.unwrap_err();
        assert_eq!(crate::exit::code(&error.into()), Exit::Conflict);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let null = RawFile::open(File::open("/dev/null").unwrap()).unwrap_err();
        assert_eq!(crate::exit::code(&null), Exit::Usage);
        let huge = tempfile::tempfile().unwrap();
        huge.set_len(IMAGE_SIZE_MAX + 1).unwrap();
        assert_eq!(crate::exit::code(&RawFile::temporary(huge).unwrap_err()), Exit::Usage);
    }
}
