//! Nodes that die under load: `./do node-soak [MINUTES] [--pool replica:3|ec:4+2]`. `--repair-wait
//! SECONDS` says how long repair may take at the end.
//!
//! `BLOBCR_SEED` says what is killed when.

#![expect(clippy::print_stdout, reason = "this is a program for people")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blobcr_tests::node_soak::{Options, soak};
use blobcr_tests::seed;

const USAGE: &str =
    "usage: blobcr-node-soak [MINUTES] [--pool replica:3|ec:4+2] [--repair-wait SECONDS]";
const MINUTES: u64 = 10;
/// For all that is owed to be paid: far more than a disk of a few gigabytes takes.
const REPAIR_SECONDS: u64 = 600;

fn options() -> Result<Options> {
    let (mut minutes, mut pool, mut repair) = (MINUTES, "replica:3".to_owned(), REPAIR_SECONDS);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--pool" => pool = words.next().context(USAGE)?,
            "--repair-wait" => repair = words.next().context(USAGE)?.parse().context(USAGE)?,
            number if !number.starts_with('-') => minutes = number.parse().context(USAGE)?,
            _ => bail!(USAGE),
        }
    }
    let seed = seed::first()?;
    let (time, repair) = (Duration::from_secs(60 * minutes), Duration::from_secs(repair));
    Options::new(&pool, time, repair, seed)
}

fn main() -> Result<()> {
    let options = options()?;
    let ((nodes, at_once), seed) = (options.nodes, options.seed);
    println!("BLOBCR_SEED={seed}: {} on {nodes} nodes, {at_once} killed at once", options.pool);
    let start = Instant::now();
    let report = soak(&options, &|line| println!("{line}"))?;
    println!("{report:#?}");
    println!("nothing was lost in {} s: passed", start.elapsed().as_secs());
    Ok(())
}
