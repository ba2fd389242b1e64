//! Runs the tasks in turn.

use std::time::Duration;

use blobcr_repository::Repository;
use tokio::time::{Instant, sleep_until};

use crate::collect::{CollectOptions, collect};
use crate::scrub::{ScrubOptions, scrub};

/// When to do what.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// From the end of one collection to the next.
    pub collect_every: Duration,
    /// From the end of one scrub to the next.
    pub scrub_every: Duration,
    /// How to scrub.
    pub scrub: ScrubOptions,
}

/// Works for ever. Dropping the future at any point does no harm. The first round comes after the
/// times of the schedule: a start, or many in a row, costs nothing.
pub async fn run(repository: &Repository, schedule: Schedule) {
    let mut collection = Instant::now() + schedule.collect_every;
    let mut scrubbing = Instant::now() + schedule.scrub_every;
    loop {
        sleep_until(collection.min(scrubbing)).await;
        if Instant::now() >= collection {
            run_collection(repository).await;
            collection = Instant::now() + schedule.collect_every;
        }
        if Instant::now() >= scrubbing {
            run_scrub(repository, schedule.scrub).await;
            scrubbing = Instant::now() + schedule.scrub_every;
        }
    }
}

async fn run_collection(repository: &Repository) {
    match collect(repository, CollectOptions::default()).await {
        Ok(done) => tracing::info!(
            bound = done.bound,
            roots = done.roots,
            records = done.records(),
            bytes = done.bytes(),
            nodes_left_out = done.nodes.iter().filter(|node| node.failed.is_some()).count(),
            "collected garbage"
        ),
        Err(error) => tracing::warn!(%error, "garbage was not collected; trying again later"),
    }
}

async fn run_scrub(repository: &Repository, options: ScrubOptions) {
    match scrub(repository, options).await {
        Ok(done) => {
            let sum = |of: fn(&crate::NodeScrub) -> u64| done.nodes.iter().map(of).sum::<u64>();
            tracing::info!(
                records = sum(|node| node.records),
                damaged = sum(|node| node.damaged),
                missing = sum(|node| node.missing),
                mended = sum(|node| node.mended),
                lost = done.lost,
                "scrubbed"
            );
            for id in &done.lost_ids {
                tracing::error!(%id, "no good copy is left of this record");
            }
        }
        Err(error) => tracing::warn!(%error, "not scrubbed; trying again later"),
    }
}
