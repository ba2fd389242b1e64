//! Waiting for the answers of several nodes, all of which count.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::timeout;

use super::RemotePool;
use super::read::Answer;
use crate::client::link::NodeLink;
use crate::client::status::NodeError;

/// A node that did not answer the last time is waited for no longer than so, once enough others have
/// answered: one that is back answers at once, and one that is not must not hold every write up until
/// its deadline.
const AWAY_GRACE: Duration = Duration::from_millis(500);

impl RemotePool {
    /// The answers of `links`, in order. A node that is known not to answer is given up early once
    /// `enough` answers are good and nobody else is waited for; one that is slow is waited for.
    pub(super) async fn gather<T, A: Future<Output = Answer<T>>>(
        &self,
        links: &[Arc<NodeLink>],
        asks: impl Iterator<Item = A>,
        enough: usize,
    ) -> Vec<Answer<T>> {
        let mut answers: Vec<Option<Answer<T>>> = links.iter().map(|_| None).collect();
        let mut under_way: FuturesUnordered<_> =
            asks.enumerate().map(|(at, ask)| async move { (at, ask.await) }).collect();
        loop {
            let good = answers.iter().flatten().filter(|answer| answer.is_ok()).count();
            let awaited = || links.iter().zip(&answers).filter(|(_, answer)| answer.is_none());
            let all_away = awaited().all(|(link, _)| self.links.is_away(link.address()));
            let next = if good >= enough && all_away {
                // None when the time is up, as when all have answered.
                timeout(AWAY_GRACE, under_way.next()).await.ok().flatten()
            } else {
                under_way.next().await
            };
            let Some((at, answer)) = next else { break };
            self.links.noted(&links[at], &answer);
            answers[at] = Some(answer);
        }
        let given_up = |(answer, link): (Option<Answer<T>>, &Arc<NodeLink>)| {
            answer.unwrap_or_else(|| {
                self.links.probe(link);
                Err(NodeError::Unreachable("it does not answer".into()))
            })
        };
        answers.into_iter().zip(links).map(given_up).collect()
    }
}
