//! The integrity tests for as long as one likes: `./do soak [MINUTES]`.
//!
//! Every round takes a seed of its own; the first that fails is named and ends the soak.
//! `BLOBCR_SEED` says which seed is the first.

#![expect(clippy::print_stdout, reason = "this is a program for people")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::integrity::model::{Tally, trial};
use blobcr_tests::integrity::tools::{Engine, fio, fsx};
use blobcr_tests::integrity::{COMMIT_EVERY, check_snapshots, with_commits};
use blobcr_tests::seed;
use rustix::process::Signal;

/// Of the disk that fio and fsx get.
const SIZE: u64 = 128 << 20;
/// Of each engine of fio in a round.
const FIO_TIME: Duration = Duration::from_secs(30);
const FSX_OPERATIONS: u64 = 20_000;
/// Trials of the model in a round.
const TRIALS: u64 = 8;
const ROUNDS_OF_A_TRIAL: usize = 10;
const MINUTES: u64 = 10;

/// fio with each engine, then fsx, on one disk whose snapshots pile up.
fn tools(seed: u64) -> Result<()> {
    let mut cluster = Cluster::start(&[])?;
    let data = noise(seed, SIZE as usize / 2);
    let raw = sparse(&cluster.scratch().join("base.raw"), SIZE, &[(0, &data)])?;
    cluster.import(&raw, "base")?;
    let path = cluster.attach("base", "d")?;
    for engine in Engine::ALL {
        let made =
            with_commits(&path, COMMIT_EVERY, || fio(&path, SIZE, engine, FIO_TIME, seed, None))?;
        check_snapshots(&cluster, &path, &made)?;
        println!("seed {seed}: fio with {engine:?}: {} snapshots verified", made.len());
    }
    let made = with_commits(&path, COMMIT_EVERY, || fsx(&path, FSX_OPERATIONS, seed))?;
    check_snapshots(&cluster, &path, &made)?;
    println!("seed {seed}: fsx: {} snapshots verified", made.len());
    cluster.stop(Signal::TERM)
}

fn main() -> Result<()> {
    let minutes = std::env::args().nth(1).map_or(Ok(MINUTES), |word| word.parse());
    let minutes = minutes.context("usage: blobcr-soak [MINUTES]")?;
    let mut seed = seed::first()?;
    println!("BLOBCR_SEED={seed}, for {minutes} min");
    let (start, time) = (Instant::now(), Duration::from_secs(60 * minutes));
    let mut all = Tally::default();
    loop {
        for seed in seed..seed + TRIALS {
            all += trial(seed, ROUNDS_OF_A_TRIAL)?;
        }
        println!("seeds {seed}..{}: {all:?}", seed + TRIALS);
        if start.elapsed() >= time {
            break;
        }
        tools(seed)?;
        seed += TRIALS;
        if start.elapsed() >= time {
            break;
        }
    }
    ensure!(all.operations > 0 && all.compared > 0, "nothing was compared");
    println!("no byte differed in {} min", start.elapsed().as_secs() / 60);
    Ok(())
}
