//! The old bytes of a chunk, copied sector by sector as they are overwritten.
//!
//! *Invariant.* Each sector that the delta held at a snapshot's cut is either here or in the delta as
//! it was then: it is copied before it changes, both under the chunk's lock. So the delta as it is read
//! at any time, with what is here *after* that put over it, is the chunk as of the cut.

use std::sync::Arc;

use bytes::Bytes;

use super::budget::Share;
use super::buffers::Buffer;
use super::content::Content;
use super::map::Map;
use super::shape::{SECTOR, Sectors, run_of_bits};

/// Neighbouring sectors, copied at once.
#[derive(Debug)]
struct Piece {
    first: usize,
    bytes: Buffer,
    _share: Share,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

/// A piece whose bytes somebody has.
struct Held(Arc<Piece>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// What was copied of a chunk so far.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    /// What the delta held at the cut.
    present: Vec<Sectors>,
    /// A bit for each of those sectors that did not change since.
    unchanged: Vec<u64>,
    pieces: Vec<Arc<Piece>>,
}

impl Parts {
    /// Nothing is copied yet, and nothing of the chunk has changed since the cut: its lock must be held.
    pub(super) fn of(map: &Map, chunk: u64) -> Self {
        let (present, unchanged) = (map.present_runs(chunk), map.presence(chunk).collect());
        Self { present, unchanged, pieces: Vec::new() }
    }

    /// What the delta held at the cut.
    pub(super) fn present(&self) -> &[Sectors] {
        &self.present
    }

    /// Whether nothing of it is in the delta alone.
    pub(super) fn are_all(&self) -> bool {
        self.unchanged.iter().all(|word| *word == 0)
    }

    /// The first of the sectors that are to be copied before `touched` is changed.
    pub(super) fn missing(&self, touched: Sectors) -> Option<Sectors> {
        let run =
            |from| run_of_bits(|index| self.unchanged[index], Sectors { first: from, ..touched });
        let (unchanged, end) = run(touched.first);
        let first = if unchanged { touched.first } else { end };
        let end = if unchanged { end } else { run(end).1 };
        (first < end).then_some(Sectors { first, end })
    }

    /// The old bytes of sectors that were missing.
    pub(super) fn add(&mut self, sectors: Sectors, bytes: Buffer, share: Share) {
        for sector in sectors.first..sectors.end {
            self.unchanged[sector / 64] &= !(1 << (sector % 64));
        }
        self.pieces.push(Arc::new(Piece { first: sectors.first, bytes, _share: share }));
    }

    /// Puts what is here over what was read of the delta, packed, and makes the chunk as of the cut of
    /// it. What is here must have been taken after that was read.
    pub(super) fn over(self, mut read: Vec<u8>) -> Content {
        self.put_over(&mut read);
        Content::of(self.present, read.into())
    }

    /// As [`Self::over`], where the delta held a hole.
    pub(super) fn over_zeros(self) -> Content {
        let zeros = vec![0; self.bytes()];
        self.over(zeros)
    }

    /// As [`Self::over`], in place.
    pub(super) fn put_over(&self, packed: &mut [u8]) {
        for piece in &self.pieces {
            let at = self.packed_at(piece.first);
            packed[at..at + piece.bytes().len()].copy_from_slice(piece.bytes());
        }
    }

    /// The chunk as of the cut; [`Self::are_all`] must hold. What was copied at once is handed on, and
    /// is no longer of the memory for copies: whoever sends it is bounded by itself.
    pub(super) fn whole(mut self) -> Content {
        let len = self.bytes();
        match self.pieces.pop_if(|piece| piece.bytes().len() == len).map(Arc::try_unwrap) {
            None => self.over_zeros(),
            Some(Ok(piece)) => Content::of(self.present, Bytes::from_owner(piece.bytes)),
            Some(Err(shared)) => Content::of(self.present, Bytes::from_owner(Held(shared))),
        }
    }

