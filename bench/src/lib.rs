//! What the benchmarks share.
//!
//! Every benchmark is a binary in `src/bin/` that runs us and, where there is one, the alternative
//! in the same run, and prints the ratio: the machines are shared, so an absolute time means
//! little. None of them passes or fails.

pub mod latency;
pub mod qcow2;
pub mod spread;
pub mod vm_channel;
