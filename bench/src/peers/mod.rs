//! The alternatives, as real programs.

pub mod ceph;
pub mod qcow2;
pub mod reflink;
pub mod running_vm;
pub mod storage_daemon;

use std::process::{Command, Stdio};

/// Whether a program says its version when it is asked by that word.
#[must_use]
pub fn installed(program: &str, version: &str) -> bool {
    let tried =
        Command::new(program).arg(version).stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}
