//! When something must be done.

use std::time::{Duration, Instant};

/// Longer than anybody waits, and short enough for every clock.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The moment at which the caller gives up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// So long from now.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self(Instant::now() + time.min(FOR_EVER))
    }

    /// How long it is until then; zero when it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn is_over(self) -> bool {
        self.left().is_zero()
    }

    /// The earlier of this one and so long from now.
    #[must_use]
    pub fn or_after(self, time: Duration) -> Self {
        Self(self.0.min(Instant::now() + time.min(FOR_EVER)))
    }
}
