//! Threads that give way: what persists snapshots takes the time that guests and the mirror's own
//! answers to them leave.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of its own, whose threads have a lower priority than the rest of the process. Its tasks
/// end when it is dropped.
#[derive(Debug)]
pub struct Background {
    runtime: Option<Runtime>,
    nice: u8,
}

impl Background {
    /// Starts its threads, each `nice` steps below the thread that starts them (as `nice(1)`
    /// counts them).
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(nice: u8) -> io::Result<Self> {
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
        Ok(Self { runtime: Some(runtime), nice })
    }

    /// By how many steps its threads give way.
    #[must_use]
    pub const fn nice(&self) -> u8 {
        self.nice
    }

    /// To run something on its threads.
    ///
    /// # Panics
    /// Never: it is there until this is dropped.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("it is there until it is dropped").handle()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Whoever drops it may be a task, which must not wait for others.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn niceness() -> i32 {
        // On Linux that of the calling thread.
        rustix::process::getpriority_process(None).unwrap()
    }

    #[test]
    fn its_threads_give_way_and_nobody_else_does() {
        let own = niceness();
        let background = Background::start(3).unwrap();
        let (blocking, niced) = std::sync::mpsc::channel();
        let worker = blocking.clone();
        background.handle().spawn_blocking(move || blocking.send(niceness()));
        background.handle().spawn(async move { worker.send(niceness()) });
        assert_eq!([niced.recv().unwrap(), niced.recv().unwrap()], [own + 3; 2]);
        assert_eq!(niceness(), own);
    }

    #[tokio::test]
    async fn a_task_may_drop_it() {
        let background = Background::start(0).unwrap();
        let held = background.handle().spawn(std::future::pending::<()>());
        drop(background);
        assert!(held.await.unwrap_err().is_cancelled());
    }
}
