//! Work that takes a core for longer than an asynchronous task may.

use std::sync::LazyLock;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

/// Below so many bytes hashing, coding and decoding take less time than moving to another thread.
const INLINE_BYTES: usize = 16 << 10;

/// One at a time for each core: more would only take turns, and hold their buffers meanwhile.
type Cores = LazyLock<Semaphore>;

fn cores() -> Semaphore {
    Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))
}

/// For what is read, and what is stored: a guest waits for the one, and the other may be done by
/// threads that give way to everybody.
static READING: Cores = LazyLock::new(cores);
static STORING: Cores = LazyLock::new(cores);

/// Runs `work`, which opens about `bytes` bytes that were read, off the threads of the asynchronous
/// runtime (unless it is little, or that has one thread only: a simulation, whose course no other
/// thread may decide).
///
/// # Panics
/// When `work` does.
pub async fn read<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    run(&READING, bytes, work).await
}

/// The same for `work` that makes about `bytes` bytes ready to be stored.
///
/// # Panics
/// When `work` does.
pub async fn store<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    run(&STORING, bytes, work).await
}

async fn run<T: Send + 'static>(
    cores: &Semaphore,
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if bytes <= INLINE_BYTES || Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
        return work();
    }
    let _core = cores.acquire().await.expect("the semaphore is never closed");
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only at the end of the runtime, which drops the caller as well.
            Err(_) => std::future::pending().await,
        },
    }
}
