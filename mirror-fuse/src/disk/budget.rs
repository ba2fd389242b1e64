//! How much memory and disk the copies aside of all disks of a host may take.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use super::buffers::Buffers;

/// A number of bytes that many may take from.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
}

/// Part of a [`Budget`], given back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    budgets: Arc<Budgets>,
    kind: Kind,
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Memory,
    Spill,
}

/// The budgets of a host, shared by its disks.
#[derive(Debug)]
pub struct Budgets {
    memory: Budget,
    spill: Budget,
    freed: Notify,
    buffers: Arc<Buffers>,
}

impl Budget {
    fn take(&self, bytes: u64) -> bool {
        let more = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Bytes taken just now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

impl Budgets {
    /// So many bytes of memory, then so many of spill files.
    #[must_use]
    pub fn new(memory_bytes: u64, spill_bytes: u64) -> Arc<Self> {
        let budget = |limit| Budget { limit, used: AtomicU64::new(0) };
        Arc::new(Self {
            memory: budget(memory_bytes),
            spill: budget(spill_bytes),
            freed: Notify::new(),
            buffers: Buffers::new(memory_bytes),
        })
    }

    /// The memory.
    #[must_use]
    pub const fn memory(&self) -> &Budget {
        &self.memory
    }

    /// The spill files.
    #[must_use]
    pub const fn spill(&self) -> &Budget {
        &self.spill
    }

    pub(super) fn take_memory(self: &Arc<Self>, bytes: u64) -> Option<Share> {
        self.take(Kind::Memory, bytes)
    }

    pub(super) fn take_spill(self: &Arc<Self>, bytes: u64) -> Option<Share> {
        self.take(Kind::Spill, bytes)
    }

    fn take(self: &Arc<Self>, kind: Kind, bytes: u64) -> Option<Share> {
        self.of(kind).take(bytes).then(|| Share { budgets: Arc::clone(self), kind, bytes })
    }

    const fn of(&self, kind: Kind) -> &Budget {
        match kind {
            Kind::Memory => &self.memory,
            Kind::Spill => &self.spill,
        }
    }

    /// What the memory is made of.
    pub(super) const fn buffers(&self) -> &Arc<Buffers> {
        &self.buffers
    }

    /// Told whenever something was given back.
    pub(super) const fn freed(&self) -> &Notify {
        &self.freed
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budgets.of(self.kind).used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budgets.freed.notify_waiters();
    }
}
