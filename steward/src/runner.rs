//! Runs the tasks side by side, while this steward leads.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::Repository;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::collect::{CollectOptions, collect};
use crate::lead::{self, Told};
use crate::repair::{LOOK_EVERY, RepairOptions, Repairer};
use crate::retire::{RETIRE_EVERY, retire};
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
    /// How to repair.
    pub repair: RepairOptions,
}

/// Works for ever, whenever it leads the stewards. `holder` is another name for each process.
/// Dropping the future at any point does no harm. Repair begins at once; the first collection and
/// the first scrub come after the times of the schedule: a start, or many in a row, costs nothing.
pub async fn run(repository: Repository, holder: String, schedule: Schedule) {
    let repository = &repository;
    let repairer = Repairer::new(repository.clone(), schedule.repair);
    let (scrub, _) = watch::channel(None);
    let told = Told { repair: repairer.progress(), scrub };
    let (leads, leading) = watch::channel(false);
    let catalog = Arc::clone(repository.catalog());
    let begun = Instant::now();
    let work = async {
        let mut repairer = repairer;
        let mut led = leading.clone();
        let mut collection = begun + schedule.collect_every;
        let mut scrubbing = begun + schedule.scrub_every;
        loop {
            // An error means that the sender is gone, and it is not.
            let _ = led.wait_for(|leads| *leads).await;
            tracing::info!("this steward leads");
            let mut lost = leading.clone();
            tokio::select! {
                _ = lost.wait_for(|leads| !*leads) => tracing::info!("another steward leads"),
                () = repairs(&mut repairer) => {}
                () = retirements(repository) => {}
                () = collections(repository, schedule.collect_every, &mut collection) => {}
                () = scrubs(repository, schedule, &told.scrub, &mut scrubbing) => {}
            }
        }
    };
    tokio::select! {
        () = lead::take_part(catalog, holder, &told, &leads) => {}
        () = work => {}
    }
}

/// Lets another steward lead at once, for one that has stopped.
pub async fn resign(repository: &Repository, holder: String) {
    lead::resign(&**repository.catalog(), holder).await;
}

/// Never returns.
async fn repairs(repairer: &mut Repairer) {
    loop {
        match repairer.round().await {
            Ok(done) if done.paid + done.settled > 0 => {
                let left = done.partitions - done.paid.max(done.settled).min(done.partitions);
                tracing::info!(done.paid, done.settled, left, "repaired");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "not repaired; trying again soon"),
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Never returns.
async fn retirements(repository: &Repository) {
    loop {
        match retire(repository).await {
            Ok(done) if done.sets > 0 => {
                tracing::info!(done.sets, done.snapshots, "gave up old checkpoint sets");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "old sets were not given up; trying again soon"),
        }
        sleep(RETIRE_EVERY).await;
    }
}

/// Never returns.
async fn collections(repository: &Repository, every: Duration, next: &mut Instant) {
    loop {
        sleep_until(*next).await;
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
        *next = Instant::now() + every;
    }
}

/// Never returns. One that was broken off goes on at once.
async fn scrubs(
    repository: &Repository,
    schedule: Schedule,
    place: &watch::Sender<Option<v1::ScrubProgress>>,
    next: &mut Instant,
) {
    loop {
        let from = (*place.borrow()).unwrap_or_default();
        if !from.under_way {
            sleep_until(*next).await;
        }
        let from = if from.under_way { from } else { v1::ScrubProgress::default() };
        let tell = |at| {
            place.send_replace(Some(at));
        };
        match scrub(repository, schedule.scrub, from, &tell).await {
            Ok(done) => {
                let sum = |of: fn(&crate::Tally) -> u64| {
                    done.nodes.iter().map(|node| of(&node.found)).sum::<u64>()
                };
                tracing::info!(
                    records = sum(|found| found.records),
                    damaged = sum(|found| found.damaged),
                    missing = sum(|found| found.missing),
                    mended = sum(|found| found.mended),
                    lost = done.lost,
                    "scrubbed"
                );
                for id in &done.lost_ids {
                    tracing::error!(%id, "no good copy is left of this record");
                }
                *next = Instant::now() + schedule.scrub_every;
            }
            Err(error) => {
                tracing::warn!(%error, "not scrubbed; trying again later");
                sleep(LOOK_EVERY).await;
            }
        }
    }
}
