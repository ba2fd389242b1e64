//! Bugs on purpose: the simulation finds each of them within a few seeds.

use blobcr_sim::{Bug, Settings, simulate};

/// Seeds that may pass before one fails.
const SEEDS_MAX: u64 = 60;

/// The first seed that fails with the bug, and passes without it.
fn found(bug: Bug) -> u64 {
    let fails =
        |seed| !simulate(Settings { plant: Some(bug), ..Settings::of(seed) }).violations.is_empty();
    let first = (0..SEEDS_MAX).find(|seed| fails(*seed));
    let first = first.unwrap_or_else(|| panic!("{SEEDS_MAX} seeds do not find {bug:?}"));
    let without = simulate(Settings::of(first)).violations;
    assert!(without.is_empty(), "seed {first} fails without the bug: {without:?}");
    first
}

#[test]
fn a_snapshot_that_is_published_before_its_tree_is_durable_is_found() {
    found(Bug::PublishEarly);
}

#[test]
fn a_collector_that_ignores_leases_is_found() {
    found(Bug::CollectLeased);
}

#[test]
fn a_node_that_acknowledges_before_it_has_synced_is_found() {
    found(Bug::AckUnsynced);
}
