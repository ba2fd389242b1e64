//! Threads that give way: what persists snapshots takes the time that guests and the mirror's own
//! answers to them leave.

use std::io;

use rustix::process::{getpriority_process, setpriority_process};
use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of its own, whose threads have a lower priority than the rest of the process. Its tasks
/// end when it is dropped.
#[derive(Debug)]
pub struct Background(Option<Runtime>);

impl Background {
    /// Starts its threads, each `nice` steps below the thread that starts them (as `nice(1)`
    /// counts them). Where that is any, they also let a running thread go on when they wake.
    ///
    /// # Errors
    /// When no thread can be started, or the kernel does not tell the priority.
    pub fn start(nice: u8) -> io::Result<Self> {
        // On Linux it is the calling thread's alone.
        let lowered = getpriority_process(None)? + i32::from(nice);
        let give_way = move || {
            // Not by so many steps: a thread begins with what the one that starts it has.
            let lower = || setpriority_process(None, lowered).map_err(io::Error::from);
            let given_way =
                lower().and_then(|()| if nice > 0 { await_a_processor() } else { Ok(()) });
            if let Err(error) = given_way {
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

    /// To run something on its threads.
    ///
    /// # Panics
    /// Never: it is there until this is dropped.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is there until it is dropped").handle()
    }
}

/// From now on the calling thread, when it wakes, does not take the processor from one that runs.
fn await_a_processor() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: no other memory than `none` is read, and none is written.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const none) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn niceness() -> i32 {
        getpriority_process(None).unwrap()
    }

    fn is_batch() -> bool {
        // SAFETY: touches no memory.
        unsafe { libc::sched_getscheduler(0) == libc::SCHED_BATCH }
    }

    #[test]
    fn its_threads_take_no_processor_from_others_unless_they_are_like_them() {
        for nice in [0, 1] {
            let background = Background::start(nice).unwrap();
            let (sender, batch) = std::sync::mpsc::channel();
            background.handle().spawn_blocking(move || sender.send(is_batch()).unwrap());
            assert_eq!(batch.recv().unwrap(), nice > 0);
        }
        assert!(!is_batch());
    }

    #[test]
    fn its_threads_give_way_and_nobody_else_does() {
        let own = niceness();
        let background = Background::start(3).unwrap();
        let (worker, niced) = std::sync::mpsc::channel();
        background.handle().spawn(async move {
            worker.send(niceness()).unwrap();
            // Threads begin with the priority of the one that starts them.
            let of_worker = worker.clone();
            tokio::task::spawn_blocking(move || {
                of_worker.send(niceness()).unwrap();
                let deeper = move || of_worker.send(niceness()).unwrap();
                Handle::current().block_on(tokio::task::spawn_blocking(deeper)).unwrap();
            })
            .await
            .unwrap();
        });
        let all: Vec<_> = niced.iter().take(3).collect();
        assert_eq!(all, [own + 3; 3]);
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
