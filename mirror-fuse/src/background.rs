//! Threads that give way: what persists snapshots takes the time that guests and the mirror's own
//! answers to them leave.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of its own, whose threads have a lower priority than the rest of the process. Its tasks
/// end when it is dropped.
#[derive(Debug)]
pub(crate) struct Background(Option<Runtime>);

impl Background {
    /// Starts its threads, each `nice` steps below the thread that starts them (as `nice(1)`
    /// counts them).
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(nice: u8) -> io::Result<Self> {
        let give_way = move || {
            // On Linux it is the calling thread's alone. To lower it is everybody's right.
            if let Err(error) = rustix::process::nice(nice.into()) {
                tracing::warn!(%error, "a thread that persists snapshots keeps its priority");
            }
        };
        let runtime = Builder::new_multi_thread()
            .thread_name("persist")
            .on_thread_start(give_way)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is there until it is dropped").handle()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Whoever drops it may be a task, which must not wait for others.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
