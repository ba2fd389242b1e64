//! A parallel job that loses VMs: `./do job-soak [SEEDS]`. Each seed chooses the program, which VMs are
//! killed, and when.
//!
//! `BLOBCR_SEED` is the first seed.

#![expect(clippy::print_stdout, reason = "this is a program for people")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use blobcr_tests::job_soak::Choice;
use blobcr_tests::seed;

const USAGE: &str = "usage: blobcr-job-soak [SEEDS]";
const SEEDS: u64 = 6;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let seeds = words.next().map_or(Ok(SEEDS), |word| word.parse().context(USAGE))?;
    ensure!(words.next().is_none(), USAGE);
    let first = seed::first()?;
    let mut failed = Vec::new();
    for seed in first..first + seeds {
        let choice = Choice::of(seed);
        println!("BLOBCR_SEED={seed}: {choice}");
        let start = Instant::now();
        let outcome = choice.run(&mut |line| println!("  {line}"));
        let took = start.elapsed().as_secs();
        match outcome {
            Ok(()) => println!("seed {seed}: as if undisturbed, in {took} s"),
            Err(error) => {
                println!("seed {seed}: failed after {took} s: {error:?}");
                failed.push(seed);
            }
        }
    }
    ensure!(failed.is_empty(), "failed: seeds {failed:?}");
    println!("{seeds} seeds: passed");
    Ok(())
}
