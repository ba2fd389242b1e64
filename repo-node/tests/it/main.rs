//! Tests of the store and its service from outside.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;
mod damage;
mod durability;
mod model;
mod service;
mod sim;
mod store;
