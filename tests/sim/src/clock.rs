//! Clocks that are wrong in their own ways, over the time of the run.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::dice::Dice;

/// What a right clock shows at the begin, in ms since 1970.
const BEGIN_MS: i64 = 1_700_000_000_000;

/// A wall clock that is off, drifts, and jumps when it is told to.
#[derive(Debug)]
pub struct WallClock {
    begin: Instant,
    off_ms: AtomicI64,
    drift_ppm: i64,
}

impl WallClock {
    /// Off by up to two seconds, drifting by up to a permille.
    #[must_use]
    pub fn new(dice: &Dice) -> Self {
        let about = |most: i64| dice.of(0..2 * most as u64 + 1) as i64 - most;
        let off_ms = AtomicI64::new(about(2000));
        Self { begin: Instant::now(), off_ms, drift_ppm: about(1000) }
    }

    /// Jumps.
    pub fn jump(&self, ms: i64) {
        self.off_ms.fetch_add(ms, Ordering::SeqCst);
    }
}

impl blobcr_metadata::clock::Clock for WallClock {
    fn now_unix_ms(&self) -> u64 {
        let passed = self.begin.elapsed().as_millis() as i64;
        let drifted = passed + passed * self.drift_ppm / 1_000_000;
        (BEGIN_MS + self.off_ms.load(Ordering::SeqCst) + drifted) as u64
    }
}

/// Randomness of a process.
#[derive(Debug)]
pub struct Entropy(pub Dice);

impl blobcr_metadata::clock::Entropy for Entropy {
    fn next_u64(&self) -> u64 {
        self.0.any()
    }
}

/// The time of the run.
#[derive(Debug, Clone, Copy)]
pub struct RunClock(Instant);

impl RunClock {
    /// From now on.
    #[must_use]
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for RunClock {
    fn default() -> Self {
        Self::new()
    }
}

impl blobcr_repository::clock::Clock for RunClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}
