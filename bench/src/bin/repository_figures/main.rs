//! Figures of the repository: `overhead`, `repair`, `status`, `collect`, `snapshots`, or `all`. Each
//! runs real processes and prints a ratio: to the theory, to what disk and loopback can do in the same
//! run, or to the same with little in it.
//!
//! `cargo build --release -p blobcr-cli -p blobcr-bench && target/release/repository_figures overhead`
#![expect(clippy::print_stdout, reason = "a command")]

mod collect;
mod overhead;
mod repair;
mod snapshots;
mod status;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

const MIB: u64 = 1 << 20;

/// Figures of the repository.
#[derive(Parser)]
struct Options {
    /// What to measure
    figure: Figure,
    /// Directory on the file system to measure
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// A hundredth of the usual size, to see that it works
    #[arg(long)]
    small: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Figure {
    /// Bytes stored by policy, beside the theory
    Overhead,
    /// Repair after the loss of a node, beside plain copies
    Repair,
    /// `status` with 1,000 images of 100 snapshots, beside one image
    Status,
    /// Garbage collection over a million chunks, and its memory
    Collect,
    /// A disk with 10,000 snapshots beside one with 10
    Snapshots,
    /// All of them
    All,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let wanted = |figure| options.figure == figure || options.figure == Figure::All;
    if wanted(Figure::Overhead) {
        overhead::run(&options)?;
    }
    if wanted(Figure::Repair) {
        repair::run(&options)?;
    }
    if wanted(Figure::Status) {
        status::run(&options)?;
    }
    if wanted(Figure::Collect) {
        collect::run(&options)?;
    }
    if wanted(Figure::Snapshots) {
        snapshots::run(&options)?;
    }
    Ok(())
}

impl Options {
    fn scratch(&self) -> anyhow::Result<tempfile::TempDir> {
        Ok(tempfile::Builder::new().prefix("blobcr-figures-").tempdir_in(&self.dir)?)
    }

    /// A hundredth, when that is asked for.
    fn scaled(&self, usual: u64) -> u64 {
        if self.small { usual.div_ceil(100) } else { usual }
    }
}
