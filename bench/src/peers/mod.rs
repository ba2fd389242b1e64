//! The alternatives, as real programs.

pub mod qcow2;
pub mod reflink;
pub mod running_vm;
pub mod storage_daemon;
