//! Figures of real guests under QEMU: `neighbour`, `job`, or `all`. Each compares ways of the same work in
//! one run, taken by turns, and prints medians and how far they are apart.
//!
//! `cargo build --release -p blobcr-cli -p blobcr-bench && target/release/guest_figures job`
#![expect(clippy::print_stdout, reason = "a command")]

mod job;
mod neighbour;
mod remote;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use serde_json::json;

/// Figures of real guests under QEMU.
#[derive(Parser)]
struct Options {
    /// What to measure
    figure: Figure,
    /// Directory on the file system to measure
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// How often each way is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long a neighbour is watched each time
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Points in a row, and rows, of the job's field of 8-byte numbers
    #[arg(long, default_value_t = 1024)]
    side: u32,
    /// Iterations of the job; every tenth ends with a checkpoint
    #[arg(long, default_value_t = 200)]
    iterations: u64,
    /// Print JSON on stdout instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Figure {
    /// What a disk's user loses beside a guest that calls CHECKPOINT in a loop
    Neighbour,
    /// What checkpoints cost an MPI job, beside copies of its state and stopped machines
    Job,
    /// All of them
    All,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let wanted = |figure| options.figure == figure || options.figure == Figure::All;
    let neighbour = wanted(Figure::Neighbour).then(|| neighbour::run(&options)).transpose()?;
    let job = wanted(Figure::Job).then(|| job::run(&options)).transpose()?;
    if options.json {
        let all = json!({ "neighbour": neighbour, "job": job });
        println!("{}", serde_json::to_string_pretty(&all)?);
    }
    Ok(())
}

impl Options {
    fn scratch(&self) -> anyhow::Result<tempfile::TempDir> {
        let dir = std::path::absolute(&self.dir)?;
        Ok(tempfile::Builder::new().prefix("blobcr-figures-").tempdir_in(dir)?)
    }
}
