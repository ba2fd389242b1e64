//! A raw image file as the source of an import.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use anyhow::Context;
use async_trait::async_trait;
use blobcr_proto::ChunkSize;
use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_repository::{ChunkSource, Identified, SourceError, SparseSource};
use bytes::Bytes;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use super::extents::next_data;
use super::read_chunk;
use crate::exit::{Exit, Refusal};

/// A raw file that is being imported: whole chunks of it, and where they are.
#[derive(Debug)]
pub struct RawFile {
    opened: Arc<Opened>,
    chunk_size: ChunkSize,
}

#[derive(Debug)]
struct Opened {
    file: File,
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
    pub fn open(file: File, chunk_size: ChunkSize) -> anyhow::Result<Self> {
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let message = "it is neither a regular file nor a block device (for a pipe give `-`)";
            return Err(Refusal::new(Exit::Usage, message).into());
        }
        Self::new(file, chunk_size, kind.is_file().then(|| Stamp::of(&metadata)))
    }

    /// A file that only this process has.
    ///
    /// # Errors
    /// When it is too large.
    pub fn temporary(file: File, chunk_size: ChunkSize) -> anyhow::Result<Self> {
        Self::new(file, chunk_size, None)
    }

    fn new(file: File, chunk_size: ChunkSize, stamp: Option<Stamp>) -> anyhow::Result<Self> {
        let size_bytes = seek(&file, SeekFrom::End(0)).context("it has no size")?;
        if size_bytes > IMAGE_SIZE_MAX {
            let message =
                format!("it has {size_bytes} bytes; an image has at most {IMAGE_SIZE_MAX}");
            return Err(Refusal::new(Exit::Usage, message).into());
        }
        // Advice that is not taken costs time only.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Ok(Self { opened: Arc::new(Opened { file, size_bytes, stamp }), chunk_size })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        chunk: u64,
        work: impl FnOnce(&Opened) -> Result<T, Cause> + Send + 'static,
    ) -> Result<T, SourceError> {
        let opened = Arc::clone(&self.opened);
        match tokio::task::spawn_blocking(move || work(&opened)).await {
            Ok(done) => done.map_err(|e| SourceError::new(chunk, e)),
            Err(e) => Err(SourceError::new(chunk, e)),
        }
    }
}

/// Why a chunk could not be read. Not an `anyhow::Error`: that would hide the exit code of what it
/// holds once it is the source of another error.
type Cause = Box<dyn std::error::Error + Send + Sync>;

impl Opened {
    fn chunk(&self, start: u64, chunk_size: ChunkSize) -> Result<Bytes, Cause> {
        let read = read_chunk(&self.file, self.size_bytes, start, chunk_size);
        // Looked at behind each chunk: an image of two moments of a disk is worth nothing.
        self.check_unchanged()?;
        match read {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(changed().into()),
            read => Ok(read?),
        }
    }

    fn check_unchanged(&self) -> Result<(), Cause> {
        match self.stamp {
            Some(before) if Stamp::of(&self.file.metadata()?) != before => Err(changed().into()),
            _ => Ok(()),
        }
    }
}

fn changed() -> Refusal {
    let message = "the file changed while it was read; stop what writes to it and try again";
    Refusal::new(Exit::Conflict, message)
}

#[async_trait]
impl ChunkSource for RawFile {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError> {
        let chunk_size = self.chunk_size;
        let start = index * chunk_size.bytes();
        let read = move |opened: &Opened| Ok(Identified::of(opened.chunk(start, chunk_size)?));
        self.blocking(index, read).await
    }
}

#[async_trait]
impl SparseSource for RawFile {
    fn size_bytes(&self) -> u64 {
        self.opened.size_bytes
    }

    async fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, SourceError> {
        let chunk_bytes = self.chunk_size.bytes();
        let at = from * chunk_bytes;
        let find = move |opened: &Opened| Ok(next_data(&opened.file, at, opened.size_bytes)?);
        let data = self.blocking(from, find).await?;
        Ok(data.map(|data| data.start / chunk_bytes..data.end.div_ceil(chunk_bytes)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[tokio::test]
    async fn the_last_chunk_ends_in_zeros() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 70_000], 0).unwrap();
        let raw = RawFile::temporary(file, ChunkSize::MIN).unwrap();
        assert_eq!(raw.next_data(0).await.unwrap(), Some(0..2));
        assert_eq!(raw.next_data(2).await.unwrap(), None);
        assert_eq!(raw.chunk(0).await.unwrap().unwrap().plain, vec![7; 65_536]);
        let last = raw.chunk(1).await.unwrap().unwrap().plain;
        assert_eq!(last.len(), 65_536);
        assert!(last[..70_000 - 65_536].iter().all(|b| *b == 7));
        assert!(last[70_000 - 65_536..].iter().all(|b| *b == 0));
    }

    #[tokio::test]
    async fn a_file_that_changes_is_refused() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(1 << 20).unwrap();
        let raw = RawFile::open(File::open(named.path()).unwrap(), ChunkSize::MIN).unwrap();
        raw.chunk(0).await.unwrap();
        named.as_file().set_len(1 << 10).unwrap();
        let error = raw.chunk(0).await.unwrap_err();
        assert_eq!(crate::exit::code(&error.into()), Exit::Conflict);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let null = RawFile::open(File::open("/dev/null").unwrap(), ChunkSize::MIN).unwrap_err();
        assert_eq!(crate::exit::code(&null), Exit::Usage);
        let huge = tempfile::tempfile().unwrap();
        huge.set_len(IMAGE_SIZE_MAX + 1).unwrap();
        let huge = RawFile::temporary(huge, ChunkSize::MIN).unwrap_err();
        assert_eq!(crate::exit::code(&huge), Exit::Usage);
    }
}
