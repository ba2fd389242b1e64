//! Somebody who reads stable snapshots, all the time, and compares every byte.

use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::{CatalogError, ReadError, Repository, SnapshotReader};
use tokio::time::{sleep, timeout};

use crate::oracle::Stable;
use crate::world::World;

/// One snapshot is given up after so long: its nodes are away.
const PATIENCE: Duration = Duration::from_secs(40);

/// Why a snapshot was not read.
enum Unread {
    /// It may be read later.
    Later(String),
    /// It is lost.
    Lost(String),
}

fn at(stable: &Stable) -> v1::SnapshotRef {
    let image = v1::ImageRef { id: stable.image, name: String::new() };
    v1::SnapshotRef { image: Some(image), number: stable.number }
}

async fn compare(reader: &SnapshotReader, stable: &Stable) -> Result<(), Unread> {
    for index in 0..stable.content.chunks() {
        match reader.chunk(index as u64).await {
            Ok(chunk) if chunk == stable.content.chunk(index) => {}
            Ok(_) => return Err(Unread::Lost(format!("chunk {index} has other bytes"))),
            Err(error) if ReadError::is_damage(&error) => {
                return Err(Unread::Lost(error.to_string()));
            }
            Err(error) => return Err(Unread::Later(error.to_string())),
        }
    }
    Ok(())
}

async fn read(repository: &Repository, stable: &Stable) -> Result<(), Unread> {
    match repository.open(at(stable)).await {
        Ok((_, _, reader)) => compare(&reader, stable).await,
        Err(error @ (CatalogError::NotFound(_) | CatalogError::Precondition(_))) => {
            Err(Unread::Lost(error.to_string()))
        }
        Err(error) => Err(Unread::Later(error.to_string())),
    }
}

/// Reads a snapshot. Says whether it was read; one that is lost is a violation, unless somebody
/// removed it meanwhile.
async fn check(world: &World, repository: &Repository, stable: &Stable) -> Result<(), String> {
    let Stable { image, number, .. } = stable;
    let done = timeout(PATIENCE, read(repository, stable)).await;
    let done = done.unwrap_or_else(|_| Err(Unread::Later("it takes too long".into())));
    match done {
        Ok(()) => {
            world.note(format_args!("read {image}@{number}"));
            Ok(())
        }
        Err(Unread::Later(why)) => {
            world.note(format_args!("did not read {image}@{number}: {why}"));
            Err(why)
        }
        Err(Unread::Lost(why)) => {
            if world.oracle.is_stable(*image, *number) {
                world.oracle.violation(format!("{image}@{number} cannot be read: {why}"));
            }
            Ok(())
        }
    }
}

/// Reads for ever.
pub async fn run(world: World, host: String, metadata: Vec<String>) {
    loop {
        // Without what an earlier one knew.
        let options = crate::options(&world, &host);
        let Ok(repository) = Repository::connect(&metadata, options).await else { return };
        for _ in 0..world.dice.of(1..12) {
            sleep(world.dice.ms(50..4000)).await;
            let stable = world.oracle.stable();
            if stable.is_empty() {
                continue;
            }
            let one = &stable[world.dice.index(stable.len())];
            // Whoever cannot be read now is tried again at the end.
            drop(check(&world, &repository, one).await);
        }
    }
}

/// Reads every stable snapshot. All must be there, now that nothing is wrong any more.
pub async fn read_all(world: &World, repository: &Repository) {
    for stable in world.oracle.stable() {
        let mut last = Ok(());
        for _ in 0..5 {
            last = check(world, repository, &stable).await;
            if last.is_ok() {
                break;
            }
            sleep(Duration::from_secs(3)).await;
        }
        if let Err(why) = last {
            let Stable { image, number, .. } = stable;
            world.oracle.violation(format!("{image}@{number} cannot be read at the end: {why}"));
        }
    }
}
