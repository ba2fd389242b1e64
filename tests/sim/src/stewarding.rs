//! The steward, at work at any time and killed at any time.

use std::time::Duration;

use blobcr_proto::v1::ScrubProgress;
use blobcr_repository::Repository;
use blobcr_steward::{
    CollectOptions, NodeCollection, RepairOptions, Repairer, Scrub, ScrubError, ScrubOptions,
    collect, scrub,
};
use tokio::time::{sleep, timeout};

use crate::world::World;

/// So little memory that a collection needs several passes, now and then.
const LITTLE_BYTES: usize = 1 << 10;
/// What a pass over all of a run's trees takes: the usual budget would be mostly page faults.
const ENOUGH_BYTES: usize = 32 << 10;
/// Rounds of the steward until nothing changes any more; more would be none of its work.
const ROUNDS_MAX: usize = 8;

fn collecting(bytes: usize) -> CollectOptions {
    CollectOptions { mark_bytes: bytes, visited_bytes: bytes, ..CollectOptions::default() }
}

/// Works for ever. Dropped at any point, it must do no harm.
pub async fn run(world: World, host: String, metadata: Vec<String>) {
    let Ok(repository) = Repository::connect(&metadata, crate::options(&world, &host)).await else {
        return;
    };
    let mut repairer = Repairer::new(repository.clone(), RepairOptions::default());
    loop {
        sleep(world.dice.ms(500..15_000)).await;
        if world.dice.chance(0.4) {
            match timeout(Duration::from_secs(120), repairer.round()).await {
                Ok(Ok(done)) => world.note(format_args!("{host}: repaired: {done:?}")),
                Ok(Err(error)) => world.note(format_args!("{host}: repair: {error}")),
                Err(_) => world.note(format_args!("{host}: repair: given up")),
            }
        } else if world.dice.chance(0.75) {
            let bytes = if world.dice.chance(0.2) { LITTLE_BYTES } else { ENOUGH_BYTES };
            match collect(&repository, collecting(bytes)).await {
                Ok(done) => world.note(format_args!(
                    "{host}: collected {} records before {}",
                    done.records(),
                    done.bound
                )),
                Err(error) => world.note(format_args!("{host}: collection: {error}")),
            }
        } else {
            let pace = ScrubOptions::default();
            // A scrub of a shaky cluster may take long, and the collector has its turn too.
            match timeout(Duration::from_secs(120), scrubbed(&repository, pace)).await {
                Ok(Ok(_)) => world.note(format_args!("{host}: scrubbed")),
                Ok(Err(error)) => world.note(format_args!("{host}: scrub: {error}")),
                Err(_) => world.note(format_args!("{host}: scrub: given up")),
            }
        }
    }
}

/// Works until there is nothing left to do at the nodes with these ids, which are all there are.
pub async fn settle(world: &World, repository: &Repository, nodes: &[String]) {
    let mut repairer = Repairer::new(repository.clone(), RepairOptions::default());
    for round in 0.. {
        let owing = match repairer.round().await {
            Ok(done) => {
                world.note(format_args!("{done:?}"));
                // What waits for nodes that are lost is an operator's business.
                let lost = |reason: &String| {
                    reason.strip_prefix("node ").is_some_and(|id| !nodes.iter().any(|n| n == id))
                };
                let waits = !done.waits_for.is_empty() && done.waits_for.iter().all(lost);
                if waits { 0 } else { done.partitions }
            }
            Err(error) => {
                world.note(format_args!("repair: {error}"));
                1
            }
        };
        let mended = match scrubbed(repository, ScrubOptions::default()).await {
            Ok(done) => done.nodes.iter().map(|node| node.found.mended).sum::<u64>(),
            Err(error) => {
                world.note(format_args!("scrub: {error}"));
                1
            }
        };
        let collected = match collect(repository, collecting(ENOUGH_BYTES)).await {
            Ok(done) => {
                let failed =
                    |node: &&NodeCollection| node.failed.is_some() && nodes.contains(&node.node);
                done.records() + done.nodes.iter().filter(failed).count() as u64
            }
            Err(error) => {
                world.note(format_args!("collection: {error}"));
                1
            }
        };
        world.note(format_args!(
            "settling: {owing} to repair, {mended} mended, {collected} collected"
        ));
        if owing == 0 && mended == 0 && collected == 0 {
            return;
        }
        if round == ROUNDS_MAX {
            world.oracle.violation("the steward always finds something to do".into());
            return;
        }
        // Leases of writers that died run out meanwhile.
        sleep(Duration::from_secs(15)).await;
    }
}

async fn scrubbed(repository: &Repository, pace: ScrubOptions) -> Result<Scrub, ScrubError> {
    scrub(repository, pace, ScrubProgress::default(), &|_| ()).await
}
