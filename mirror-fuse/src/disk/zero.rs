//! Discard and write-zeroes: whole sectors become holes of the delta that count as present.

use super::DiskError;
use super::Zero;
use super::aside::{Room, ZEROS};
use super::generation::Generation;
use super::shape::{Piece, SECTOR, Sectors};
use super::write::{Fetched, Progress, Step};

/// Chunks that one call changes at most, so that the discard of a whole disk does not hold a
/// thread of the front end: a hole costs some microseconds.
pub(super) const CHUNKS_AT_ONCE: usize = 64;

impl Generation {
    /// Zeros a range; stops at the first chunk that needs something which is not here, and after
    /// `chunks` changed chunks.
    pub(super) fn zero(
        &self,
        offset: u64,
        len: u64,
        how: Zero,
        fetched: Option<&Fetched>,
        room: Room,
    ) -> Result<Progress, DiskError> {
        let mut done = 0;
        let mut changed = 0;
        for piece in self.shape.pieces(offset, len) {
            if changed == CHUNKS_AT_ONCE {
                return Ok(Progress::Long { done });
            }
            let step = self.zero_piece(piece, how, fetched, room, &mut changed)?;
            if let Some(stopped) = step.stop(done, piece.chunk) {
                return Ok(stopped);
            }
            done += piece.len;
        }
        Ok(Progress::Done)
    }

    fn zero_piece(
        &self,
        piece: Piece,
        how: Zero,
        fetched: Option<&Fetched>,
        room: Room,
        changed: &mut usize,
    ) -> Result<Step, DiskError> {
        if self.reads_zeros(piece.chunk) {
            return Ok(Step::Done);
        }
        *changed += 1;
        let covered = self.shape.covered(piece);
        if how == Zero::WriteZeroes {
            // Not more than two partial sectors.
            for edge in edges(piece, covered) {
                let zeros = &ZEROS[..edge.len as usize];
                let offset = self.at(edge.chunk, edge.within);
                match self.write(offset, zeros, fetched, room)? {
                    Progress::NeedsChunk { .. } => return Ok(Step::NeedsChunk),
                    Progress::NeedsRoom { .. } => return Ok(Step::NeedsRoom),
                    Progress::Done | Progress::Long { .. } => {}
                }
            }
        }
        if covered.is_empty() { Ok(Step::Done) } else { self.punch(piece.chunk, covered, room) }
    }

    /// Whether the whole chunk reads as zeros without anything in the delta saying so.
    fn reads_zeros(&self, chunk: u64) -> bool {
        // No lock: a write that comes meanwhile is not ordered with this request anyway.
        self.base.may_have_data(chunk) == Some(false)
            && self.map.presence(chunk).all(|word| word == 0)
    }

    fn punch(&self, chunk: u64, sectors: Sectors, room: Room) -> Result<Step, DiskError> {
        let mut stripe = self.stripes.lock(chunk);
        self.check()?;
        self.map.reserve(chunk)?;
        if !self.prepare(&mut stripe, chunk, sectors, room)? {
            return Ok(Step::NeedsRoom);
        }
        // Before the presence bits: the delta may hold rubbish where nothing is present, left by a
        // write that the host interrupted.
        let start = self.at(chunk, sectors.start_byte() as u64);
        let punched = self.delta.punch(start, sectors.bytes() as u64);
        self.changed(chunk, sectors, punched)
    }
}

/// The parts of `piece` before and behind the sectors that it covers whole.
fn edges(piece: Piece, covered: Sectors) -> impl Iterator<Item = Piece> {
    let end = piece.within + piece.len;
    let (mut head, mut tail) = (0, 0);
    if covered.is_empty() {
        // Within one sector, or the end of one and the begin of the next.
        let border = (piece.within + 1).next_multiple_of(SECTOR as u64).min(end);
        head = border - piece.within;
        tail = end - border;
    } else {
        head += covered.start_byte() as u64 - piece.within;
        tail += end.saturating_sub((covered.end * SECTOR) as u64);
    }
    let edge = move |within, len| Piece { chunk: piece.chunk, within, len };
    [edge(piece.within, head), edge(end - tail, tail)].into_iter().filter(|edge| edge.len > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::shape::Shape;
    use blobcr_proto::ChunkSize;

    proptest::proptest! {
        #[test]
        fn edges_and_covered_sectors_make_up_the_piece(
            size in 1u64..130_000, from in 0u64..130_000, len in 1u64..70_000,
        ) {
            let shape = Shape { size_bytes: size, chunk_size: ChunkSize::MIN };
            let from = from % size;
            let len = len.min(size - from);
            for piece in shape.pieces(from, len) {
                let covered = shape.covered(piece);
                let mut bytes = vec![0; 65536];
                for edge in edges(piece, covered) {
                    proptest::prop_assert!(edge.len < 4096);
                    let at = edge.within as usize;
                    bytes[at..at + edge.len as usize].iter_mut().for_each(|byte| *byte += 1);
                }
                if !covered.is_empty() {
                    let end = (covered.end * SECTOR).min(shape.chunk_len(piece.chunk));
                    bytes[covered.start_byte()..end].iter_mut().for_each(|byte| *byte += 1);
                }
                for (at, count) in bytes.iter().enumerate() {
                    let inside = (piece.within..piece.within + piece.len).contains(&(at as u64));
                    proptest::prop_assert_eq!(*count, u8::from(inside), "byte {} of {:?}", at, piece);
                }
            }
        }
    }
}
