//! Runs seeds of the simulation, and says which fail.
#![expect(clippy::print_stdout, reason = "a command")]

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use blobcr_sim::{Bug, Settings, Verdict, simulate};
use clap::{Parser, ValueEnum};

/// Lines of a failed run's trace that are shown.
const TRACE_SHOWN: usize = 60;

#[derive(Parser)]
#[command(about = "Run seeds of the deterministic simulation, and say which fail")]
struct Args {
    /// One seed: its verdict and the end of its trace
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Several, as FROM..TO
    #[arg(long, value_parser = range)]
    seeds: Option<Range<u64>>,
    /// A bug on purpose
    #[arg(long)]
    plant: Option<Plant>,
    /// Show the whole trace of a single seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Tell what becomes of the objects whose identities begin with these digits
    #[arg(long, requires = "seed")]
    follow: Option<String>,
    /// Go on after a seed that failed
    #[arg(long)]
    keep_going: bool,
    /// Runs at a time
    #[arg(long, default_value_t = 1)]
    jobs: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Plant {
    PublishEarly,
    CollectLeased,
    AckUnsynced,
}

impl From<Plant> for Bug {
    fn from(plant: Plant) -> Self {
        match plant {
            Plant::PublishEarly => Self::PublishEarly,
            Plant::CollectLeased => Self::CollectLeased,
            Plant::AckUnsynced => Self::AckUnsynced,
        }
    }
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parse = || {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    };
    parse().filter(|range| range.start < range.end).ok_or_else(|| "write FROM..TO".to_owned())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let plant = args.plant.map(Bug::from);
    let Some(seed) = args.seed else { return many(&args, plant) };
    let verdict =
        simulate(Settings { seed, plant, whole_trace: args.trace, follows: args.follow.clone() });
    let shown = if args.trace { usize::MAX } else { TRACE_SHOWN };
    show(&verdict, shown);
    println!("{} events, hash {:016x}", verdict.events, verdict.hash);
    if verdict.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show(verdict: &Verdict, lines: usize) {
    let from = verdict.trace.len().saturating_sub(lines);
    verdict.trace[from..].iter().for_each(|line| println!("{line}"));
    verdict.violations.iter().for_each(|what| println!("VIOLATION: {what}"));
    let Verdict { seed, published, deleted, .. } = verdict;
    let word = if verdict.violations.is_empty() { "passed" } else { "FAILED" };
    println!("seed {seed} {word}: {published} snapshots published, {deleted} records deleted");
}

fn many(args: &Args, plant: Option<Bug>) -> ExitCode {
    let seeds = args.seeds.clone().unwrap_or(0..100);
    let begin = Instant::now();
    let (mut failed, mut published, mut deleted, mut events) = (0u64, 0, 0, 0);
    let mut next = seeds.start;
    while next < seeds.end {
        let end = (next + args.jobs.max(1)).min(seeds.end);
        let run =
            |seed| std::thread::spawn(move || simulate(Settings { plant, ..Settings::of(seed) }));
        let runs: Vec<_> = (next..end).map(run).collect();
        for run in runs {
            let Ok(verdict) = run.join() else { return ExitCode::FAILURE };
            published += verdict.published;
            deleted += verdict.deleted;
            events += verdict.events;
            if !verdict.violations.is_empty() {
                failed += 1;
                show(&verdict, if args.keep_going { 0 } else { TRACE_SHOWN });
            }
        }
        next = end;
        let done = next - seeds.start;
        if done.is_multiple_of(100) || next == seeds.end || (failed > 0 && !args.keep_going) {
            println!(
                "{done} seeds in {:.1} s: {failed} failed; {published} snapshots published, \
                 {deleted} records deleted, {events} events",
                begin.elapsed().as_secs_f64()
            );
        }
        if failed > 0 && !args.keep_going {
            break;
        }
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
