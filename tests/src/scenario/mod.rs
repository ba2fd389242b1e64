//! The main job, end to end: a real guest boots from the mount, checkpoints itself while it goes on
//! writing, is killed, and resumes from the checkpoint on another disk. The demo shows it, the
//! tests assert it: both run [`resume`].

mod figures;
pub mod own_image;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blobcr_guest::worker::State;

use crate::cluster::Cluster;
use crate::guest_image::GuestImage;
use crate::vm::{Aio, Vm, VmSpec};

pub use figures::Figures;

/// A guest boots in 3 s on an idle machine; this is for a very busy one.
pub(crate) const BOOT: Duration = Duration::from_secs(240);
/// For anything that a running guest does.
const SOON: Duration = Duration::from_secs(120);
/// The step after which the guest's program asks for its checkpoint.
const CHECKPOINT_STEP: u64 = 40;
/// The guest is killed once it has come this far, with files of its own of every step.
const KILL_STEP: u64 = 80;
/// Where the resumed program ends.
const LAST_STEP: u64 = 70;

/// Says what is being done, a line at a time.
pub type Say<'a> = &'a mut dyn FnMut(&str);

/// How QEMU runs.
#[derive(Clone, Copy, Debug)]
pub struct Hypervisor {
    /// How it reads and writes the disk.
    pub aio: Aio,
    /// The user that it runs as; `None`: the caller's.
    pub uid: Option<u32>,
}

/// Runs the main job on `cluster` and returns what it cost.
///
/// # Errors
/// What went otherwise than promised.
pub fn resume(cluster: &Cluster, hypervisor: Hypervisor, say: Say<'_>) -> Result<Figures> {
    say("build the guest: a Debian kernel, an ext4 root, a program that computes");
    let image = readable_by(hypervisor, cluster, &GuestImage::get()?)?;
    let imported =
        timed(say, "import its disk as image debian", || cluster.import(&image.disk, "debian"))?;
    let mut figures = Figures { imported: imported.1, ..Figures::default() };
    let (disk, attach) =
        timed(say, "attach disk first from debian", || cluster.attach("debian", "first"))?;
    figures.attach = attach;
    say(&format!("boot a VM from {}", disk.display()));
    let run = format!(
        "blobcr-guest-worker --dir /root/work --every 50 --checkpoint-at {CHECKPOINT_STEP}"
    );
    let mut vm = boot(cluster, hypervisor, &image, "first", &disk, &run)?;
    say(&vm.wait_for("guest: up", BOOT)?);
    vm.wait_for("worker: fresh start", SOON)?;
    let taken = vm.wait_for(&format!("checkpoint at step {CHECKPOINT_STEP}:"), SOON)?;
    say(&taken);
    figures.take_checkpoint(&taken)?;
    let stable = vm.wait_for(" stable stored_bytes=", SOON)?;
    say(&stable);
    figures.take_stable(&stable)?;
    say(&vm.wait_for(&format!("worker: step {KILL_STEP} "), SOON)?);
    say(&format!("kill -9 the VM (process {}), {KILL_STEP} steps in", vm.pid()));
    vm.kill()?;

    let snapshot = newest_snapshot(cluster, "first")?;
    ensure!(taken.contains(&snapshot), "the newest is {snapshot}, the guest's is in {taken:?}");
    let (disk, attach) = timed(say, &format!("attach disk second from {snapshot}"), || {
        cluster.attach(&snapshot, "second")
    })?;
    figures.attach_snapshot = attach;
    say("boot another VM from it");
    let began = Instant::now();
    let run = format!("blobcr-guest-worker --dir /root/work --every 5 --steps {LAST_STEP}");
    let mut vm = boot(cluster, hypervisor, &image, "second", &disk, &run)?;
    let resumed = vm.wait_for("worker: resumed from", BOOT)?;
    figures.restart = began.elapsed();
    say(&resumed);
    // Not a file of steps 41 and later, not a line too many or too few in its log, and its state
    // is what that many undisturbed steps make.
    for fact in [
        format!("from step {CHECKPOINT_STEP} "),
        format!("newest_file={CHECKPOINT_STEP} "),
        "files_beyond=0 ".to_owned(),
        format!("log_lines={CHECKPOINT_STEP} "),
        "identical=yes".to_owned(),
    ] {
        ensure!(resumed.contains(&fact), "the resumed guest says {resumed:?}, not {fact:?}");
    }
    let done = vm.wait_for("worker: done at step", SOON)?;
    let undisturbed = State::after(LAST_STEP).hash;
    ensure!(
        done.contains(&format!("step {LAST_STEP} hash={undisturbed}")),
        "an undisturbed run ends with {undisturbed}; this one: {done:?}"
    );
    say(&done);
    say("that is what an undisturbed computation ends with");
    vm.wait_until_down(SOON)?;
    Ok(figures)
}

/// The newest stable snapshot of a disk's checkpoint image, as `IMAGE@N`.
pub(crate) fn newest_snapshot(cluster: &Cluster, disk: &str) -> Result<String> {
    let info = cluster.json(&["disk", "info", disk])?;
    let image = info["checkpoint_image"].as_str().context("the disk has no checkpoint image")?;
    let number = info["last_stable"].as_u64().context("the disk has no stable snapshot")?;
    Ok(format!("{image}@{number}"))
}

/// Does something that is announced and timed.
pub(crate) fn timed<T>(
    say: Say<'_>,
    what: &str,
    action: impl FnOnce() -> Result<T>,
) -> Result<(T, Duration)> {
    let began = Instant::now();
    let done = action()?;
    let took = began.elapsed();
    say(&format!("{what}: {} ms", took.as_millis()));
    Ok((done, took))
}

fn boot(
    cluster: &Cluster,
    hypervisor: Hypervisor,
    image: &GuestImage,
    name: &str,
    disk: &Path,
    run: &str,
) -> Result<Vm> {
    let added = cluster.json(&["vm", "add", name, "--disk", name])?;
    let channel = PathBuf::from(added["socket"].as_str().context("no socket")?);
    if let Some(uid) = hypervisor.uid {
        chown(&channel, Some(uid), None)?;
    }
    let spec = VmSpec {
        channel: Some(channel),
        aio: hypervisor.aio,
        uid: hypervisor.uid,
        ..VmSpec::new(image, disk, run)
    };
    Vm::start(&spec, &cluster.scratch().join(format!("vm-{name}")))
}

/// Another user may look through none of the directories that tests make for themselves: opens
/// those of the cluster, and copies the kernel there.
fn readable_by(
    hypervisor: Hypervisor,
    cluster: &Cluster,
    image: &GuestImage,
) -> Result<GuestImage> {
    if hypervisor.uid.is_none() {
        return Ok(image.clone());
    }
    for dir in [cluster.scratch().to_owned(), cluster.dir(), cluster.dir().join("vms")] {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    }
    let copy = |from: &Path| -> Result<PathBuf> {
        let to = cluster.scratch().join(from.file_name().context("no file name")?);
        fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
        Ok(to)
    };
    Ok(GuestImage {
        kernel: copy(&image.kernel)?,
        initrd: copy(&image.initrd)?,
        disk: image.disk.clone(),
    })
}
