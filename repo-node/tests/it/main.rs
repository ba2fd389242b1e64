//! Tests of the store and its service from outside.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests too")]

mod common;
mod compaction;
mod damage;
mod durability;
mod model;
mod service;
mod store;
