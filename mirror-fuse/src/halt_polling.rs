//! Looking out for the next request for a moment before a thread of the mount sleeps, as KVM does before
//! it halts a processor: to wake an idle processor takes longer than to serve a short request, and a
//! client that has one request at a time waits for that each time.
//!
//! Only while it pays: while requests come one by one, and most of them soon after an answer. One thread
//! looks out at a time. Where processors have more to do, answers and requests are farther apart, and it
//! ends by itself.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// One more for a request that came soon, less for one that did not.
const SCORE_MAX: u64 = 16;
const SCORE_ENOUGH: u64 = 8;
const SCORE_LOSS: u64 = 4;

/// Of one mount.
#[derive(Debug)]
pub(crate) struct HaltPolling {
    /// What requests come from, once it is open.
    device: OnceLock<OwnedFd>,
    /// For how long a thread looks out.
    ns: u64,
    made: Instant,
    /// When the last answer was given, in ns since `made`.
    answered: AtomicU64,
    score: AtomicU64,
    somebody_looks: AtomicBool,
    /// Requests that are being served.
    serving: AtomicUsize,
}

impl HaltPolling {
    /// Looks out for so long at most; zero: never.
    pub(crate) fn new(time: Duration) -> Self {
        Self {
            device: OnceLock::new(),
            ns: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
            made: Instant::now(),
            answered: AtomicU64::new(0),
            score: AtomicU64::new(0),
            somebody_looks: AtomicBool::new(false),
            serving: AtomicUsize::new(0),
        }
    }

    /// Requests come from `device`.
    pub(crate) fn watch(&self, device: OwnedFd) {
        let already = self.device.set(device);
        debug_assert!(already.is_ok(), "a mount has one device");
    }

    fn now(&self) -> u64 {
        self.made.elapsed().as_nanos() as u64
    }

    /// Serves a request, does `then` what nobody waits for, and looks out for the next request.
    pub(crate) fn serve(&self, serve: impl FnOnce(), then: impl FnOnce()) {
        if self.ns == 0 {
            serve();
            return then();
        }
        self.arrived();
        serve();
        let has_time = self.has_time();
        then();
        if has_time {
            self.look_out();
        }
    }

    fn arrived(&self) {
        let is_alone = self.serving.fetch_add(1, Ordering::Relaxed) == 0;
        let score = self.score.load(Ordering::Relaxed);
        let next = if !is_alone {
            // Whoever asks does not wait for one answer before the next request.
            0
        } else if self.now().saturating_sub(self.answered.load(Ordering::Relaxed)) < self.ns {
            (score + 1).min(SCORE_MAX)
        } else {
            score.saturating_sub(SCORE_LOSS)
        };
        // Mostly it stays: spare the cache line.
        if next != score {
            self.score.store(next, Ordering::Relaxed);
        }
    }

    /// Whether nothing else is being served, and it is likely that something comes soon.
    fn has_time(&self) -> bool {
        if self.serving.fetch_sub(1, Ordering::Relaxed) > 1 {
            return false;
        }
        self.answered.store(self.now(), Ordering::Relaxed);
        self.score.load(Ordering::Relaxed) >= SCORE_ENOUGH
    }

    fn look_out(&self) {
        let Some(device) = self.device.get() else { return };
        if self.somebody_looks.swap(true, Ordering::Acquire) {
            return;
        }
        let until = self.answered.load(Ordering::Relaxed).saturating_add(self.ns);
        while !has_request(device) && self.now() < until {
            std::hint::spin_loop();
        }
        self.somebody_looks.store(false, Ordering::Release);
    }
}

fn has_request(device: &OwnedFd) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN)];
    // Whoever reads next finds out about an error.
    !matches!(poll(&mut polled, Some(&Timespec::default())), Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// One that expects a request, and where to write one.
    fn expecting(time: Duration) -> (HaltPolling, OwnedFd) {
        let polling = HaltPolling::new(time);
        for _ in 0..SCORE_ENOUGH {
            polling.serve(|| {}, || {});
        }
        let (device, requests) = std::io::pipe().unwrap();
        polling.watch(device.into());
        (polling, requests.into())
    }

    fn is_quick(polling: &HaltPolling) -> bool {
        let began = Instant::now();
        polling.serve(|| {}, || {});
        began.elapsed() < LONG / 2
    }

    #[test]
    fn a_thread_looks_out_until_a_request_comes() {
        let (polling, requests) = expecting(LONG);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // It looks out: what follows ends it.
                while !polling.somebody_looks.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                rustix::io::write(&requests, b"x").unwrap();
            });
            assert!(is_quick(&polling));
        });
    }

    #[test]
    fn it_looks_out_for_a_moment_only() {
        let time = Duration::from_millis(20);
        let (polling, _requests) = expecting(time);
        let began = Instant::now();
        polling.serve(|| {}, || {});
        assert!((time..LONG).contains(&began.elapsed()));
    }

    #[test]
    fn one_that_serves_beside_others_does_not_wait_nor_does_a_second_one() {
        let (polling, _requests) = expecting(LONG);
        polling.serve(|| assert!(is_quick(&polling)), || {});
        let (polling, _requests) = expecting(LONG);
        polling.somebody_looks.store(true, Ordering::Relaxed);
        assert!(is_quick(&polling));
    }

    #[test]
    fn requests_that_come_late_are_not_looked_out_for() {
        let (polling, _requests) = expecting(Duration::from_nanos(1));
        for _ in 0..SCORE_MAX {
            std::thread::sleep(Duration::from_micros(10));
            polling.serve(|| {}, || {});
        }
        assert_eq!(polling.score.load(Ordering::Relaxed), 0);
        assert!(is_quick(&HaltPolling::new(Duration::ZERO)));
    }
}
