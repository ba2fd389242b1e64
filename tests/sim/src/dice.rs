//! Decisions of the seed.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A stream of random numbers; clones share it.
#[derive(Clone, Debug)]
pub struct Dice(Arc<Mutex<StdRng>>);

impl Dice {
    /// Numbers that follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(StdRng::seed_from_u64(seed))))
    }

    fn rng(&self) -> MutexGuard<'_, StdRng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// 64 random bits.
    #[must_use]
    pub fn any(&self) -> u64 {
        self.rng().random()
    }

    /// Another stream, which this one decides.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self::new(self.any())
    }

    /// One of `range`, which must not be empty.
    #[must_use]
    pub fn of(&self, range: Range<u64>) -> u64 {
        self.rng().random_range(range)
    }

    /// An index into something of `len`, which must not be 0.
    #[must_use]
    pub fn index(&self, len: usize) -> usize {
        self.rng().random_range(0..len)
    }

    /// True with this probability.
    #[must_use]
    pub fn chance(&self, probability: f64) -> bool {
        self.rng().random_bool(probability)
    }

    /// A time of so many milliseconds.
    #[must_use]
    pub fn ms(&self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.of(range))
    }
}
