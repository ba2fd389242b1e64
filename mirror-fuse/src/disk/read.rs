//! Reads. They take no lock: the presence bits say for each sector whether it is in the delta, and
//! a bit is set only after the sector's bytes are there.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::try_join_all;

use super::generation::Generation;
use super::shape::{Piece, SECTOR, Sectors};
use super::{Disk, DiskError};

/// Chunks of the base that were fetched for a read; `None`: zeros.
pub(super) type FetchedChunks = HashMap<u64, Option<Bytes>>;

/// A range of the delta that is still to be read: neighbours are read in one call.
#[derive(Default)]
struct Run {
    /// In `out`.
    start: usize,
    len: usize,
}

/// How far a read got that must wait neither for the network nor for a device.
#[derive(Debug)]
pub enum QuickRead {
    /// It is done.
    Done,
    /// The bytes are on this host, in a file that has to be read from its device.
    Cold(ColdRead),
    /// [`Disk::read`] must do it.
    NeedsAsync,
}

/// A range of a disk that is whole in one file of this host. What is read from it now is what the disk
/// held at some moment since [`Disk::quick_read`] was called.
#[derive(Debug)]
pub struct ColdRead {
    generation: Arc<Generation>,
    /// In that file.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

impl AsFd for ColdRead {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.generation.delta.file().as_fd()
    }
}

impl ColdRead {
    /// Reads it here; blocks.
    ///
    /// # Errors
    /// When the host fails.
    pub fn read(&self, out: &mut [u8]) -> Result<(), DiskError> {
        self.generation.delta.read(self.offset, &mut out[..self.len])
    }
}

impl Disk {
    /// Reads what is in this host's memory; no allocation, no lock, no wait for a device unless the
    /// range is in more than one file.
    ///
    /// # Errors
    /// When the range is beyond the end, or the host fails.
    pub fn quick_read(&self, offset: u64, out: &mut [u8]) -> Result<QuickRead, DiskError> {
        self.shared.check_range(offset, out.len() as u64)?;
        let generation = self.shared.generation.load();
        if generation.is_local(offset, out.len()) {
            if generation.delta.read_cached(offset, out)? {
                return Ok(QuickRead::Done);
            }
            let generation = Arc::clone(&generation);
            return Ok(QuickRead::Cold(ColdRead { generation, offset, len: out.len() }));
        }
        let mut read = QuickRead::Done;
        generation.read(offset, out, &FetchedChunks::new(), &mut |_| {
            read = QuickRead::NeedsAsync;
            Go::Stop
        })?;
        Ok(read)
    }
}

impl Generation {
    /// Whether the delta holds the whole range. Once it does, it does for ever.
    fn is_local(&self, offset: u64, len: usize) -> bool {
        self.shape.pieces(offset, len as u64).all(|piece| {
            let touched = self.shape.touched(piece);
            self.map.run(piece.chunk, touched) == (true, touched.end)
        })
    }

    /// Reads what is on this host and in `fetched`; shows the chunks of the base that are missing
    /// (once each), and leaves their part of `out` as it is.
    pub(super) fn read(
        &self,
        offset: u64,
        out: &mut [u8],
        fetched: &FetchedChunks,
        missing: &mut dyn FnMut(u64) -> Go,
    ) -> Result<(), DiskError> {
        let mut local = Run::default();
        let mut piece_start = 0;
        for piece in self.shape.pieces(offset, out.len() as u64) {
            let touched = self.shape.touched(piece);
            let mut first = touched.first;
            let mut reported = false;
            while first < touched.end {
                let run = Sectors { first, end: touched.end };
                let (present, end) = self.map.run(piece.chunk, run);
                let part = within(piece, Sectors { first, end });
                let (start, len) = (piece_start + part.start, part.len);
                first = end;
                if present {
                    // Directly behind what is in the run already.
                    local.len += len;
                    continue;
                }
                self.read_delta(offset, out, &local)?;
                local = Run { start: start + len, len: 0 };
                let at = piece.within + part.start as u64;
                let to = &mut out[start..start + len];
                if !self.read_base(piece.chunk, at, to, fetched)? && !reported {
                    reported = true;
                    if missing(piece.chunk) == Go::Stop {
                        return Ok(());
                    }
                }
            }
            piece_start += piece.len as usize;
        }
        self.read_delta(offset, out, &local)
    }

    fn read_delta(&self, offset: u64, out: &mut [u8], run: &Run) -> Result<(), DiskError> {
        if run.len == 0 {
            return Ok(());
        }
        self.delta.read(offset + run.start as u64, &mut out[run.start..run.start + run.len])
    }

    /// `false`: the chunk is not here.
    fn read_base(
        &self,
        chunk: u64,
        within: u64,
        out: &mut [u8],
        fetched: &FetchedChunks,
    ) -> Result<bool, DiskError> {
        match fetched.get(&chunk) {
            Some(None) => out.fill(0),
            Some(Some(whole)) => {
                self.check_fetched(chunk, whole)?;
                out.copy_from_slice(&whole[within as usize..within as usize + out.len()]);
            }
            None => {
                let local = self.base.read_local(chunk, within, out);
                return local.map_err(|error| self.base_error(error));
            }
        }
        Ok(true)
    }

    /// Reads everything; fetches what is missing, all at once.
    pub(super) async fn read_all(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, DiskError> {
        let mut fetched = FetchedChunks::new();
        loop {
            let generation = Arc::clone(&self);
            let read = move || {
                let mut out = vec![0; len];
                let mut missing = Vec::new();
                generation.read(offset, &mut out, &fetched, &mut |chunk| {
                    missing.push(chunk);
                    Go::On
                })?;
                Ok((out, missing, fetched))
            };
            let (out, missing, mut have) = self.common.blocking(read).await?;
            if missing.is_empty() {
                return Ok(out.into());
            }
            let fetches = missing.iter().map(|chunk| self.base.fetch(*chunk));
            let chunks = try_join_all(fetches).await.map_err(|error| self.base_error(error))?;
            have.extend(missing.into_iter().zip(chunks));
            fetched = have;
        }
    }
}

/// What to do after a chunk that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Go {
    On,
    Stop,
}

/// A part of a piece, relative to the piece.
struct Part {
    start: usize,
    len: usize,
}

/// The part of `piece` that is in `sectors`.
fn within(piece: Piece, sectors: Sectors) -> Part {
    let piece_start = piece.within as usize;
    let from = (sectors.first * SECTOR).max(piece_start);
    let to = (sectors.end * SECTOR).min(piece_start + piece.len as usize);
    Part { start: from - piece_start, len: to - from }
}
