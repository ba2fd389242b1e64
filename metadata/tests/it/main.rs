//! Tests of the metadata service through its public interface.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod concurrent;
mod debt;
mod fixture;
mod flaky;
mod images;
mod leases;
mod membership;
mod model;
mod placement;
mod races;
mod rebalance;
mod service;
mod sets;
mod snapshots;
