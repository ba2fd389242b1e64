//! When to start the device on what was written before a flush asks for it: journals of guests' file
//! systems and databases flush right behind each write, and while the flush is on its way the device
//! would have nothing to do.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A flush that comes so soon after the first write behind the one before belongs to it.
const SOON_NS: u64 = 500_000;

/// So many such flushes in a row make another likely.
const ENOUGH: u32 = 4;

/// Finds out whether a write is likely to be flushed at once. It decides when bytes get to the device,
/// never whether a flush may be answered. Time is in ns since any moment.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// When the first write since the last flush ended.
    written: AtomicU64,
    /// Flushes in a row that came soon.
    soon: AtomicU32,
    wanted: AtomicBool,
}

impl Early {
    /// The first write since the last flush has ended.
    pub(super) fn written(&self, now: u64) {
        self.written.store(now, Ordering::Relaxed);
        if self.soon.load(Ordering::Relaxed) >= ENOUGH {
            self.wanted.store(true, Ordering::Relaxed);
        }
    }

    /// A flush begins that has something to do.
    pub(super) fn flushed(&self, now: u64) {
        self.wanted.store(false, Ordering::Relaxed);
        let since = now.saturating_sub(self.written.load(Ordering::Relaxed));
        let soon = self.soon.load(Ordering::Relaxed);
        self.soon
            .store(if since < SOON_NS { (soon + 1).min(ENOUGH) } else { 0 }, Ordering::Relaxed);
    }

    /// Whether to start the device now: true once after a write.
    pub(super) fn take(&self) -> bool {
        // Mostly it is not: spare the cache line.
        self.wanted.load(Ordering::Relaxed) && self.wanted.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes and flushes so many times, the flush so many ns behind the write.
    fn pairs(early: &Early, count: u32, apart: u64) {
        for at in 0..u64::from(count) {
            early.written(at * 1_000_000);
            early.flushed(at * 1_000_000 + apart);
        }
    }

    #[test]
    fn flushes_right_behind_writes_make_another_likely() {
        let early = Early::default();
        pairs(&early, ENOUGH - 1, SOON_NS - 1);
        early.written(0);
        assert!(!early.take(), "not often enough");
        early.flushed(1);
        early.written(2);
        assert!(early.take());
        assert!(!early.take(), "once for each flush");
    }

    #[test]
    fn one_that_comes_late_ends_it() {
        let early = Early::default();
        pairs(&early, ENOUGH, 0);
        pairs(&early, 1, SOON_NS);
        early.written(0);
        assert!(!early.take());
    }

    #[test]
    fn a_flush_does_by_itself_what_was_not_done_before_it() {
        let early = Early::default();
        pairs(&early, ENOUGH, 0);
        early.written(0);
        early.flushed(0);
        assert!(!early.take());
    }
}
