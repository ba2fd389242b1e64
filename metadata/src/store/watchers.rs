//! Delivery of changes to the watchers of one process.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::{Change, StoreError};

/// Changes that wait for one watcher at most; behind that it must read again. A watcher costs no
/// memory until it falls behind.
pub const WATCH_BACKLOG_MAX: usize = 1024;

/// The changes under one prefix, from the moment it was made.
#[derive(Debug)]
pub struct Watch {
    changes: mpsc::Receiver<Change>,
}

impl Watch {
    /// A watch and the end that feeds it; dropping that end makes the watch report
    /// [`StoreError::WatchLost`] after what it still holds.
    #[must_use]
    pub fn new() -> (mpsc::Sender<Change>, Self) {
        let (sender, changes) = mpsc::channel(WATCH_BACKLOG_MAX);
        (sender, Self { changes })
    }

    /// The next change.
    ///
    /// # Errors
    /// [`StoreError::WatchLost`] when changes were lost: nothing comes after it.
    pub async fn next(&mut self) -> Result<Change, StoreError> {
        self.changes.recv().await.ok_or(StoreError::WatchLost)
    }
}

#[derive(Debug)]
struct Watcher {
    prefix: Vec<u8>,
    changes: mpsc::Sender<Change>,
}

/// Who watches what.
#[derive(Clone, Debug, Default)]
pub struct Watchers {
    watchers: Arc<Mutex<Vec<Watcher>>>,
}

impl Watchers {
    /// Adds a watcher of `prefix`.
    #[must_use]
    pub fn add(&self, prefix: &[u8]) -> Watch {
        let (changes, watch) = Watch::new();
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| !watcher.changes.is_closed());
        watchers.push(Watcher { prefix: prefix.to_vec(), changes });
        watch
    }

    /// Shows the changes of one version, in order of key, to whom they concern. Whoever has gone or
    /// cannot keep up is dropped.
    pub fn show(&self, changes: &[Change]) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| {
            let concerns = |change: &&Change| change.key.as_slice().starts_with(&watcher.prefix);
            changes.iter().filter(concerns).all(|change| {
                match watcher.changes.try_send(change.clone()) {
                    Ok(()) => true,
                    Err(TrySendError::Full(_) | TrySendError::Closed(_)) => false,
                }
            })
        });
    }

    /// Ends every watch: the store has stopped.
    pub fn close(&self) {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
