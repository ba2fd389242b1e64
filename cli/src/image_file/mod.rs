//! Disk image files: what an import reads and an export writes.

mod extents;
mod held;
mod qcow2;
mod qemu_img;
mod raw;
mod spool;
mod target;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blobcr_proto::ChunkSize;
use bytes::Bytes;

use crate::args::{ImportArgs, ImportFormat};
use crate::exit::{Exit, Refusal};

pub use held::HeldFile;
#[cfg(feature = "fuzzing")]
pub(crate) use qcow2::allowed_size as qcow2_size;
pub use raw::RawFile;
pub use target::Target;

/// Opens what `image import` was given, as a raw file. A qcow2 file and stdin are unpacked to an
/// unnamed temporary file first.
///
/// # Errors
/// When the file is not there, is no regular file or block device, or is damaged.
pub async fn open(args: &ImportArgs, chunk_size: ChunkSize) -> anyhow::Result<RawFile> {
    if args.file == Path::new("-") {
        let spooled = spool::stdin(&args.temp_dir).await?;
        if wants_qcow2(args.format, &spooled)? {
            let raw = qcow2::unpack(&qemu_img::path_of(&spooled), &spooled, args).await?;
            return RawFile::temporary(raw, chunk_size);
        }
        return RawFile::temporary(spooled, chunk_size);
    }
    let file = File::open(&args.file)?;
    if file.metadata()?.is_dir() {
        return Err(Refusal::new(Exit::Usage, "it is a directory").into());
    }
    if wants_qcow2(args.format, &file)? {
        let raw = qcow2::unpack(&args.file, &file, args).await?;
        return RawFile::temporary(raw, chunk_size);
    }
    RawFile::open(file, chunk_size)
}

/// The whole chunk of a raw file of `size_bytes` that begins at `start`, with zeros behind the file's end.
fn read_chunk(
    file: &File,
    size_bytes: u64,
    start: u64,
    chunk_size: ChunkSize,
) -> io::Result<Bytes> {
    let here = size_bytes.saturating_sub(start).min(chunk_size.bytes()) as usize;
    let mut chunk = vec![0; chunk_size.len()];
    file.read_exact_at(&mut chunk[..here], start)?;
    Ok(chunk.into())
}

fn wants_qcow2(format: ImportFormat, file: &File) -> io::Result<bool> {
    match format {
        ImportFormat::Raw => Ok(false),
        ImportFormat::Qcow2 => Ok(true),
        ImportFormat::Auto => {
            let mut head = Vec::new();
            ReadAt { file, at: 0 }.take(qcow2::MAGIC.len() as u64).read_to_end(&mut head)?;
            Ok(head == qcow2::MAGIC)
        }
    }
}

/// Reads a file from an offset on, without moving its cursor.
struct ReadAt<'a> {
    file: &'a File,
    at: u64,
}

impl Read for ReadAt<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(out, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
