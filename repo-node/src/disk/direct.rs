//! Large writes past the page cache.
//!
//! A chunk is written once, and who reads it later is seldom in a hurry to have it from memory. In the
//! page cache it would push out what is read, and a page that is new to the cache costs several times
//! what its copy does.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;

/// What devices want places and memory to be multiples of; a page, so that nothing of a large write is
/// in a page of the cache that also holds something else.
pub(super) const BLOCK: u64 = 4096;
/// Smaller ones go through the page cache, which writes several of them at once.
const LARGE_BYTES: u64 = 128 << 10;
/// Bytes of a large write that are handed to the device at once.
const BUFFER_BYTES: usize = 2 << 20;

/// Aligned memory, through which large writes pass one after the other: they come in pieces at any
/// place.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffer(Arc<Mutex<Vec<u8>>>);

/// A file for large writes, where the file system has such.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    buffer: Buffer,
}

impl Direct {
    /// Opens `cached` once more.
    pub(super) fn of(cached: &File, buffer: &Buffer) -> Option<Self> {
        let direct = OFlags::DIRECT.bits().cast_signed();
        // Not by its name, which may be another file's by now.
        let path = format!("/proc/self/fd/{}", cached.as_raw_fd());
        let file = OpenOptions::new().write(true).custom_flags(direct).open(path).ok()?;
        Some(Self { file, buffer: buffer.clone() })
    }

    /// How many of `len` bytes at `offset` come before, and are in, the part that is written past the
    /// page cache; nothing when that part would be small.
    pub(super) fn part(offset: u64, len: u64) -> Option<(usize, u64)> {
        let start = offset.next_multiple_of(BLOCK);
        let end = (offset + len) / BLOCK * BLOCK;
        let large = end.checked_sub(start).filter(|bytes| *bytes >= LARGE_BYTES)?;
        Some(((start - offset) as usize, large))
    }

    /// Writes the first `len` bytes of `pieces` at `offset`, both multiples of a block, and takes them
    /// off. What the device does not take is written to `cached`, the same file.
    pub(super) fn write(
        &self,
        cached: &File,
        mut offset: u64,
        len: u64,
        pieces: &mut &mut [IoSlice<'_>],
    ) -> io::Result<()> {
        let mut memory = self.buffer.0.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.is_empty() {
            memory.resize(BUFFER_BYTES + BLOCK as usize, 0);
        }
        let start = memory.as_ptr().align_offset(BLOCK as usize);
        let aligned = &mut memory[start..start + BUFFER_BYTES];
        let end = offset + len;
        while offset < end {
            let bytes = &mut aligned[..BUFFER_BYTES.min((end - offset) as usize)];
            take(pieces, bytes);
            let written = match rustix::io::pwrite(&self.file, &*bytes, offset) {
                Ok(written) => written,
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::INTR) => 0,
                Err(error) => return Err(error.into()),
            };
            let rest = &bytes[written..];
            cached.write_all_at(rest, offset + written as u64)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Moves the first bytes of `pieces` to `out`, which they must fill.
pub(super) fn take(pieces: &mut &mut [IoSlice<'_>], out: &mut [u8]) {
    let mut filled = 0;
    while filled < out.len() {
        let piece = &pieces[0];
        let now = piece.len().min(out.len() - filled);
        out[filled..filled + now].copy_from_slice(&piece[..now]);
        IoSlice::advance_slices(pieces, now);
        filled += now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_large_is_cut_at_blocks() {
        let block = BLOCK;
        assert_eq!(Direct::part(0, LARGE_BYTES - 1), None);
        assert_eq!(Direct::part(0, LARGE_BYTES), Some((0, LARGE_BYTES)));
        assert_eq!(Direct::part(1, LARGE_BYTES), None);
        assert_eq!(Direct::part(64, LARGE_BYTES + 2 * block), Some((4032, LARGE_BYTES + block)));
        assert_eq!(Direct::part(block - 1, LARGE_BYTES + 1), Some((1, LARGE_BYTES)));
        assert_eq!(Direct::part(10, 100), None);
    }

    #[test]
    fn bytes_are_taken_across_pieces() {
        let all: Vec<u8> = (0..100).collect();
        let mut pieces = [IoSlice::new(&all[..1]), IoSlice::new(&[]), IoSlice::new(&all[1..])];
        let mut left = &mut pieces[..];
        let (mut first, mut second) = ([0; 40], [0; 60]);
        take(&mut left, &mut first);
        take(&mut left, &mut second);
        assert_eq!([&first[..], &second].concat(), all);
        assert!(left.is_empty());
    }
}
