//! Asking several nodes for the same thing: the next one when the first are slow.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::timeout;

use super::Holder;
use crate::client::link::Links;

/// Another node is not asked before so long: a disk may have to seek, and a second request for each
/// of them would load a busy pool without need.
const PATIENCE_FLOOR: Duration = Duration::from_millis(100);
/// Another node is asked after so long at the latest, however slow the pool was lately.
const PATIENCE_CEILING: Duration = Duration::from_secs(2);
/// While nothing is known: connections come about first.
const PATIENCE_FIRST: Duration = Duration::from_millis(500);

/// Weights of the newest answer, as TCP has them for its round trips: the last eight or so count
/// for the mean, the last four for how far they stray.
const MEAN_WEIGHT: f64 = 0.125;
const STRAY_WEIGHT: f64 = 0.25;
/// An answer that is so many times the usual straying late is not usual.
const STRAYS: f64 = 4.0;

/// How long answers take, as a mean and how far they stray from it, in seconds.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<Option<(f64, f64)>>);

impl Pace {
    /// An answer took so long.
    pub(super) fn took(&self, time: Duration) {
        let time = time.as_secs_f64();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(match *known {
            None => (time, time / 2.0),
            Some((mean, stray)) => (
                mean + MEAN_WEIGHT * (time - mean),
                stray + STRAY_WEIGHT * ((time - mean).abs() - stray),
            ),
        });
    }

    /// How long to wait for an answer before somebody else is asked.
    pub(super) fn patience(&self) -> Duration {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.map_or(PATIENCE_FIRST, |(mean, stray)| {
            Duration::from_secs_f64(mean + STRAYS * stray).clamp(PATIENCE_FLOOR, PATIENCE_CEILING)
        })
    }
}

/// Holders that are asked one after the other, each when it is needed or when those before it are
/// slow.
pub(super) struct Race<'a, F, A> {
    links: &'a Links,
    patience: Duration,
    waiting: std::vec::IntoIter<Holder>,
    under_way: Vec<Holder>,
    answers: FuturesUnordered<A>,
    ask: F,
}

impl<'a, T, F, A> Race<'a, F, A>
where
    F: Fn(Holder) -> A,
    A: Future<Output = (Holder, T)>,
{
    /// Asks nobody yet.
    pub(super) fn new(links: &'a Links, patience: Duration, holders: Vec<Holder>, ask: F) -> Self {
        let (waiting, under_way) = (holders.into_iter(), Vec::new());
        Self { links, patience, waiting, under_way, answers: FuturesUnordered::new(), ask }
    }

    /// Asks so many more, if there are.
    pub(super) fn ask(&mut self, more: usize) {
        for holder in self.waiting.by_ref().take(more) {
            self.under_way.push(holder.clone());
            self.answers.push((self.ask)(holder));
        }
    }

    /// The next answer; `None` when everybody has answered.
    pub(super) async fn next(&mut self) -> Option<(Holder, T)> {
        loop {
            if self.answers.is_empty() {
                self.ask(1);
            }
            let answer = if self.waiting.len() == 0 {
                self.answers.next().await
            } else {
                match timeout(self.patience, self.answers.next()).await {
                    Ok(answer) => answer,
                    Err(_) => {
                        for slow in &self.under_way {
                            self.links.lags(&slow.link);
                        }
                        self.ask(1);
                        continue;
                    }
                }
            };
            let (holder, answer) = answer?;
            self.under_way.retain(|other| other.place != holder.place);
            return Some((holder, answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_what_answers_take_within_its_bounds() {
        let pace = Pace::default();
        assert_eq!(pace.patience(), PATIENCE_FIRST);
        (0..50).for_each(|_| pace.took(Duration::from_millis(2)));
        assert_eq!(pace.patience(), PATIENCE_FLOOR);
        (0..50).for_each(|_| pace.took(Duration::from_millis(400)));
        let patience = pace.patience();
        assert!(patience > Duration::from_millis(400) && patience < PATIENCE_CEILING);
        (0..50).for_each(|_| pace.took(Duration::from_secs(9)));
        assert_eq!(pace.patience(), PATIENCE_CEILING);
    }
}
