//! Seeds of the simulation that every change must pass. In several tests, so that they share the cores
//! and none takes long.

use std::fmt::Write as _;
use std::ops::Range;

use blobcr_sim::{Settings, simulate};

/// Lines of a failed run's trace that are told.
const TRACE_TOLD: usize = 40;

fn pass(seeds: Range<u64>) {
    for seed in seeds {
        let verdict = simulate(Settings::of(seed));
        if verdict.violations.is_empty() {
            continue;
        }
        let mut told = String::new();
        for line in &verdict.trace[verdict.trace.len().saturating_sub(TRACE_TOLD)..] {
            let _ = writeln!(told, "{line}");
        }
        panic!(
            "seed {seed} (`./do simulate --seed {seed}` replays it): {:#?}\n{told}",
            verdict.violations
        );
    }
}

#[test]
fn seeds_0_to_50() {
    pass(0..50);
}

#[test]
fn seeds_50_to_100() {
    pass(50..100);
}

#[test]
fn seeds_100_to_150() {
    pass(100..150);
}

#[test]
fn seeds_150_to_200() {
    pass(150..200);
}

#[test]
fn seeds_200_to_250() {
    pass(200..250);
}

#[test]
fn seeds_250_to_300() {
    pass(250..300);
}

#[test]
fn seeds_300_to_350() {
    pass(300..350);
}

#[test]
fn seeds_350_to_400() {
    pass(350..400);
}

#[test]
fn seeds_400_to_450() {
    pass(400..450);
}

#[test]
fn seeds_450_to_500() {
    pass(450..500);
}
