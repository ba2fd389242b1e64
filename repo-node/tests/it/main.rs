//! Tests of the store and its service from outside.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;
mod service;
mod store;
