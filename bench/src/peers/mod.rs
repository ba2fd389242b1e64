//! The alternatives, as real programs.

pub mod storage_daemon;
