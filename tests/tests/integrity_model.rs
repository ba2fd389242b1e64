//! A disk through the mount against plain bytes. `BLOBCR_SEED=N` replays a trial that failed.

use anyhow::Result;
use blobcr_tests::integrity::model::{Tally, trial};

/// Trials of one run of the tests; the soak has more.
const TRIALS: u64 = 4;
/// Restarts of a trial.
const ROUNDS: usize = 6;

#[test]
fn a_disk_and_its_snapshots_are_what_plain_bytes_are_through_kills_and_rollbacks() -> Result<()> {
    let given = std::env::var("BLOBCR_SEED").ok().map(|seed| seed.parse::<u64>()).transpose()?;
    let mut all = Tally::default();
    for seed in given.map_or(0..TRIALS, |seed| seed..seed + 1) {
        println!("BLOBCR_SEED={seed}");
        let tally = trial(seed, ROUNDS)?;
        println!("{tally:?}");
        all += tally;
    }
    assert!(all.operations > 100 && all.compared > 10 && all.kills > 0, "{all:?}");
    Ok(())
}
