//! A limit on bytes a second.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Time that was not used may be made up for, up to this: a pause of a node must not slow the rest.
const SLACK: Duration = Duration::from_secs(1);

/// Holds its user to a mean rate.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    /// When the bytes so far may have been read.
    due: Instant,
}

impl Pace {
    /// `bytes_per_second` of 0 is no limit.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, due: Instant::now() }
    }

    /// Waits until `bytes` more may be read.
    pub(super) async fn before(&mut self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        let now = Instant::now();
        sleep_until(self.due).await;
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.due = self.due.max(earliest) + takes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_rate_is_kept_and_none_is_no_wait() {
        let begin = Instant::now();
        let mut pace = Pace::new(1_000_000);
        for _ in 0..11 {
            pace.before(10_000).await;
        }
        assert!(begin.elapsed() >= Duration::from_millis(100), "{:?}", begin.elapsed());
        Pace::new(0).before(u64::MAX).await;
    }
}
