//! Tests of the metadata service through its public interface.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod collection;
mod concurrent;
mod debt;
mod etcd;
mod fixture;
mod flaky;
mod images;
mod leases;
mod membership;
mod migrate;
mod model;
mod pins;
mod placement;
mod races;
mod rebalance;
mod retire;
mod service;
mod sets;
mod snapshots;
mod steward;
mod traces;
