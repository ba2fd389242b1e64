//! Who waits for the repository just now, and why.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The reads of one snapshot that wait.
#[derive(Debug, Default)]
pub(super) struct Stall(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    reads: u64,
    reason: Option<Arc<str>>,
}

impl Stall {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more read that waits, until the result is dropped.
    pub(super) fn waiter(&self) -> Waiter<'_> {
        self.lock().reads += 1;
        Waiter(self)
    }

    /// For the operator; `None` when no read waits.
    pub(super) fn reason(&self) -> Option<String> {
        let waiting = self.lock();
        let reason = waiting.reason.as_deref().unwrap_or("it does not answer");
        (waiting.reads > 0)
            .then(|| format!("{} reads wait for the repository: {reason}", waiting.reads))
    }
}

/// A read that waits.
#[derive(Debug)]
pub(super) struct Waiter<'a>(&'a Stall);

impl Waiter<'_> {
    /// Why it waits.
    pub(super) fn says(&self, reason: Arc<str>) {
        self.0.lock().reason = Some(reason);
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.reads -= 1;
        if waiting.reads == 0 {
            waiting.reason = None;
        }
    }
}
