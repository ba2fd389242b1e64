//! Latencies of one kind of call, and how they are printed.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// The latencies of one kind of call.
#[derive(Debug)]
pub struct Latencies {
    nanoseconds: Histogram<u64>,
}

/// What is printed of [`Latencies`]; in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Summary {
    /// How many calls.
    pub samples: u64,
    /// Half of the calls took no longer.
    pub p50_us: f64,
    /// 99 of 100 calls took no longer; the slowest one while there are fewer than 100.
    pub p99_us: f64,
    /// The slowest.
    pub max_us: f64,
}

impl Latencies {
    /// None yet; from a nanosecond to ten minutes at three digits.
    ///
    /// # Errors
    /// Never for these bounds.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { nanoseconds: Histogram::new_with_bounds(1, 600_000_000_000, 3)? })
    }

    /// Adds a call.
    pub fn record(&mut self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.saturating_record(nanoseconds);
    }

    /// The figures so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let us = |ns: u64| ns as f64 / 1e3;
        Summary {
            samples: self.nanoseconds.len(),
            p50_us: us(self.nanoseconds.value_at_quantile(0.5)),
            p99_us: us(self.nanoseconds.value_at_quantile(0.99)),
            max_us: us(self.nanoseconds.max()),
        }
    }
}
