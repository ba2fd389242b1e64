//! The barrier behind which several disks commit.
//!
//! Who commits closes the gates of all disks, cuts one after the other, and opens the gates. A
//! write looks at its disk's gate when it comes, and waits while it is closed. Nothing is drained:
//! a write that came before the gate closed may go on all the while. Why that is enough:
//!
//! Let write B have been issued after write A was acknowledged, on any of the disks, and let B be in
//! its disk's snapshot. Then A is in that of its own. For B to be in, its check (see
//! [`super::epochs`]) came before its disk's cut, and so B came through the gate before the gates
//! closed: while they are closed nothing comes through, and after they opened all cuts are done. A
//! was acknowledged before B came, so A's check too was before the gates closed, and thus before
//! any cut. ∎
//!
//! The chain from A to B goes through the guests (or the host), so each step happens before the
//! next for the processor too; the gate is written with release and read with acquire.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// A disk's gate.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// How many keep it closed.
    closed: AtomicUsize,
    lock: Mutex<()>,
    opened: Condvar,
}

/// Keeps a gate closed until it is dropped.
pub(super) struct Closed<'a>(&'a Gate);

impl Gate {
    /// Comes through; waits while the gate is closed, which is for microseconds.
    pub(super) fn enter(&self) {
        if self.closed.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.closed.load(Ordering::Acquire) > 0 {
            guard = self.opened.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn close(&self) -> Closed<'_> {
        self.closed.fetch_add(1, Ordering::AcqRel);
        Closed(self)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if self.0.closed.fetch_sub(1, Ordering::AcqRel) == 1 {
            // With the lock, so that nobody is between the look and the wait.
            let _guard = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.opened.notify_all();
        }
    }
}
