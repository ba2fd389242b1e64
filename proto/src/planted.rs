//! Bugs on purpose, to show that the simulation finds them. None exists without the feature
//! `planted-bugs`, and with it only in a thread that asks for one.

use std::cell::Cell;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A snapshot is published before its tree is durable.
    PublishEarly,
    /// The collector ignores other leases than its own.
    CollectLeased,
    /// A node acknowledges what it has not synced.
    AckUnsynced,
}

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// From now on this thread has that bug, or none.
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this thread has that bug.
#[must_use]
pub fn has(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}
