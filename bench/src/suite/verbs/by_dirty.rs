//! Rollback and diff by how much was written.

use std::os::unix::fs::FileExt;
use std::path::Path;

use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;

use super::{
    CALL, COMMAND, GIB, LIMIT_MS, MIB, QEMU, RBD, REFLINK, SUBJECTS, median_ms, reflinks, samples,
    timed,
};
use crate::calls::Calls;
use crate::peers::qcow2::Qcow2;
use crate::report::{Bound, Report, Table};
use crate::suite::Settings;

const SIZE: u64 = 4 * GIB;

/// Writes the first so many MiB, each time other bytes.
fn write(path: &Path, mib: u64, seed: u64) -> anyhow::Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let bytes = noise(seed, 2 * MIB as usize);
    for number in 0..mib {
        let shift = (number as usize * 64) % MIB as usize;
        file.write_all_at(&bytes[shift..shift + MIB as usize], number * MIB)?;
    }
    Ok(())
}

pub(super) fn measure(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let sizes: &[u64] = if settings.quick { &[1, 8] } else { &[1, 100, 1024] };
    let cluster = settings.cluster(&settings.disk_dir, &[])?;
    let calls = Calls::to(&cluster)?;
    let reflinks = reflinks(&cluster, report);
    let raw = sparse(&cluster.scratch().join("raw"), SIZE, &[(0, &noise(1, MIB as usize))])?;
    cluster.import(&raw, "base")?;
    if let Some(reflinks) = &reflinks {
        sparse(&reflinks.path("base"), SIZE, &[(0, &noise(1, MIB as usize))])?;
    }
    let path = cluster.attach("base", "disk")?;
    // Makes the checkpoint image; rollbacks go to its newest snapshot.
    MountedDisk::open(&path, false)?.commit_stable()?;
    let (qcow2, _) = Qcow2::over(&raw, &cluster.scratch().join("qcow2"))?;
    qcow2.snapshot("s")?;
    let mut table = Table::new("By what was written", "ms", false, &SUBJECTS[..RBD]);
    let mut seed = 1;
    let mut next = || {
        seed += 1;
        seed
    };
    // Each sample writes all of it: few are enough.
    let tries = samples(settings).min(3);
    for _ in 0..settings.rounds {
        for &mib in sizes {
            let label = format!("rollback, {mib} MiB dirty");
            let call = median_ms(tries, |_| {
                write(&path, mib, next())?;
                calls.rollback("disk")
            })?;
            table.add(&label, CALL, call);
            let command = median_ms(tries, |_| {
                write(&path, mib, next())?;
                timed(|| cluster.json(&["disk", "rollback", "disk"]))
            })?;
            table.add(&label, COMMAND, command);
            qcow2.dirty(mib)?;
            table.add(&label, QEMU, qcow2.apply("s")?.as_secs_f64() * 1e3);
            if let Some(reflinks) = &reflinks {
                reflinks.copy("base", "disk")?;
                write(&reflinks.path("disk"), mib, next())?;
                let took = reflinks.copy("base", "disk")?;
                table.add(&label, REFLINK, took.as_secs_f64() * 1e3);
            }
        }
        for &mib in sizes {
            write(&path, mib, next())?;
            let made = MountedDisk::open(&path, false)?.commit_stable()?;
            let (old, new) = ((&*made.image, made.number - 1), (&*made.image, made.number));
            let label = format!("diff, {mib} MiB changed");
            table.add(&label, CALL, calls.diff(old, new)?.0.as_secs_f64() * 1e3);
            let names = [old, new].map(|(image, number)| format!("{image}@{number}"));
            let command = || cluster.json(&["snapshot", "diff", &names[0], &names[1]]);
            table.add(&label, COMMAND, timed(command)?.as_secs_f64() * 1e3);
        }
    }
    let rollbacks = sizes.iter().map(|mib| table.row(&format!("rollback, {mib} MiB dirty")));
    let medians = rollbacks.filter_map(|row| Some(row?.spread(CALL)?.median));
    let most = medians.fold(0.0, f64::max);
    let what = "rollback (the call), whatever was written";
    report.claim(what, Bound::AtMost(LIMIT_MS), Some(most), "ms");
    report.tables.push(table);
    Ok(())
}
