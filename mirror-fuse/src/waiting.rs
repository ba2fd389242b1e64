//! Requests that must wait for this host's disk: where they wait.
//!
//! A thread of the mount that waits takes no other request, so one of them is always left free: the
//! others may wait themselves, which is the quickest way while requests come one by one. What comes
//! meanwhile goes to a ring, which is as deep as the device can use, and so does what comes while the
//! ring is at work: it costs less there.

use std::io;
use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::disk::ColdRead;
use crate::ring::{Request, Ring};

/// Where requests wait.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// `None`: this host has none; what would go there is done elsewhere.
    ring: Option<Ring>,
    /// Threads of the mount that may wait.
    may_wait: Semaphore,
}

impl Waiting {
    /// For a mount with so many threads.
    pub(crate) fn new(threads: usize) -> Self {
        let ring = Ring::start();
        if let Err(error) = &ring {
            tracing::info!(%error, "this host has no io_uring for us; reading with threads");
        }
        Self { ring: ring.ok(), may_wait: Semaphore::new(threads.saturating_sub(1)) }
    }

    /// Lets the calling thread of the mount wait for the disk; `None`: too many do.
    pub(crate) fn permit(&self) -> Option<SemaphorePermit<'_>> {
        self.may_wait.try_acquire().ok()
    }

    /// Reads, here into `buffer` or elsewhere, and hands the bytes to `done`, here or elsewhere.
    pub(crate) fn read(
        &self,
        cold: ColdRead,
        buffer: &mut [u8],
        done: impl FnOnce(io::Result<&[u8]>) + Send + 'static,
    ) {
        let alone = !self.ring.as_ref().is_some_and(Ring::is_busy);
        if let Some(_permit) = self.permit().filter(|_| alone) {
            return match cold.read(buffer) {
                Ok(()) => done(Ok(&buffer[..cold.len])),
                Err(error) => done(Err(io::Error::other(error))),
            };
        }
        match &self.ring {
            None => done(Err(io::ErrorKind::Unsupported.into())),
            Some(ring) => {
                let (offset, len) = (cold.offset, cold.len);
                ring.read(Request { file: Arc::new(cold), offset, len, done: Box::new(done) });
            }
        }
    }
}
