//! Reads. They take no lock: the presence bits say for each sector whether it is in the delta, and
//! a bit is set only after the sector's bytes are there.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::try_join_all;

use super::DiskError;
use super::generation::Generation;
use super::shape::{Piece, SECTOR, Sectors};

/// Chunks of the base that were fetched for a read; `None`: zeros.
pub(super) type FetchedChunks = HashMap<u64, Option<Bytes>>;

/// A range of the delta that is still to be read: neighbours are read in one call.
#[derive(Default)]
struct Run {
    /// In `out`.
    start: usize,
    len: usize,
}

impl Generation {
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