    /// Where a sector is among those that the delta held, in bytes.
    fn packed_at(&self, sector: usize) -> usize {
        let mut at = 0;
        for run in &self.present {
            if sector < run.end {
                return at + (sector - run.first) * SECTOR;
            }
            at += run.bytes();
        }
        at
    }

    /// Bytes that the delta held at the cut.
    pub(super) fn bytes(&self) -> usize {
        self.present.iter().map(|run| run.bytes()).sum()
    }

    /// Bytes of memory in use.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes().len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::budget::Budgets;
    use super::*;

    const fn s(first: usize, end: usize) -> Sectors {
        Sectors { first, end }
    }

    /// Sectors 2 to 5 and 60 to 70 of a chunk.
    fn parts() -> Parts {
        let unchanged = vec![0b11_1100 | 0xf << 60, 0b11_1111];
        Parts { present: vec![s(2, 6), s(60, 70)], unchanged, pieces: Vec::new() }
    }

    fn add(budgets: &Arc<Budgets>, parts: &mut Parts, sectors: Sectors, byte: u8) {
        let share = budgets.take_memory(sectors.bytes() as u64).unwrap();
        let bytes = budgets.buffers().add(vec![byte; sectors.bytes()]);
        parts.add(sectors, bytes, share);
    }

    #[test]
    fn what_was_not_in_the_delta_or_is_here_is_not_copied() {
        let (budgets, mut parts) = (Budgets::new(1 << 20, 0), parts());
        assert_eq!(parts.missing(s(0, 2)), None);
        assert_eq!(parts.missing(s(0, 4)), Some(s(2, 4)));
        assert_eq!(parts.missing(s(3, 100)), Some(s(3, 6)));
        assert_eq!(parts.missing(s(6, 100)), Some(s(60, 70)));
        add(&budgets, &mut parts, s(62, 65), 1);
        assert_eq!(parts.missing(s(6, 100)), Some(s(60, 62)));
        assert_eq!(parts.missing(s(62, 100)), Some(s(65, 70)));
        assert_eq!(parts.missing(s(62, 65)), None);
        assert_eq!(parts.memory_bytes(), 3 * SECTOR as u64);
    }

    #[test]
    fn pieces_are_put_where_they_were() {
        let (budgets, mut parts) = (Budgets::new(1 << 20, 0), parts());
        add(&budgets, &mut parts, s(3, 5), 3);
        add(&budgets, &mut parts, s(62, 65), 6);
        assert!(!parts.are_all());
        let mut packed = vec![0; parts.bytes()];
        parts.put_over(&mut packed);
        let of_sectors: Vec<u8> = packed.chunks(SECTOR).map(|sector| sector[7]).collect();
        assert_eq!(of_sectors, [0, 3, 3, 0, 0, 0, 6, 6, 6, 0, 0, 0, 0, 0]);
        for rest in [s(2, 3), s(5, 6), s(60, 62), s(65, 70)] {
            add(&budgets, &mut parts, rest, 9);
        }
        assert!(parts.are_all());
        let mut chunk = vec![0; 70 * SECTOR];
        parts.whole().unpack(&mut chunk).unwrap();
        assert_eq!((chunk[2 * SECTOR], chunk[3 * SECTOR], chunk[69 * SECTOR]), (9, 3, 9));
    }

    #[test]
    fn a_chunk_that_was_copied_at_once_is_not_copied_again() {
        let mut parts = Parts { present: vec![s(0, 16)], unchanged: vec![0xffff], pieces: vec![] };
        let budgets = Budgets::new(1 << 20, 0);
        add(&budgets, &mut parts, s(0, 16), 5);
        let at = parts.pieces[0].bytes().as_ptr();
        // A snapshot behind this one may need it, too.
        let shared = parts.clone().whole().whole(16 * SECTOR).unwrap();
        assert_eq!((shared.as_ptr(), shared[0]), (at, 5));
        drop(shared);
        let whole = parts.whole().whole(16 * SECTOR).unwrap();
        assert_eq!((whole.as_ptr(), whole[0]), (at, 5));
        assert_eq!(budgets.memory().used(), 0, "while it is sent there is room for others");
    }
}
