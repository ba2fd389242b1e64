//! A thousand disks of one snapshot, and the step of an agent that has one of them.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{allocated_below, noise, sparse};
use blobcr_tests::mounted::MountedDisk;

use super::{CALL, COMMAND, GIB, MIB, QEMU, RBD, REFLINK, SUBJECTS, reflinks, timed};
use crate::calls::Calls;
use crate::peers::qcow2::Qcow2;
use crate::report::{Bound, Report, Table};
use crate::suite::Settings;

const SIZE: u64 = 64 * GIB;
const SECONDS: &str = "all of them, s";
const DISK: &str = "of the disk each, KiB";
const MEMORY: &str = "of memory each, KiB";
const STEPS: u64 = 50;

pub(super) fn measure(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let count = settings.size(1000, 20);
    let cluster = settings.cluster(&settings.disk_dir, &[])?;
    let calls = Calls::to(&cluster)?;
    let reflinks = reflinks(&cluster, report);
    let data = noise(1, 64 * MIB as usize);
    let raw = sparse(&cluster.scratch().join("raw"), SIZE, &[(0, &data)])?;
    cluster.import(&raw, "base")?;
    if let Some(reflinks) = &reflinks {
        sparse(&reflinks.path("base"), SIZE, &[(0, &data)])?;
    }
    let title = format!("Fork: {count} disks of one snapshot");
    let mut table = Table::new(&title, "s or KiB", false, &SUBJECTS[..RBD]);
    let mut list = Table::new(&format!("List {count} disks"), "ms", false, &SUBJECTS[..2]);
    for round in 0..settings.rounds {
        let prefix = format!("fork-{round}");
        let memory = memory_kib(&cluster)?;
        let names: Vec<_> = (1..=count).map(|number| format!("{prefix}-{number}")).collect();
        table.add(SECONDS, CALL, calls.fork(("base", 1), names.clone())?.as_secs_f64());
        if round == 0 {
            // Later, the process uses again what it had already.
            table.add(MEMORY, CALL, (memory_kib(&cluster)? - memory) / count as f64);
        }
        let disks = cluster.dir().join("mirror/disks");
        table.add(DISK, CALL, allocated_below(&disks)? as f64 / 1024.0 / count as f64);
        list.add("disk list", CALL, calls.list_disks()?.as_secs_f64() * 1e3);
        let command = || cluster.json(&["disk", "list"]);
        list.add("disk list", COMMAND, timed(command)?.as_secs_f64() * 1e3);
        names.iter().try_for_each(|name| calls.detach(name).map(drop))?;
        let (name, number) = (format!("command-{round}"), count.to_string());
        let command = || cluster.json(&["disk", "fork", "base", &name, "--count", &number]);
        table.add(SECONDS, COMMAND, timed(command)?.as_secs_f64());
        (1..=count).try_for_each(|number| calls.detach(&format!("{name}-{number}")).map(drop))?;
        qemu(&cluster, &raw, count, &mut table)?;
        if let Some(reflinks) = &reflinks {
            let all =
                || (0..count).try_for_each(|n| reflinks.copy("base", &format!("f{n}")).map(drop));
            table.add(SECONDS, REFLINK, timed(all)?.as_secs_f64());
        }
    }
    let median = |label: &str| Some(table.row(label)?.spread(CALL)?.median);
    let what = format!("fork × {count} (the call)");
    report.claim(&what, Bound::AtMost(2.0), median(SECONDS), "s");
    report.claim("memory of a fork", Bound::AtMost(64.0), median(MEMORY), "KiB");
    report.claim("a fork's share of the disk", Bound::AtMost(64.0), median(DISK), "KiB");
    report.tables.extend([table, list, steps(settings, &cluster, &calls)?]);
    Ok(())
}

fn qemu(cluster: &Cluster, raw: &Path, count: u64, table: &mut Table) -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(cluster.scratch())?;
    let all =
        || (0..count).try_for_each(|n| Qcow2::over(raw, &dir.path().join(n.to_string())).map(drop));
    table.add(SECONDS, QEMU, timed(all)?.as_secs_f64());
    table.add(DISK, QEMU, allocated_below(dir.path())? as f64 / 1024.0 / count as f64);
    Ok(())
}

/// What agents do again and again: fork a snapshot, work, keep the result, try something else, go
/// back.
fn steps(settings: &Settings, cluster: &Cluster, calls: &Calls) -> anyhow::Result<Table> {
    let title = "An agent's step, by the calls";
    let parts = ["fork", "checkpoint, 1 MiB written", "until it is stable", "rollback", "detach"];
    let mut table = Table::new(title, "ms", false, &SUBJECTS[..1]);
    let bytes = noise(7, 2 * MIB as usize);
    for number in 0..settings.size(STEPS, 3) {
        let name = format!("agent-{number}");
        let fork = calls.attach(("base", 1), &name)?;
        let path = cluster.mount().join("disks").join(format!("{name}.raw"));
        let disk = MountedDisk::open(&path, false)?;
        let at = number as usize * 64;
        disk.file().write_all_at(&bytes[at..at + MIB as usize], GIB)?;
        let began = Instant::now();
        disk.commit()?;
        let checkpoint = began.elapsed();
        // Waits for the one before, too, and holds nothing new.
        disk.commit_stable()?;
        let stable = began.elapsed();
        disk.file().write_all_at(&bytes[..MIB as usize], 2 * GIB)?;
        drop(disk);
        let rollback = calls.rollback(&name)?;
        let detach = calls.detach(&name)?;
        for (part, took) in parts.iter().zip([fork, checkpoint, stable, rollback, detach]) {
            table.add(part, CALL, took.as_secs_f64() * 1e3);
        }
    }
    Ok(table)
}

/// Of all roles together, with the page tables.
fn memory_kib(cluster: &Cluster) -> anyhow::Result<f64> {
    let path = format!("/proc/{}/status", cluster.daemon()?.pid());
    let status = std::fs::read_to_string(path)?;
    let kib = |name: &str| -> anyhow::Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number =
            line.and_then(|line| line.split_whitespace().next()).context("no such line")?;
        Ok(number.parse()?)
    };
    Ok(kib("VmRSS")? + kib("VmPTE")?)
}
