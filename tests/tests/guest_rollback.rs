//! Everything that a guest did to its files after a CHECKPOINT is undone by a restart from it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::same;
use blobcr_tests::ext4::Ext4;
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::vm::{Vm, VmSpec};

/// A guest boots in 3 s on an idle machine; this is for a very busy one.
const BOOT: Duration = Duration::from_secs(240);
/// For anything that a running guest does.
const SOON: Duration = Duration::from_secs(180);

/// What `rollback list NAME` prints: a line or two for each file, in order.
fn listing(vm: &mut Vm, name: &str) -> Result<Vec<String>> {
    let begin = format!("list {name} begins\n");
    vm.wait_for(begin.trim_end(), BOOT)?;
    vm.wait_for(&format!("list {name} ends"), SOON)?;
    let console = vm.console();
    let (_, after) = console.split_once(&begin).context("a listing")?;
    let (list, _) = after.split_once(&format!("list {name} ends")).context("its end")?;
    let list: Vec<String> = list.lines().map(str::to_owned).collect();
    ensure!(list.len() > 500, "a listing of {} lines: {list:?}", list.len());
    Ok(list)
}

/// Boots a disk only to list what is on it.
fn listing_of(image: &GuestImage, disk: &Path, name: &str, dir: &Path) -> Result<Vec<String>> {
    let mut vm = Vm::start(&VmSpec::new(image, disk, format!("rollback list {name}")), dir)?;
    let list = listing(&mut vm, name)?;
    vm.wait_until_down(SOON)?;
    Ok(list)
}

/// Lines of one that the other lacks, for a message.
fn differences<'a>(one: &'a [String], other: &[String]) -> Vec<&'a String> {
    one.iter().filter(|line| !other.contains(line)).collect()
}

#[test]
fn whatever_was_done_to_files_after_a_checkpoint_is_undone() -> Result<()> {
    let image = GuestImage::get()?;
    let cluster = Cluster::start(&[])?;
    cluster.import(&image.disk, "debian")?;
    let disk = cluster.attach("debian", "d")?;
    let added = cluster.json(&["vm", "add", "vm", "--disk", "d", "--group", "job"])?;
    let run = "rollback make; rollback list before; \
               blobcr-guest checkpoint --set $(blobcr-guest begin-set --vms 1); \
               rollback change; echo changed=$?; \
               blobcr-guest wait --timeout 120; rollback list after; sleep 100000";
    let channel = Some(added["socket"].as_str().context("a socket")?.into());
    let spec = VmSpec { channel, ..VmSpec::new(&image, &disk, run) };
    let mut vm = Vm::start(&spec, &cluster.scratch().join("vm"))?;
    let before = listing(&mut vm, "before")?;
    // Otherwise the error has the console's end, with what failed.
    vm.wait_for("changed=0", SOON)?;
    vm.wait_for(" stable stored_bytes=", SOON)?;
    let after = listing(&mut vm, "after")?;
    vm.kill()?;

    // Without a rollback the changes are there: they had reached the disk.
    let killed = listing_of(&image, &disk, "killed", &cluster.scratch().join("killed"))?;
    ensure!(killed == after, "synced, and gone: {:?}", differences(&after, &killed));
    let changed = differences(&before, &after).len();
    ensure!(changed > 50, "only {changed} lines of the listing changed");

    let restarted = cluster.json(&["set", "restart", "job"])?;
    let fresh = restarted["vms"][0]["disks"][0]["path"].as_str().context("a disk")?.to_owned();
    let copy = Ext4::copy_of(Path::new(&fresh), &cluster.scratch().join("copy"))?;
    copy.replay()?;
    copy.check()?;
    let again = listing_of(&image, Path::new(&fresh), "again", &cluster.scratch().join("again"))?;
    let (lost, kept) = (differences(&before, &again), differences(&again, &before));
    ensure!(again == before, "not undone: {kept:#?}\nlost: {lost:#?}");

    // The same where the disk is: each byte of it is the snapshot's again.
    cluster.json(&["vm", "remove", "vm"])?;
    cluster.json(&["disk", "rollback", "d"])?;
    let info = cluster.json(&["disk", "info", "d"])?;
    let image = info["checkpoint_image"].as_str().context("a checkpoint image")?;
    let snapshot = cluster.mount().join(format!("images/{image}/{}.raw", info["last_stable"]));
    same(&disk, &snapshot)
}
