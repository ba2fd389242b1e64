//! What the store's threads share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::disk::Disk;
use crate::error::StoreError;
use crate::format::StoreId;
use crate::index::Index;
use crate::options::Options;
use crate::queue::{GROUP_BYTES_MAX, Queue};
use crate::segments::Segments;

/// The state of an open store.
pub(crate) struct Core {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) options: Options,
    pub(crate) store: StoreId,
    pub(crate) index: Index,
    pub(crate) segments: Segments,
    pub(crate) queue: Queue,
    /// Bytes of the file system.
    pub(crate) capacity: u64,
    /// Free bytes below which no new records are taken.
    pub(crate) reserve: u64,
    poison: OnceLock<Arc<str>>,
    /// The last put was refused for want of space.
    pub(crate) refusing: AtomicBool,
    /// Syncs of segment data so far.
    pub(crate) syncs: AtomicU64,
    /// Groups that were written, or are being written.
    pub(crate) groups: AtomicU64,
}

impl Core {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        options: Options,
        store: StoreId,
        index: Index,
        segments: Segments,
    ) -> Self {
        let capacity = disk.space().map_or(0, |space| space.capacity);
        let reserve = options.reserve(capacity);
        Self {
            disk,
            options,
            store,
            index,
            segments,
            queue: Queue::default(),
            capacity,
            reserve,
            poison: OnceLock::new(),
            refusing: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            groups: AtomicU64::new(0),
        }
    }

    /// Takes no more writes from now on.
    pub(crate) fn poison(&self, what: &str, error: &std::io::Error) {
        let cause: Arc<str> = format!("{what} failed: {error}").into();
        tracing::error!(%cause, "the chunk store takes no more writes; restart the node to recover");
        // The first cause is the one to tell.
        let _ = self.poison.set(cause);
    }

    /// The error that answers a write, when the store takes none.
    pub(crate) fn poisoned(&self) -> Option<StoreError> {
        self.poison.get().map(|cause| StoreError::Poisoned { cause: Arc::clone(cause) })
    }

    /// Whether new records are refused for want of space.
    pub(crate) fn is_full(&self) -> bool {
        let free = self.disk.space().map_or(u64::MAX, |space| space.free);
        let room = free.saturating_sub(self.reserve);
        // A quota may be exhausted while the file system has room: then what was refused tells,
        // until there is room for the largest group.
        let was_refused = self.refusing.load(Ordering::Relaxed);
        room == 0 || was_refused && room < GROUP_BYTES_MAX as u64
    }

    /// The error that answers a put for which there is no room.
    pub(crate) fn full(&self) -> StoreError {
        self.refusing.store(true, Ordering::Relaxed);
        let free = self.disk.space().map_or(0, |space| space.free);
        StoreError::Full { free, reserve: self.reserve }
    }
}
