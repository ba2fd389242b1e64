//! The steward, at work at any time and killed at any time.

use std::time::Duration;

use blobcr_repository::Repository;
use blobcr_steward::{CollectOptions, ScrubOptions, collect, scrub};
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
    loop {
        sleep(world.dice.ms(500..15_000)).await;
        if world.dice.chance(0.75) {
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
            match timeout(Duration::from_secs(120), scrub(&repository, pace)).await {
                Ok(Ok(_)) => world.note(format_args!("{host}: scrubbed")),
                Ok(Err(error)) => world.note(format_args!("{host}: scrub: {error}")),
                Err(_) => world.note(format_args!("{host}: scrub: given up")),
            }
        }
    }
}

/// Works until there is nothing left to do.
pub async fn settle(world: &World, repository: &Repository) {
    for round in 0.. {
        let mended = match scrub(repository, ScrubOptions::default()).await {
            Ok(done) => done.nodes.iter().map(|node| node.mended).sum::<u64>(),
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
        world.note(format_args!("settling: {mended} mended, {collected} collected"));
        if mended == 0 && collected == 0 {
            return;
        }
        if round == ROUNDS_MAX {
            world.oracle.violation("the steward always finds something to do".into());
            return;
        }
        sleep(Duration::from_secs(2)).await;
    }
}
