//! Writes.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::aside::{Aside, Room};
use super::epochs::Belongs;
use super::generation::Generation;
use super::shape::{Piece, SECTOR, Sectors};
use super::strategy::Saved;
use super::stripes::Stripe;
use super::{DiskError, upstreams};

/// A chunk of the base that was fetched for a write into a sector of it.
#[derive(Debug, Clone)]
pub(super) struct Fetched {
    /// Of which generation's base.
    pub(super) generation: u64,
    pub(super) chunk: u64,
    /// `None`: zeros.
    pub(super) bytes: Option<Bytes>,
}

/// How far a request got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// The rest needs this chunk of the base.
    NeedsChunk {
        done: u64,
        chunk: u64,
    },
    /// The rest needs room for a copy aside.
    NeedsRoom {
        done: u64,
    },
    /// The rest would take long.
    Long {
        done: u64,
    },
}

/// How far one piece got: all or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Done,
    NeedsChunk,
    NeedsRoom,
}

impl Step {
    /// What it means for a request of which `done` bytes are done; `None`: go on.
    pub(super) const fn stop(self, done: u64, chunk: u64) -> Option<Progress> {
        match self {
            Self::Done => None,
            Self::NeedsChunk => Some(Progress::NeedsChunk { done, chunk }),
            Self::NeedsRoom => Some(Progress::NeedsRoom { done }),
        }
    }
}

/// The whole sectors to write in place of a piece's partial ones.
#[derive(Default)]
struct Edges {
    head: Option<[u8; SECTOR]>,
    tail: Option<[u8; SECTOR]>,
}

