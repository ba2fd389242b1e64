//! Stdin into an unnamed sparse file: an import needs to know the size before it begins.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use blobcr_repository::is_zero;

/// Zeros are left out in pieces of this size: the smallest chunk.
const PIECE_BYTES: usize = 64 << 10;

/// Reads stdin to its end.
pub(super) async fn stdin(temp_dir: &Path) -> anyhow::Result<File> {
    let file = unnamed(temp_dir)?;
    let spooled = tokio::task::spawn_blocking(move || spool(io::stdin().lock(), file)).await?;
    spooled.with_context(|| {
        format!("what came does not fit at {}; give another --temp-dir", temp_dir.display())
    })
}

/// A file without a name: gone when nobody has it open, whatever happens.
pub(super) fn unnamed(dir: &Path) -> anyhow::Result<File> {
    tempfile::tempfile_in(dir).with_context(|| {
        format!("cannot make a temporary file at {}; give another --temp-dir", dir.display())
    })
}

fn spool(mut input: impl Read, file: File) -> io::Result<File> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        let read = fill(&mut input, &mut piece)?;
        if !is_zero(&piece[..read]) {
            file.write_all_at(&piece[..read], at)?;
        }
        at += read as u64;
        if read < piece.len() {
            file.set_len(at)?;
            return Ok(file);
        }
    }
}

fn fill(input: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match input.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeros_stay_holes_and_every_byte_arrives() {
        let mut bytes = vec![0; 40 * PIECE_BYTES + 77];
        bytes[5] = 1;
        *bytes.last_mut().unwrap() = 2;
        let file = spool(&bytes[..], tempfile::tempfile().unwrap()).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), bytes.len() as u64);
        assert!(meta.blocks() * 512 < 4 * PIECE_BYTES as u64);
        let mut back = vec![9; bytes.len()];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, bytes);
    }

    #[test]
    fn nothing_at_all_is_an_empty_file() {
        let file = spool(io::empty(), tempfile::tempfile().unwrap()).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
