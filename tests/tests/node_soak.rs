//! The short form of `./do node-soak`.

use std::time::Duration;

use anyhow::{Result, ensure};
use blobcr_tests::node_soak::{Options, soak};

/// With the wipe of a node after it, a minute.
const TIME: Duration = Duration::from_secs(30);
/// Far more than it takes, but where many others use the machine.
const REPAIR: Duration = Duration::from_secs(240);

#[expect(clippy::print_stdout, reason = "shown when the test fails")]
fn short(pool: &str, seed: u64) -> Result<()> {
    let options = Options { size: 16 << 20, ..Options::new(pool, TIME, REPAIR, seed)? };
    let report = soak(&options, &|line| println!("{line}"))?;
    println!("{report:?}");
    ensure!(report.kills >= 3 * options.nodes.1, "{report:?}");
    ensure!(report.snapshots > 5 && report.degraded_max > 0, "{report:?}");
    Ok(())
}

#[test]
fn nodes_of_three_replicas_die_and_one_is_wiped() -> Result<()> {
    short("replica:3", 1)
}

#[test]
fn two_nodes_of_an_erasure_coded_pool_die_at_once_and_one_is_wiped() -> Result<()> {
    short("ec:4+2", 2)
}
