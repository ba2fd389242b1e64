//! A limit on bytes a second.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

/// Time that was not used may be made up for, up to this: a pause of a node must not slow the rest.
const SLACK: Duration = Duration::from_secs(1);

/// Holds its users to a mean rate, all together.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: u64,
    /// When the bytes so far may have been read.
    due: Mutex<Instant>,
}

impl Pace {
    /// `bytes_per_second` of 0 is no limit.
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, due: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be read.
    pub(crate) async fn before(&self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        // Others wait behind it, in order.
        let mut due = self.due.lock().await;
        let now = Instant::now();
        sleep_until(*due).await;
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        *due = (*due).max(earliest) + takes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_rate_is_kept_and_none_is_no_wait() {
        let begin = Instant::now();
        let pace = Pace::new(1_000_000);
        for _ in 0..11 {
            pace.before(10_000).await;
        }
        assert!(begin.elapsed() >= Duration::from_millis(100), "{:?}", begin.elapsed());
        Pace::new(0).before(u64::MAX).await;
    }
}
