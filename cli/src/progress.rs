//! Progress bars: only for a person at a terminal, only for what takes longer than a second.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What ends sooner needs no bar.
const QUIET_FOR: Duration = Duration::from_secs(1);
const REDRAW_EVERY: Duration = Duration::from_millis(200);

/// The progress of one piece of work. Cleared when dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    shown: AtomicBool,
    watched: bool,
}

impl Progress {
    /// `what` is being done to so many bytes.
    #[must_use]
    pub fn bytes(what: &str, total: u64) -> Self {
        let style =
            "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        Self::new(
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden()),
            what,
            style,
        )
    }

    /// `what` is being waited for.
    #[must_use]
    pub fn spinner(what: &str) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        Self::new(bar, what, "{spinner} {prefix} {elapsed}")
    }

    fn new(bar: ProgressBar, what: &str, style: &str) -> Self {
        let style = ProgressStyle::with_template(style)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        bar.set_style(style);
        bar.set_prefix(what.to_owned());
        Self {
            bar,
            started: Instant::now(),
            shown: AtomicBool::new(false),
            watched: crate::output::watched(),
        }
    }

    /// So much is done.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
        self.show_when_due();
    }

    /// The total turned out to be another.
    pub fn set_total(&self, total: u64) {
        self.bar.set_length(total);
    }

    fn show_when_due(&self) {
        if self.watched
            && self.started.elapsed() >= QUIET_FOR
            && !self.shown.swap(true, Ordering::Relaxed)
        {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.enable_steady_tick(REDRAW_EVERY);
        }
    }

    /// Shows the bar when it is due, while `work` runs.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = tokio::time::sleep(QUIET_FOR) => self.show_when_due(),
        }
        work.await
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
