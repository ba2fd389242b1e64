//! Benchmarks.
//!
//! [`suite`] is what `./do bench` runs: us and the alternatives by turns in the same run, with the
//! ratio, because the machines are shared and an absolute time means little. [`report`] is what
//! becomes of the figures, [`peers`] are the alternatives. Other programs in `src/bin/` look at one
//! part each. None of them passes or fails.

pub mod calls;
pub mod file_layout;
pub mod fio;
pub mod fio_log;
pub mod latency;
pub mod mpi_job;
pub mod peers;
pub mod processor_time;
pub mod random_bytes;
pub mod report;
pub mod spread;
pub mod suite;
pub mod vm_channel;
