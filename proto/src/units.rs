//! Sizes and ranges, in bytes unless a name says otherwise.

use std::fmt;

/// The unit of the local maps: what a guest's file system writes at the least.
pub const SECTOR_SIZE: u64 = 4096;

/// The largest image: 8 TiB, which keeps a local map under 2 GiB at the smallest chunk size.
pub const IMAGE_SIZE_MAX: u64 = 8 << 40;

/// The size of an image's chunks: a power of two from 64 KiB to 4 MiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize(u32);

/// A chunk size that is not a power of two from 64 KiB to 4 MiB.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("chunk size {0} is not a power of two from {min} to {max}", min = ChunkSize::MIN.0, max = ChunkSize::MAX.0)]
pub struct ChunkSizeError(pub u64);

impl ChunkSize {
    /// 64 KiB.
    pub const MIN: Self = Self(64 << 10);
    /// 4 MiB.
    pub const MAX: Self = Self(4 << 20);
    /// 256 KiB.
    pub const DEFAULT: Self = Self(256 << 10);

    /// Checks a size in bytes.
    ///
    /// # Errors
    /// When it is not a power of two in range.
    pub fn new(bytes: u64) -> Result<Self, ChunkSizeError> {
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && (Self::MIN.0..=Self::MAX.0).contains(&size) => {
                Ok(Self(size))
            }
            _ => Err(ChunkSizeError(bytes)),
        }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// In bytes, for slicing.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no chunk size is zero")]
    pub const fn len(self) -> usize {
        self.0 as usize
    }

    /// 4 KiB sectors in a chunk: 16 to 1024.
    #[must_use]
    pub const fn sectors(self) -> u64 {
        self.bytes() / SECTOR_SIZE
    }

    /// How many chunks an image of `size_bytes` has; the last may be partly beyond its end.
    #[must_use]
    pub const fn chunks_in(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.bytes())
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Debug for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}KiB", self.0 >> 10)
    }
}

/// `start..start + len` of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// The first byte behind the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Splits the range at chunk borders: `(chunk index, range within that chunk)`.
    pub fn by_chunk(self, chunk_size: ChunkSize) -> impl Iterator<Item = (u64, ByteRange)> {
        let size = chunk_size.bytes();
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end() {
                return None;
            }
            let within = at % size;
            let len = (size - within).min(self.end() - at);
            let piece = (at / size, ByteRange { start: within, len });
            at += len;
            Some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_size_accepts_only_powers_of_two_in_range() {
        for ok in [64 << 10, 256 << 10, 4 << 20] {
            assert_eq!(ChunkSize::new(ok).unwrap().bytes(), ok);
        }
        for bad in [0, 1, 65 << 10, 32 << 10, 8 << 20, u64::MAX] {
            assert_eq!(ChunkSize::new(bad), Err(ChunkSizeError(bad)));
        }
    }

    proptest::proptest! {
        #[test]
        fn by_chunk_covers_the_range_once(start in 0u64..1 << 21, len in 0u64..1 << 21) {
            let range = ByteRange { start, len };
            let mut at = start;
            for (index, piece) in range.by_chunk(ChunkSize::MIN) {
                assert_eq!(index * ChunkSize::MIN.bytes() + piece.start, at);
                assert!(piece.len > 0 && piece.end() <= ChunkSize::MIN.bytes());
                at += piece.len;
            }
            assert_eq!(at, range.end());
        }
    }
}
