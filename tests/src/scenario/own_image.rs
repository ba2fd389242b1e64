//! The main job with an image of the user's own, which boots by its own boot loader and knows
//! nothing of us: the host asks for the checkpoint.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Say, newest_snapshot, timed};
use crate::cluster::Cluster;
use crate::disk_file::same;
use crate::vm::{Aio, Boot, Vm, VmSpec};

/// How long the guest runs before the checkpoint, after it, and after the restart. Long enough
/// to boot under emulation.
const RUN: Duration = Duration::from_secs(20);

/// Runs an image of any operating system from the mount, checkpoints it, kills it, and starts it
/// again from the checkpoint.
///
/// # Errors
/// What went otherwise than promised.
pub fn resume(cluster: &Cluster, file: &Path, say: Say<'_>) -> Result<()> {
    timed(say, &format!("import {}", file.display()), || cluster.import(file, "own"))?;
    let (disk, _) = timed(say, "attach disk first", || cluster.attach("own", "first"))?;
    let mut vm = start(cluster, "first", &disk, say)?;
    let (taken, _) = timed(say, "checkpoint it while it runs, and wait until stable", || {
        cluster.json(&["disk", "checkpoint", "first", "--wait"])
    })?;
    let figure = |key: &str| taken[key].as_u64().with_context(|| format!("no {key} in {taken}"));
    say(&format!(
        "downtime {} µs, dirty {} KiB, stored {} KiB, stable after {} ms",
        figure("downtime_us")?,
        figure("dirty_bytes")?.div_ceil(1024),
        figure("stored_bytes")?.div_ceil(1024),
        figure("persist_ms")?
    ));
    sleep(RUN);
    say(&format!("kill -9 the VM (process {})", vm.pid()));
    vm.kill()?;
    let snapshot = newest_snapshot(cluster, "first")?;
    let (disk, _) = timed(say, &format!("attach disk second from {snapshot}"), || {
        cluster.attach(&snapshot, "second")
    })?;
    let frozen = cluster.mount().join("images").join(format!("{}.raw", snapshot.replace('@', "/")));
    timed(say, "compare every byte of it with the snapshot", || same(&disk, &frozen))?;
    start(cluster, "second", &disk, say)?.kill()
}

fn start(cluster: &Cluster, name: &str, disk: &Path, say: Say<'_>) -> Result<Vm> {
    say(&format!("boot a VM from {} by its own boot loader", disk.display()));
    let spec = VmSpec { memory_mib: 1024, ..VmSpec::of(Boot::Firmware, disk, Aio::Native) };
    let dir = cluster.scratch().join(format!("vm-{name}"));
    let mut vm = Vm::start(&spec, &dir)?;
    sleep(RUN);
    ensure!(!vm.has_ended()?, "the VM ended: {}", fs::read_to_string(dir.join("qemu.err"))?);
    let console = vm.console();
    let last: Vec<&str> = console.lines().rev().take(5).collect();
    let shown = if last.is_empty() { "nothing yet".to_owned() } else { last.join(" | ") };
    say(&format!("it runs; the end of its serial console, newest first: {shown}"));
    Ok(vm)
}
