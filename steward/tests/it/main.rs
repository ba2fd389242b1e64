//! The steward's tasks over the real services.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod fixture;
mod model;
mod races;
mod repair;
mod scrub;
