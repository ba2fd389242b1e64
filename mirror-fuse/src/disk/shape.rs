//! Sizes of a disk, and where its sectors and chunks are.

use blobcr_proto::name::NAME_BYTES_MAX;
use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::{ChunkSize, Hash, SECTOR_SIZE, v1};

use super::{DiskError, DiskSpec};

/// Bytes of a sector, for slicing.
pub(super) const SECTOR: usize = SECTOR_SIZE as usize;

/// The shape of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) size_bytes: u64,
    pub(super) chunk_size: ChunkSize,
}

/// A piece of a request within one chunk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) chunk: u64,
    /// Where it begins in the chunk.
    pub(super) within: u64,
    pub(super) len: u64,
}

/// Sectors of one chunk: `first..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sectors {
    pub(super) first: usize,
    pub(super) end: usize,
}

impl Sectors {
    pub(super) const fn is_empty(self) -> bool {
        self.first >= self.end
    }

    /// Bytes from the chunk's begin to the first sector.
    pub(super) const fn start_byte(self) -> usize {
        self.first * SECTOR
    }

    pub(super) const fn bytes(self) -> usize {
        (self.end - self.first) * SECTOR
    }
}

/// Of a bit for each sector, in words of 64: the first one of `sectors`, and the first sector up to
/// their end whose bit is another.
pub(super) fn run_of_bits(word: impl Fn(usize) -> u64, sectors: Sectors) -> (bool, usize) {
    let bits = u64::BITS as usize;
    let mut at = sectors.first;
    let mut found = None;
    while at < sectors.end {
        let rest = word(at / bits) >> (at % bits);
        let bit = *found.get_or_insert(rest & 1 == 1);
        let same = if bit { rest.trailing_ones() } else { rest.trailing_zeros() } as usize;
        let left = bits - at % bits;
        at += same.min(left);
        if same < left {
            break;
        }
    }
    (found.unwrap_or(false), at.min(sectors.end))
}

impl Shape {
    pub(super) fn of(spec: &DiskSpec) -> Result<Self, DiskError> {
        let invalid = |detail: String| DiskError::Invalid { disk: spec.name.to_string(), detail };
        let root = &spec.source.root;
        let chunk_size = ChunkSize::new(u64::from(root.chunk_size))
            .map_err(|error| invalid(error.to_string()))?;
        if spec.size_bytes > IMAGE_SIZE_MAX {
            return Err(invalid(format!(
                "{} bytes are more than the {IMAGE_SIZE_MAX} that a disk may have",
                spec.size_bytes
            )));
        }
        if spec.size_bytes < root.size_bytes {
            return Err(invalid(format!(
                "{} bytes are fewer than the {} of its snapshot; a disk is never cut",
                spec.size_bytes, root.size_bytes
            )));
        }
        let shape = Self { size_bytes: spec.size_bytes, chunk_size };
        shape.check_root(root).map_err(invalid)?;
        if spec.source.image.len() > NAME_BYTES_MAX {
            return Err(invalid("the name of its image is longer than any name".into()));
        }
        Ok(shape)
    }

    /// Refuses a tree that cannot be below this disk, whoever it came from.
    pub(super) fn check_root(self, root: &v1::TreeRoot) -> Result<(), String> {
        let known = root.node.is_empty() || root.node.len() == Hash::LEN;
        if !known || u64::from(root.chunk_size) != self.chunk_size.bytes() {
            return Err("the snapshot's tree is not one of this disk's chunk size".into());
        }
        if root.size_bytes > self.size_bytes {
            return Err(format!("the snapshot has {} bytes, more than the disk", root.size_bytes));
        }
        Ok(())
    }

    pub(super) const fn chunks(self) -> u64 {
        self.chunk_size.chunks_in(self.size_bytes)
    }

    pub(super) const fn chunk_start(self, chunk: u64) -> u64 {
        chunk * self.chunk_size.bytes()
    }

    /// Bytes of the chunk that are on the disk: all but for the last chunk.
    pub(super) const fn chunk_len(self, chunk: u64) -> usize {
        let rest = self.size_bytes.saturating_sub(self.chunk_start(chunk));
        if rest < self.chunk_size.bytes() { rest as usize } else { self.chunk_size.len() }
    }

    /// Sectors of the chunk that are on the disk, the last one perhaps only in part.
    pub(super) const fn chunk_sectors(self, chunk: u64) -> usize {
        self.chunk_len(chunk).div_ceil(SECTOR)
    }

    /// The disk's bytes rounded up to whole sectors: the length of the delta file.
    pub(super) const fn delta_len(self) -> u64 {
        self.size_bytes.next_multiple_of(SECTOR_SIZE)
    }

    /// Splits `offset..offset + len` at chunk borders.
    pub(super) fn pieces(self, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let range = blobcr_proto::ByteRange { start: offset, len };
        range.by_chunk(self.chunk_size).map(|(chunk, part)| Piece {
            chunk,
            within: part.start,
            len: part.len,
        })
    }

    /// The sectors that `piece` touches.
    pub(super) const fn touched(self, piece: Piece) -> Sectors {
        Sectors {
            first: (piece.within / SECTOR_SIZE) as usize,
            end: (piece.within + piece.len).div_ceil(SECTOR_SIZE) as usize,
        }
    }

    /// The sectors that `piece` covers whole; a last sector that the disk's end cuts counts as
    /// covered when the piece reaches that end.
    pub(super) const fn covered(self, piece: Piece) -> Sectors {
        let end = piece.within + piece.len;
        let at_end = self.chunk_start(piece.chunk) + end == self.size_bytes;
        Sectors {
            first: piece.within.div_ceil(SECTOR_SIZE) as usize,
            end: if at_end { end.div_ceil(SECTOR_SIZE) } else { end / SECTOR_SIZE } as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { size_bytes: (64 << 10) + 5000, chunk_size: ChunkSize::MIN };

    #[test]
    fn the_last_chunk_is_cut() {
        assert_eq!(SHAPE.chunks(), 2);
        assert_eq!((SHAPE.chunk_len(0), SHAPE.chunk_len(1)), (64 << 10, 5000));
        assert_eq!((SHAPE.chunk_sectors(0), SHAPE.chunk_sectors(1)), (16, 2));
        assert_eq!(SHAPE.delta_len(), (64 << 10) + 8192);
    }

    #[test]
    fn touched_and_covered_differ_in_partial_sectors_only() {
        let piece = |chunk, within, len| Piece { chunk, within, len };
        let both = |p| (SHAPE.touched(p), SHAPE.covered(p));
        let s = |first, end| Sectors { first, end };
        assert_eq!(both(piece(0, 0, 4096)), (s(0, 1), s(0, 1)));
        assert_eq!(both(piece(0, 1, 4096)), (s(0, 2), s(1, 1)));
        assert_eq!(both(piece(0, 4095, 4098)), (s(0, 3), s(1, 2)));
        assert!(SHAPE.covered(piece(0, 10, 20)).is_empty());
        assert_eq!(both(piece(1, 4096, 904)), (s(1, 2), s(1, 2)), "up to the end of the disk");
        assert_eq!(both(piece(1, 4096, 903)), (s(1, 2), s(1, 1)));
    }
}
