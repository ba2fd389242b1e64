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
    /// Bytes that are kept and used together, at most, as long as no more are used.
    most: u64,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// By length.
    buffers: BTreeMap<usize, Vec<Vec<u8>>>,
    kept: u64,
    used: u64,
}

/// A buffer that goes back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

/// Parts of chunks have any length.
const fn is_worth_keeping(len: usize) -> bool {
    len >= LEAST && len.is_power_of_two()
}

impl Buffers {
    /// Keeps so many bytes at most.
    pub(super) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, free: Mutex::default() })
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` bytes that was kept, with whatever is in it.
    pub(super) fn kept(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        let bytes = is_worth_keeping(len).then(|| self.free().take(len))??;
        Some(Buffer { bytes, home: Arc::clone(self) })
    }

    /// Takes a new one.
    pub(super) fn add(self: &Arc<Self>, bytes: Vec<u8>) -> Buffer {
        if is_worth_keeping(bytes.len()) {
            self.free().add(bytes.len() as u64, self.most);
        }
        Buffer { bytes, home: Arc::clone(self) }
    }

    fn put_back(&self, bytes: Vec<u8>) {
        if is_worth_keeping(bytes.len()) {
            self.free().put_back(bytes, self.most);
        }
    }
}

impl Free {
    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        let found = self.buffers.get_mut(&len)?.pop()?;
        self.kept -= len as u64;
        self.used += len as u64;
        Some(found)
    }

    /// Those of other lengths give way to a new one.
    fn add(&mut self, len: u64, most: u64) {
        self.used += len;
        while self.kept > 0 && self.kept + self.used > most {
            self.drop_one();
        }
    }

    fn drop_one(&mut self) {
        let Some(mut largest) = self.buffers.last_entry() else { return };
        match largest.get_mut().pop() {
            Some(buffer) => self.kept -= buffer.len() as u64,
            None => drop(largest.remove()),
        }
    }

    fn put_back(&mut self, bytes: Vec<u8>, most: u64) {
        let len = bytes.len() as u64;
        self.used -= len;
        if self.kept + self.used + len <= most {
            self.kept += len;
            self.buffers.entry(bytes.len()).or_default().push(bytes);
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

    fn take(buffers: &Arc<Buffers>, len: usize) -> Buffer {
        buffers.kept(len).unwrap_or_else(|| buffers.add(vec![0; len]))
    }

    fn kept(buffers: &Buffers) -> (u64, usize) {
        let free = buffers.free();
        (free.kept, free.buffers.values().flatten().map(Vec::len).sum())
    }

    #[test]
    fn a_buffer_is_handed_out_again() {
        let buffers = Buffers::new(1 << 20);
        let mut first = take(&buffers, LEAST);
        first.as_mut().fill(1);
        let at = first.as_ref().as_ptr();
        drop(first);
        assert_eq!(kept(&buffers), (LEAST as u64, LEAST));
        let other = take(&buffers, 2 * LEAST);
        assert_ne!(other.as_ref().as_ptr(), at);
        assert_eq!(kept(&buffers), (LEAST as u64, LEAST));
        let again = take(&buffers, LEAST);
        assert_eq!((again.as_ref().as_ptr(), again.as_ref().len()), (at, LEAST));
        assert_eq!(kept(&buffers), (0, 0));
    }

    #[test]
    fn no_more_is_kept_than_was_said() {
        let buffers = Buffers::new(3 * LEAST as u64);
        let taken: Vec<_> = [LEAST, LEAST, 2 * LEAST, LEAST].map(|len| take(&buffers, len)).into();
        drop(taken);
        assert_eq!(kept(&buffers), (3 * LEAST as u64, 3 * LEAST));
        let none = Buffers::new(0);
        drop(take(&none, LEAST));
        assert_eq!(kept(&none), (0, 0));
    }

    #[test]
    fn those_of_other_lengths_give_way() {
        let buffers = Buffers::new(4 * LEAST as u64);
        drop([LEAST, LEAST, 2 * LEAST].map(|len| take(&buffers, len)));
        assert_eq!(kept(&buffers), (4 * LEAST as u64, 4 * LEAST));
        let used = take(&buffers, 4 * LEAST);
        assert_eq!(kept(&buffers), (0, 0));
        drop(used);
        assert_eq!(kept(&buffers), (4 * LEAST as u64, 4 * LEAST));
    }

    #[test]
    fn parts_of_chunks_are_not_kept() {
        let buffers = Buffers::new(1 << 20);
        drop(take(&buffers, LEAST / 2));
        drop(take(&buffers, 3 * LEAST));
        assert_eq!(kept(&buffers), (0, 0));
    }
}
