//! Trying again while a failure may pass.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::StoreError;

/// The wait after the first failure, and the longest one: a node that restarts is back within
/// seconds, and a thousand persists that ask every five seconds do not keep it from coming back.
const WAIT_FIRST: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// How long one operation is tried again, and how its waits are spread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retry {
    pub(crate) give_up_after: Duration,
    /// Any number that differs from one operation to the next, so that many that failed together
    /// do not come back together.
    pub(crate) spread: u64,
}

impl Retry {
    /// `wait`, cut by up to a half.
    fn spread(self, wait: Duration, attempt: u32) -> Duration {
        let part = self.spread.rotate_left(attempt * 8) & 0xff;
        wait / 2 + wait * part as u32 / 512
    }

    /// Runs `operation` until it succeeds, fails for good, or has failed for too long; `failed`
    /// hears of every failure that is tried again.
    pub(crate) async fn run<T, F: Future<Output = Result<T, StoreError>>>(
        self,
        mut operation: impl FnMut() -> F,
        failed: impl Fn(&StoreError),
    ) -> Result<T, StoreError> {
        let mut first_failure = None;
        let mut wait = WAIT_FIRST;
        for attempt in 0.. {
            let error = match operation().await {
                Err(error) if error.is_transient() => error,
                done => return done,
            };
            let since = *first_failure.get_or_insert_with(Instant::now);
            let pause = self.spread(wait, attempt);
            if since.elapsed() + pause > self.give_up_after {
                return Err(error);
            }
            failed(&error);
            sleep(pause).await;
            wait = (wait * 2).min(WAIT_MAX);
        }
        unreachable!("the loop above ends only by returning")
    }
}
