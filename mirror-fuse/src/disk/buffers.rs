//! Memory for copies aside that is kept once it was used. A host gives memory page by page, each when
//! it is touched first, and that takes longer than the copy itself; and copies come all at once, right
//! behind a COMMIT, with guests' writes waiting for each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The smallest chunk: less is not worth to be kept.
const LEAST: usize = 64 << 10;

/// Buffers that nobody uses just now.
#[derive(Debug)]
pub(super) struct Buffers {
    /// Bytes that are kept at most.
    most: u64,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// By length.
    buffers: BTreeMap<usize, Vec<Vec<u8>>>,
    bytes: u64,
}

/// A buffer that goes back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

impl Buffers {
    /// Keeps so many bytes at most.
    pub(super) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, free: Mutex::default() })
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` bytes, whatever is in them.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let kept = {
            let mut free = self.free();
            let kept = free.buffers.get_mut(&len).and_then(Vec::pop);
            free.bytes -= kept.as_ref().map_or(0, |bytes| bytes.len() as u64);
            kept
        };
        let bytes = kept.unwrap_or_else(|| vec![0; len]);
        Buffer { bytes, home: Arc::clone(self) }
    }

    fn put_back(&self, bytes: Vec<u8>) {
        // Whole chunks: what is copied of others has any length.
        if bytes.len() < LEAST || !bytes.len().is_power_of_two() {
            return;
        }
        let mut free = self.free();
        let together = free.bytes + bytes.len() as u64;
        if together <= self.most {
            free.bytes = together;
            free.buffers.entry(bytes.len()).or_default().push(bytes);
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.put_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(buffers: &Buffers) -> (u64, usize) {
        let free = buffers.free();
        (free.bytes, free.buffers.values().flatten().map(Vec::len).sum())
    }

    #[test]
    fn a_buffer_is_handed_out_again() {
        let buffers = Buffers::new(1 << 20);
        let mut first = buffers.take(LEAST);
        first.as_mut().fill(1);
        let at = first.as_ref().as_ptr();
        drop(first);
        assert_eq!(kept(&buffers), (LEAST as u64, LEAST));
        let other = buffers.take(2 * LEAST);
        assert_ne!(other.as_ref().as_ptr(), at);
        let again = buffers.take(LEAST);
        assert_eq!((again.as_ref().as_ptr(), again.as_ref().len()), (at, LEAST));
        assert_eq!(kept(&buffers), (0, 0));
    }

    #[test]
    fn no_more_is_kept_than_was_said() {
        let buffers = Buffers::new(3 * LEAST as u64);
        let taken: Vec<_> = [LEAST, LEAST, 2 * LEAST, LEAST].map(|len| buffers.take(len)).into();
        drop(taken);
        assert_eq!(kept(&buffers), (3 * LEAST as u64, 3 * LEAST));
        let none = Buffers::new(0);
        drop(none.take(LEAST));
        assert_eq!(kept(&none), (0, 0));
    }

    #[test]
    fn parts_of_chunks_are_not_kept() {
        let buffers = Buffers::new(1 << 20);
        drop(buffers.take(LEAST / 2));
        drop(buffers.take(3 * LEAST));
        assert_eq!(kept(&buffers), (0, 0));
    }
}
