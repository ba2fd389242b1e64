//! The work of a store's threads, one step at a time, for who decides when each happens.

use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::compact::{CompactionReport, Compactor};
use crate::core::Core;
use crate::error::StoreError;
use crate::writer::Writer;

/// What the threads of a store that was opened with [`crate::ChunkStore::open_stepped`] would do.
/// Dropped, the store is closed.
pub struct Stepper {
    pub(crate) core: Arc<Core>,
    pub(crate) writer: Writer,
    pub(crate) compactor: Arc<Mutex<Compactor>>,
    pub(crate) arrived: Arc<Notify>,
}

impl std::fmt::Debug for Stepper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stepper").finish_non_exhaustive()
    }
}

impl Stepper {
    /// Waits for jobs. May return when there are none.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Writes and syncs one group of the jobs that wait, and answers them; says whether there were
    /// any.
    pub fn step(&mut self) -> bool {
        self.writer.step()
    }

    /// Compacts until nothing is worth it.
    ///
    /// # Errors
    /// As [`crate::ChunkStore::compact`].
    ///
    /// # Panics
    /// When a thread that compacted has panicked.
    pub fn compact(&mut self) -> Result<CompactionReport, StoreError> {
        let mut compactor = self.compactor.lock().expect("no holder of this lock panics");
        let (core, writer) = (&self.core, &mut self.writer);
        let mut ask = |work| {
            let pending = core.queue.push(work);
            while writer.step() {}
            pending.now()
        };
        compactor.run_by(&mut ask, &mut |_| true)
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        self.core.queue.abandon();
    }
}
