//! The steward, at work at any time and killed at any time.

use std::time::Duration;

use blobcr_proto::v1::ScrubProgress;
use blobcr_repository::Repository;
use blobcr_steward::{
    CollectOptions, RepairOptions, Repairer, Scrub, ScrubError, ScrubOptions, collect, scrub,
};
use tokio::time::{sleep, timeout};

use crate::world::World;

/// So little memory that a collection needs several passes.
const MARK_BYTES: usize = 1 << 10;
const VISITED_BYTES: usize = 1 << 10;
/// Rounds of the steward until nothing changes any more; more would be none of its work.
const ROUNDS_MAX: usize = 8;

fn collecting() -> CollectOptions {
    let (mark_bytes, visited_bytes) = (MARK_BYTES, VISITED_BYTES);
    CollectOptions { mark_bytes, visited_bytes, ..CollectOptions::default() }
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
            match collect(&repository, collecting()).await {
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

/// Works until there is nothing left to do.
pub async fn settle(world: &World, repository: &Repository) {
    let mut repairer = Repairer::new(repository.clone(), RepairOptions::default());
    for round in 0.. {
        let owing = match repairer.round().await {
            Ok(done) => done.partitions,
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
        let collected = match collect(repository, collecting()).await {
            Ok(done) if done.nodes.iter().any(|node| node.failed.is_some()) => 1,
            Ok(done) => done.records(),
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
