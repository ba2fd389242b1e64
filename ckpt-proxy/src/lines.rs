//! How much a guest can make the proxy write to its log: one that does nothing else must neither fill
//! the host's disk nor be all that there is to read.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::LINES_MAX;

/// The time in which [`LINES_MAX`] lines may be written.
const WINDOW: Duration = Duration::from_secs(10);

/// The lines that one VM has caused lately, or all of them that have not said who they are.
#[derive(Debug, Default)]
pub(crate) struct Lines(Mutex<Option<Counted>>);

#[derive(Debug)]
struct Counted {
    since: Instant,
    written: u32,
    left_out: u64,
}

impl Lines {
    /// Whether one more line may be written. It says before the first of a new while how many could
    /// not in the last one.
    pub(crate) fn allow(&self, of: &str) -> bool {
        let (allowed, left_out) = self.count(Instant::now());
        if left_out > 0 {
            tracing::warn!(of, left_out, "so many lines were left out of the log");
        }
        allowed
    }

    fn count(&self, now: Instant) -> (bool, u64) {
        let mut counted = self.0.lock().expect("nothing panics while it holds this");
        let before = counted.take();
        let mut current = match before {
            Some(current) if now - current.since < WINDOW => current,
            ended => {
                let left_out = ended.map_or(0, |ended| ended.left_out);
                *counted = Some(Counted { since: now, written: 1, left_out: 0 });
                return (true, left_out);
            }
        };
        let allowed = current.written < LINES_MAX;
        match allowed {
            true => current.written += 1,
            false => current.left_out += 1,
        }
        *counted = Some(current);
        (allowed, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_what_is_left_out_is_counted() {
        let (lines, now) = (Lines::default(), Instant::now());
        for _ in 0..LINES_MAX {
            assert_eq!(lines.count(now), (true, 0));
        }
        for _ in 0..7 {
            assert_eq!(lines.count(now + WINDOW / 2), (false, 0));
        }
        assert_eq!(lines.count(now + WINDOW), (true, 7));
        assert_eq!(lines.count(now + 2 * WINDOW), (true, 0), "told once");
    }
}
