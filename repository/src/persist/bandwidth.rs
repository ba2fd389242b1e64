//! A cap on the bytes that persists send.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// A cap in bytes per second, which any number of persists may share. Whoever comes first sends
/// first; bytes not used in the past are not saved up.
#[derive(Debug)]
pub struct Bandwidth {
    bytes_per_second: NonZeroU64,
    /// When the bytes granted so far will have been sent.
    free_at: Mutex<Option<Instant>>,
}

impl Bandwidth {
    /// A cap of so many bytes per second.
    #[must_use]
    pub const fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(None) }
    }

    fn time_of(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.get() as f64)
    }

    /// Waits until `bytes` may be sent.
    pub async fn take(&self, bytes: u64) {
        let start = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let start = free_at.map_or(now, |at| at.max(now));
            *free_at = Some(start + self.time_of(bytes));
            start
        };
        sleep_until(start).await;
    }

    /// Returns what was taken and then not sent (it compressed well, or was there already).
    pub fn give_back(&self, bytes: u64) {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = free_at.as_mut() {
            *at = at.checked_sub(self.time_of(bytes)).unwrap_or(*at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_cap_holds_and_unused_bytes_come_back() {
        let cap = Bandwidth::new(NonZeroU64::new(1000).unwrap());
        let begin = Instant::now();
        for _ in 0..5 {
            cap.take(1000).await;
        }
        assert_eq!(begin.elapsed().as_millis(), 4000, "the first is free, the others wait");
        cap.give_back(1000);
        cap.take(1).await;
        assert_eq!(begin.elapsed().as_millis(), 4000);
    }
}
