//! How far a repair is, for the operator.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blobcr_proto::v1;
use tokio::sync::watch;
use tokio::time::{Instant, interval};

use crate::mend::Mender;

/// How often counts are brought up to date, and the time that a rate is taken over.
const TICK: Duration = Duration::from_secs(1);
const RATE_OVER: Duration = Duration::from_secs(5);

/// Counts what a repair does.
#[derive(Debug, Default)]
pub(crate) struct RepairMeter {
    state: Mutex<State>,
    told: watch::Sender<v1::RepairProgress>,
}

#[derive(Debug, Default)]
struct State {
    began: Option<Instant>,
    progress: v1::RepairProgress,
    /// Bytes copied by then, a while ago.
    mark: Option<(Instant, u64)>,
}

impl State {
    fn refresh(&mut self) {
        let Some(began) = self.began else { return };
        let elapsed = began.elapsed();
        let progress = &mut self.progress;
        // Longer than any clock runs.
        progress.running_ms = elapsed.as_millis() as u64;
        let left = progress.partitions_total.saturating_sub(progress.partitions_done);
        let each = progress.running_ms.checked_div(progress.partitions_done).unwrap_or(0);
        progress.remaining_ms = each.saturating_mul(left);
        let (at, bytes) = *self.mark.get_or_insert((began, 0));
        if at.elapsed() >= RATE_OVER {
            let copied = progress.copied_bytes.saturating_sub(bytes) as f64;
            progress.bytes_per_second = (copied / at.elapsed().as_secs_f64()) as u64;
            self.mark = Some((Instant::now(), progress.copied_bytes));
        }
    }
}

impl RepairMeter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        state.refresh();
        self.told.send_replace(state.progress.clone());
    }

    pub(crate) fn watch(&self) -> watch::Receiver<v1::RepairProgress> {
        self.told.subscribe()
    }

    pub(crate) fn nothing_to_do(&self) {
        self.change(|state| *state = State::default());
    }

    /// A round begins with so many partitions before it.
    pub(crate) fn begin(&self, partitions: u64) {
        self.change(|state| {
            state.began.get_or_insert_with(Instant::now);
            let progress = &mut state.progress;
            progress.partitions_total = progress.partitions_total.max(partitions);
            progress.partitions_done = progress.partitions_total - partitions;
        });
    }

    pub(crate) fn partitions_done(&self, count: u64) {
        self.change(|state| state.progress.partitions_done += count);
    }

    pub(crate) fn end(&self, waits_for: &BTreeSet<String>) {
        let waits_for = waits_for.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        self.change(|state| state.progress.waits_for = waits_for);
    }

    /// Counts what a mender copies while `work` runs.
    pub(crate) async fn watching<T>(
        &self,
        mender: &Mender<'_>,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = std::pin::pin!(work);
        let mut ticks = interval(TICK);
        let mut counted = (0, 0);
        loop {
            let done = tokio::select! {
                done = &mut work => Some(done),
                _ = ticks.tick() => None,
            };
            let now = mender.copied();
            self.change(|state| {
                state.progress.copied_records += now.0 - counted.0;
                state.progress.copied_bytes += now.1 - counted.1;
            });
            counted = now;
            if let Some(done) = done {
                return done;
            }
        }
    }
}
