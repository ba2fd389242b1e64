//! The demo's scenario, asserted: for each way in which QEMU can read and write the disk, and for
//! a QEMU that runs as another user.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use blobcr_tests::cluster::Cluster;
use blobcr_tests::scenario::{Hypervisor, resume};
use blobcr_tests::vm::Aio;
use rustix::process::Signal;

/// The user nobody: it owns nothing.
const NOBODY: u32 = 65534;

fn a_killed_guest_resumes(nodes: &str, hypervisor: Hypervisor) {
    let mut cluster = Cluster::start(&["--nodes", nodes]).unwrap();
    let mut said = String::new();
    let figures = resume(&cluster, hypervisor, &mut |line| {
        said.push_str(line);
        said.push('\n');
    });
    let figures = figures.unwrap_or_else(|error| panic!("{error:?}\nuntil then:\n{said}"));
    assert!(figures.dirty_bytes > 0 && figures.stored_bytes > 0, "{figures:?}");
    cluster.stop(Signal::INT).unwrap();
}

#[test]
fn with_native_aio() {
    a_killed_guest_resumes("1", Hypervisor { aio: Aio::Native, uid: None });
}

#[test]
fn with_io_uring_over_three_nodes() {
    a_killed_guest_resumes("3", Hypervisor { aio: Aio::IoUring, uid: None });
}

#[test]
fn with_threads_as_another_user() {
    assert!(rustix::process::geteuid().is_root(), "only root can start a VM as another user");
    a_killed_guest_resumes("1", Hypervisor { aio: Aio::Threads, uid: Some(NOBODY) });
}
