//! A channel over vsock. The kernel of a real guest stands for a host's: there it has vsock and virtual
//! machines of its own, whatever this machine's kernel has.

use std::time::Duration;

use anyhow::{Result, ensure};
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::hosted::{BOOT, SOON};
use blobcr_tests::vm::{Vm, VmSpec};

/// A line of `tests/guest/vsock-host`, and what it must contain as well.
const STEPS: [(&str, &str); 23] = [
    ("blobcr-guest: ", "this guest has no vsock"),
    ("guest-without=", "=3"),
    ("blobcr: ", "this host's kernel has no vsock; load its module vhost_vsock"),
    ("guest-cid=", "-device vhost-vsock-pci,guest-cid=42"),
    ("blobcr: ", "the CID 42 is that of the VM web"),
    ("twice=", "=4"),
    ("@2 disk=", "disk=web "),
    ("@2 stable ", "web-"),
    ("web=", "=0"),
    ("blobcr-guest: ", "the host did not answer in time"),
    ("unknown=", "=5"),
    ("host=", "=5"),
    ("unknown-logged=", ""),
    ("host-logged=", ""),
    // The kernel passes on nothing that says another CID than the machine's own.
    ("forged=", "=5"),
    ("forged-connected=", "=0"),
    ("@2 disk=", "disk=db "),
    ("db=", "=0"),
    ("beside=", "=0"),
    ("noise=", ""),
    ("removed=", "=5"),
    ("@3 disk=", "disk=db "),
    ("db-again=", "=0"),
];

#[test]
fn a_vm_is_known_by_its_cid_and_by_nothing_that_it_says() -> Result<()> {
    let image = GuestImage::host()?;
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    image.copy_disk(&disk)?;
    let spec = VmSpec { memory_mib: 512, cpus: 2, ..VmSpec::new(&image, disk, "vsock-host") };
    let mut host = Vm::start(&spec, &dir.path().join("vm"))?;
    host.wait_for("guest: up", BOOT)?;
    for (line, expected) in STEPS {
        let found = host.wait_for(line, SOON)?;
        ensure!(found.contains(expected), "{expected:?} is not in {found:?}:\n{}", host.console());
        let counted = line.ends_with("logged=") || line == "noise=";
        ensure!(!counted || !found.ends_with("=0"), "{found}:\n{}", host.console());
    }
    host.wait_until_down(Duration::from_secs(60))
}
