//! The alternatives, as real programs.

pub mod running_vm;
pub mod storage_daemon;
