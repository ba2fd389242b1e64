//! `./do bench`: runs benchmarks, prints what they found, and keeps it as JSON, plots and a page.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command")]

use std::path::PathBuf;

use blobcr_bench::report::write_page;
use blobcr_bench::suite::{Benchmark, Settings};
use clap::{Parser, ValueEnum};

/// Benchmarks: us and the alternatives by turns, with the ratio.
#[derive(Parser)]
struct Options {
    /// What to run [all of them unless told otherwise]
    #[arg(value_enum)]
    benchmarks: Vec<Benchmark>,
    /// Directory on the disk to measure
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Directory in memory
    #[arg(long, default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// How often each measurement is repeated
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Just enough to see that it works; the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Where JSON, plots and index.html are written
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let settings = Settings {
        disk_dir: options.dir,
        memory_dir: options.memory_dir,
        rounds: options.rounds.max(1),
        quick: options.quick,
    };
    let chosen = match options.benchmarks.as_slice() {
        [] => Benchmark::value_variants(),
        chosen => chosen,
    };
    for benchmark in chosen {
        eprintln!("running {} …", benchmark.name());
        let report = benchmark.run(&settings)?;
        println!("{report}");
        report.write(&options.out)?;
        write_page(&options.out)?;
    }
    println!("{}", options.out.join("index.html").display());
    Ok(())
}
