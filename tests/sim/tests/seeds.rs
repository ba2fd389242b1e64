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
fn seeds_0_to_125() {
    pass(0..125);
}

#[test]
fn seeds_125_to_250() {
    pass(125..250);
}

#[test]
fn seeds_250_to_375() {
    pass(250..375);
}

#[test]
fn seeds_375_to_500() {
    pass(375..500);
}
