//! Time and randomness, so that a test decides about both.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Wall-clock time: leases outlive the process, so theirs must.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Milliseconds since 1970.
    fn now_unix_ms(&self) -> u64;
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Random numbers.
pub trait Entropy: fmt::Debug + Send + Sync + 'static {
    /// 64 random bits.
    fn next_u64(&self) -> u64;
}

/// The system's randomness.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn next_u64(&self) -> u64 {
        rand::random()
    }
}

/// A clock that a test moves, and randomness that a seed decides.
#[cfg(any(test, feature = "testing"))]
pub mod testing {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{Clock, Entropy};

    /// Stands still until it is moved.
    #[derive(Debug)]
    pub struct ManualClock(AtomicU64);

    impl ManualClock {
        /// Stands at `now_unix_ms`.
        #[must_use]
        pub fn new(now_unix_ms: u64) -> Self {
            Self(AtomicU64::new(now_unix_ms))
        }

        /// Moves forward.
        pub fn advance_ms(&self, ms: u64) {
            self.0.fetch_add(ms, Ordering::SeqCst);
        }
    }

    impl Clock for ManualClock {
        fn now_unix_ms(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// The same numbers for the same seed (SplitMix64).
    #[derive(Debug)]
    pub struct SeededEntropy(AtomicU64);

    impl SeededEntropy {
        /// Numbers that follow from `seed`.
        #[must_use]
        pub fn new(seed: u64) -> Self {
            Self(AtomicU64::new(seed))
        }
    }

    impl Entropy for SeededEntropy {
        fn next_u64(&self) -> u64 {
            const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
            let state = self.0.fetch_add(STEP, Ordering::SeqCst).wrapping_add(STEP);
            crate::version_manager::mix64(state)
        }
    }
}
