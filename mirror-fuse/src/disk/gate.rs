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
//!
//! Some strategies (see [`super::strategy`]) keep the gate closed while they copy or persist a
//! snapshot. It is *held* then: who comes must not block a thread, but waits for [`Gate::released`].

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A disk's gate.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// How many keep it closed.
    closed: AtomicUsize,
    /// How many of them for long.
    held: Mutex<usize>,
    opened: Condvar,
    released: Notify,
}

/// Keeps a gate closed until it is dropped, which is microseconds later.
pub(super) struct Closed<'a>(&'a Gate);

/// Keeps a gate closed for long.
pub(super) struct Held<'a>(&'a Gate);

impl Gate {
    /// Comes through; waits while the gate is closed, but not while it is held: `false` then.
    #[must_use]
    pub(super) fn enter(&self) -> bool {
        self.closed.load(Ordering::Acquire) == 0 || self.wait()
    }

    #[cold]
    fn wait(&self) -> bool {
        let mut held = self.lock();
        while self.closed.load(Ordering::Acquire) > 0 {
            if *held > 0 {
                return false;
            }
            held = self.opened.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn close(&self) -> Closed<'_> {
        self.closed.fetch_add(1, Ordering::AcqRel);
        Closed(self)
    }

    pub(super) fn hold(&self) -> Held<'_> {
        let mut held = self.lock();
        *held += 1;
        self.closed.fetch_add(1, Ordering::AcqRel);
        // Who waits for a gate that was only closed goes to wait for its release.
        self.opened.notify_all();
        Held(self)
    }

    /// Returns once nobody holds the gate.
    pub(super) async fn released(&self) {
        loop {
            // Before the look, so that no release is missed.
            let mut released = pin!(self.released.notified());
            released.as_mut().enable();
            if *self.lock() == 0 {
                return;
            }
            released.await;
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if self.0.closed.fetch_sub(1, Ordering::AcqRel) == 1 {
            // With the lock, so that nobody is between the look and the wait.
            let _held = self.0.lock();
            self.0.opened.notify_all();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.0.lock();
        *held -= 1;
        self.0.closed.fetch_sub(1, Ordering::AcqRel);
        self.0.opened.notify_all();
        self.0.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_held_gate_blocks_no_thread_and_is_waited_for() {
        let gate = Gate::default();
        assert!(gate.enter());
        let (one, other) = (gate.hold(), gate.hold());
        assert!(!gate.enter());
        drop(one);
        let mut released = pin!(gate.released());
        assert!(futures::poll!(released.as_mut()).is_pending(), "another one holds it");
        drop(other);
        released.await;
        assert!(gate.enter());
    }

    #[test]
    fn who_waits_at_a_closed_gate_is_sent_away_when_it_is_held() {
        let gate = Gate::default();
        std::thread::scope(|scope| {
            let closed = gate.close();
            let waiting = scope.spawn(|| gate.enter());
            let held = gate.hold();
            drop(closed);
            assert!(!waiting.join().unwrap());
            drop(held);
        });
        assert!(gate.enter());
    }
}
