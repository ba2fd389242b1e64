//! Jobs under MPICH and Open MPI that take global checkpoints.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

mod application;
mod job;
mod killed;
mod preloaded;