impl Generation {
    /// Writes `data`; stops at the first chunk that needs something which is not here.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        fetched: Option<&Fetched>,
        room: Room,
    ) -> Result<Progress, DiskError> {
        let mut done = 0;
        for piece in self.shape.pieces(offset, data.len() as u64) {
            let part = &data[done..done + piece.len as usize];
            let step = self.write_piece(piece, part, fetched, room)?;
            if let Some(stopped) = step.stop(done as u64, piece.chunk) {
                return Ok(stopped);
            }
            done += part.len();
        }
        Ok(Progress::Done)
    }

    fn write_piece(
        &self,
        piece: Piece,
        data: &[u8],
        fetched: Option<&Fetched>,
        room: Room,
    ) -> Result<Step, DiskError> {
        let chunk = piece.chunk;
        let mut stripe = self.stripes.lock(chunk);
        self.check()?;
        self.map.reserve(chunk)?;
        let Some(edges) = self.edges(piece, data, fetched)? else { return Ok(Step::NeedsChunk) };
        let touched = self.shape.touched(piece);
        if !self.prepare(&mut stripe, chunk, touched, room)? {
            return Ok(Step::NeedsRoom);
        }
        let written = self.write_sectors(piece, data, &edges);
        self.changed(chunk, touched, written)
    }

    fn write_sectors(&self, piece: Piece, data: &[u8], edges: &Edges) -> Result<(), DiskError> {
        let touched = self.shape.touched(piece);
        let last = Sectors { first: touched.end - 1, end: touched.end };
        let (mut from, mut to) = (0, data.len());
        if let Some(head) = &edges.head {
            self.delta.write(self.at(piece.chunk, touched.start_byte() as u64), head)?;
            from = to.min(SECTOR - piece.within as usize % SECTOR);
        }
        if let Some(tail) = &edges.tail {
            self.delta.write(self.at(piece.chunk, last.start_byte() as u64), tail)?;
            to = last.start_byte() - piece.within as usize;
        }
        if from < to {
            self.delta.write(self.at(piece.chunk, piece.within + from as u64), &data[from..to])?;
        }
        Ok(())
    }

    /// Completes the partial sectors of a piece that the delta does not hold. `None`: that needs
    /// the chunk of the base, which is not here.
    fn edges(
        &self,
        piece: Piece,
        data: &[u8],
        fetched: Option<&Fetched>,
    ) -> Result<Option<Edges>, DiskError> {
        let (touched, covered) = (self.shape.touched(piece), self.shape.covered(piece));
        let mut edges = Edges::default();
        let partial = |sector: usize| {
            let whole = covered.first <= sector && sector < covered.end;
            !whole && !self.map.is_present(piece.chunk, sector)
        };
        let complete = |sector: usize| -> Result<Option<[u8; SECTOR]>, DiskError> {
            let Some(mut bytes) = self.base_sector(piece.chunk, sector, fetched)? else {
                return Ok(None);
            };
            let start = sector * SECTOR;
            let from = (piece.within as usize).max(start);
            let to = (piece.within as usize + data.len()).min(start + SECTOR);
            let part = &data[from - piece.within as usize..to - piece.within as usize];
            bytes[from - start..to - start].copy_from_slice(part);
            Ok(Some(bytes))
        };
        let (first, last) = (touched.first, touched.end - 1);
        if partial(first) {
            let Some(head) = complete(first)? else { return Ok(None) };
            edges.head = Some(head);
        }
        if last != first && partial(last) {
            let Some(tail) = complete(last)? else { return Ok(None) };
            edges.tail = Some(tail);
        }
        Ok(Some(edges))
    }

    /// One sector of the base; `None`: it is not here.
    fn base_sector(
        &self,
        chunk: u64,
        sector: usize,
        fetched: Option<&Fetched>,
    ) -> Result<Option<[u8; SECTOR]>, DiskError> {
        let mut bytes = [0; SECTOR];
        let start = sector * SECTOR;
        match fetched.filter(|f| f.generation == self.number && f.chunk == chunk) {
            Some(Fetched { bytes: None, .. }) => return Ok(Some(bytes)),
            Some(Fetched { bytes: Some(whole), .. }) => {
                self.check_fetched(chunk, whole)?;
                bytes.copy_from_slice(&whole[start..start + SECTOR]);
                return Ok(Some(bytes));
            }
            None => {}
        }
        let local = self.base.read_local(chunk, start as u64, &mut bytes);
        Ok(local.map_err(|error| self.base_error(error))?.then_some(bytes))
    }

    /// A base that returns less than a chunk must not become zeros in somebody's file.
    pub(super) fn check_fetched(&self, chunk: u64, bytes: &Bytes) -> Result<(), DiskError> {
        if bytes.len() == self.shape.chunk_size.len() {
            return Ok(());
        }
        let reason = format!("{} bytes came instead of a whole chunk", bytes.len());
        Err(self.base_error(upstreams::lost(chunk, reason)))
    }

    /// Makes sectors of a chunk ready to be changed: the chunk is on the dirty list afterwards, and what
    /// pending snapshots still need of the sectors is aside (algorithm 4 of the paper). Its lock must be
    /// held until the change is done. `false`: there is no room for a copy; nothing was changed.
    pub(super) fn prepare(
        &self,
        stripe: &mut Stripe,
        chunk: u64,
        touched: Sectors,
        room: Room,
    ) -> Result<bool, DiskError> {
        // An earlier change may have copied other sectors only.
        for aside in stripe.asides.get_mut(&chunk).into_iter().flatten() {
            if !aside.save(&self.copier(), chunk, touched, room)? {
                return Ok(false);
            }
        }
        let mark = self.map.mark(chunk);
        if self.epochs.is_dirty(mark) {
            return Ok(true);
        }
        let belongs = self.epochs.belongs(mark);
        if belongs == Belongs::Dirty {
            return Ok(true);
        }
        let old = match self.save(chunk, touched, belongs, room)? {
            Saved::NoRoom => return Ok(false),
            Saved::Nothing => None,
            Saved::Copy(old) => Some(old),
        };
        let (epoch, pending) = self.epochs.make_dirty(&self.map, chunk, mark);
        if let Some(old) = old {
            let aside = Aside::new(mark.epoch, epoch, old);
            // The snapshot may have become stable while the copy was made.
            if aside.is_needed(&pending) {
                stripe.asides.entry(chunk).or_default().push(aside);
            }
        }
        Ok(true)
    }

    /// Ends a change of sectors: when it succeeded, the delta holds them now. The chunk's lock is
    /// still held: whoever finds the sectors present under it can rely on their being on the list
    /// of changes too.
    pub(super) fn changed(
        &self,
        chunk: u64,
        sectors: Sectors,
        done: Result<(), DiskError>,
    ) -> Result<Step, DiskError> {
        if done.is_ok() {
            let added = self.map.add_present(chunk, sectors);
            if added > 0 {
                self.local_sectors.fetch_add(u64::from(added), Ordering::Relaxed);
                self.stripes.changed(chunk);
            }
        }
        // Last of all, or a flush in between would think that it has seen this change. Also when
        // it failed half-way: what can be read now must not be gone after a flush.
        self.flusher.touched();
        done.map(|()| Step::Done)
    }
}
