//! A set of chunks that only grows.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words that are made together, when the first chunk among theirs is added: 8 GiB of 256 KiB chunks,
/// one page.
const SEGMENT_WORDS: usize = 512;
const SEGMENT_CHUNKS: u64 = SEGMENT_WORDS as u64 * 64;

type Segment = Box<[AtomicU64]>;

/// Adding and looking take no lock; only the first chunk of a segment allocates.
#[derive(Debug)]
pub(super) struct ChunkSet(Box<[OnceLock<Segment>]>);

/// Where a chunk is: segment, word, bit.
const fn place(chunk: u64) -> (usize, usize, u64) {
    let within = chunk % SEGMENT_CHUNKS;
    ((chunk / SEGMENT_CHUNKS) as usize, (within / 64) as usize, 1 << (within % 64))
}

impl ChunkSet {
    /// For chunks below `chunks`.
    pub(super) fn new(chunks: u64) -> Self {
        Self((0..chunks.div_ceil(SEGMENT_CHUNKS)).map(|_| OnceLock::new()).collect())
    }

    pub(super) fn contains(&self, chunk: u64) -> bool {
        let (segment, word, bit) = place(chunk);
        let segment = self.0.get(segment).and_then(OnceLock::get);
        segment.is_some_and(|words| words[word].load(Ordering::Relaxed) & bit != 0)
    }

    /// Whether it was not there. What is beyond the last chunk never is.
    pub(super) fn insert(&self, chunk: u64) -> bool {
        let (segment, word, bit) = place(chunk);
        let Some(segment) = self.0.get(segment) else { return false };
        let make = || (0..SEGMENT_WORDS).map(|_| AtomicU64::new(0)).collect();
        segment.get_or_init(make)[word].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    pub(super) fn count(&self) -> u64 {
        self.count_in(self)
    }

    /// How many are in the other one, too, which is for as many chunks.
    pub(super) fn count_in(&self, other: &Self) -> u64 {
        let both = self.0.iter().zip(&other.0).filter_map(|(a, b)| a.get().zip(b.get()));
        let words = both.flat_map(|(a, b)| a.iter().zip(b.iter()));
        let get = |word: &AtomicU64| word.load(Ordering::Relaxed);
        words.map(|(a, b)| u64::from((get(a) & get(b)).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_was_added_and_counts_it() {
        let (set, other) = (ChunkSet::new(100_000), ChunkSet::new(100_000));
        let chunks = [0, 63, 64, 32_767, 32_768, 99_999];
        for chunk in chunks {
            assert!(!set.contains(chunk) && set.insert(chunk) && !set.insert(chunk));
            assert!(set.contains(chunk));
        }
        assert!(!set.contains(1) && !set.contains(65) && !set.contains(70_000));
        assert_eq!((set.count(), set.count_in(&other)), (6, 0));
        for chunk in [63, 65, 99_999] {
            other.insert(chunk);
        }
        assert_eq!((set.count_in(&other), other.count_in(&set)), (2, 2));
        assert!(!set.insert(1 << 40) && !set.contains(1 << 40));
    }
}
