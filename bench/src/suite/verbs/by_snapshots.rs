//! Verbs and reads on images with few and with many snapshots.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;

use super::{FLAT, LIMIT_MS, MIB, median_ms, samples};
use crate::calls::Calls;
use crate::report::{Bound, Report, Table};
use crate::suite::Settings;

const SIZE: u64 = 256 * MIB;
const CHUNK: u64 = 256 << 10;
/// What each COMMIT has dirty.
const DIRTY: usize = 4096;
const READS: &str = "4 KiB of a chunk that is not here yet";
/// The subject with the fewest snapshots.
const FEWEST: usize = 2;
const VERBS: [&str; 5] = ["attach", "clone", "rollback", "diff", "list the newest 500"];

/// A disk whose checkpoint image has so many snapshots.
struct Disk {
    name: String,
    path: PathBuf,
    image: String,
    snapshots: u64,
    /// Another disk, from the last of them, of which nothing was read yet.
    fork: MountedDisk,
}

pub(super) fn measure(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let counts: [u64; 3] = if settings.quick { [3, 9, 27] } else { [10, 1000, 10_000] };
    let cluster = settings.cluster(&settings.disk_dir, &[])?;
    let calls = Calls::to(&cluster)?;
    // As many writes on all, so that their chunks are as new and as many.
    let disks = counts.map(|snapshots| Disk::with(&cluster, snapshots, counts[2] / snapshots));
    let disks = disks.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    // The most first: what it costs in units of what fewer cost.
    let mut disks: Vec<_> = disks.into_iter().rev().enumerate().collect();
    let subjects: Vec<_> = disks.iter().map(|(_, d)| format!("{} snapshots", d.made())).collect();
    let subjects: Vec<_> = subjects.iter().map(String::as_str).collect();
    let mut verbs = Table::new("By the number of snapshots: the calls", "ms", false, &subjects);
    let mut reads = Table::new("Reads by the number of snapshots", "reads/s", true, &subjects);
    for round in 0..settings.rounds {
        for (subject, disk) in &disks {
            disk.verbs(settings, &calls, round, (*subject, &mut verbs))?;
        }
        for (subject, disk) in &disks {
            reads.add(READS, *subject, disk.reads(round, settings.rounds)?);
        }
        // Another one is the first in each round.
        disks.rotate_left(1);
    }
    claims(report, &verbs, &reads);
    report.tables.extend([verbs, reads]);
    Ok(())
}

fn claims(report: &mut Report, verbs: &Table, reads: &Table) {
    for verb in &VERBS[..4] {
        if *verb != "diff" {
            let most = verbs.row(verb).and_then(|row| Some(row.spread(0)?.median));
            let what = format!("{verb} (the call), the most snapshots");
            report.claim(&what, Bound::AtMost(LIMIT_MS), most, "ms");
        }
        let what = format!("{verb}, the most snapshots against the fewest");
        report.claim(&what, Bound::AtMost(FLAT), verbs.ratio(verb, FEWEST), "×");
    }
    let what = "reads, the most snapshots against the fewest";
    report.claim(what, Bound::AtLeast(0.95), reads.ratio(READS, FEWEST), "×");
}

impl Disk {
    fn with(cluster: &Cluster, snapshots: u64, writes_each: u64) -> anyhow::Result<Self> {
        let name = format!("disk-{snapshots}");
        // Of bytes that no other disk has: what one of them fetches would be here for all.
        let (raw, base) = (cluster.scratch().join("raw"), format!("base-{snapshots}"));
        sparse(&raw, SIZE, &[(0, &noise(snapshots, SIZE as usize))])?;
        cluster.import(&raw, &base)?;
        let path = cluster.attach(&base, &name)?;
        let disk = MountedDisk::open(&path, false)?;
        let mut image = String::new();
        for snapshot in 0..snapshots {
            for write in 0..writes_each {
                write_once(&disk, snapshots, snapshot * writes_each + write)?;
            }
            // Waits only while two are being persisted; the last one must be stable.
            image = if snapshot + 1 < snapshots {
                disk.commit()?.image
            } else {
                disk.commit_stable()?.image
            };
        }
        // The clone itself is number 1.
        let snapshots = snapshots + 1;
        let fork = cluster.attach(&format!("{image}@{snapshots}"), &format!("{name}-read"))?;
        let fork = MountedDisk::open(&fork, false)?;
        Ok(Self { name, path, image, snapshots, fork })
    }

    /// Besides the clone that it begins with.
    const fn made(&self) -> u64 {
        self.snapshots - 1
    }

    fn verbs(
        &self,
        settings: &Settings,
        calls: &Calls,
        round: u32,
        (subject, table): (usize, &mut Table),
    ) -> anyhow::Result<()> {
        let newest = (&*self.image, self.snapshots);
        let tries = samples(settings);
        let name = |number: u64| format!("{}-{round}-{number}", self.name);
        let attach = median_ms(tries, |number| {
            let took = calls.attach(newest, &name(number))?;
            calls.detach(&name(number))?;
            Ok(took)
        })?;
        let clone = median_ms(tries, |number| calls.clone_image(newest, &name(number)))?;
        let rollback = median_ms(tries, |number| {
            let disk = MountedDisk::open(&self.path, false)?;
            write_once(&disk, 0, number)?;
            drop(disk);
            calls.rollback(&self.name)
        })?;
        let old = (&*self.image, self.snapshots - 2);
        let diff = median_ms(tries, |_| Ok(calls.diff(old, newest)?.0))?;
        let list = median_ms(tries, |_| calls.list_snapshots(newest))?;
        for (verb, ms) in VERBS.iter().zip([attach, clone, rollback, diff, list]) {
            table.add(verb, subject, ms);
        }
        Ok(())
    }

    /// Reads a part of the chunks once each; a second.
    fn reads(&self, round: u32, rounds: u32) -> anyhow::Result<f64> {
        let chunks = SIZE / CHUNK / u64::from(rounds);
        let first = u64::from(round) * chunks;
        let mut block = vec![0; DIRTY];
        let began = Instant::now();
        for chunk in first..first + chunks {
            // Not one after the other.
            let chunk = first + (chunk - first) * 7 % chunks;
            self.fork.file().read_exact_at(&mut block, chunk * CHUNK)?;
        }
        Ok(chunks as f64 / began.elapsed().as_secs_f64())
    }
}

/// Another content at another place each time, and on each disk.
fn write_once(disk: &MountedDisk, salt: u64, number: u64) -> anyhow::Result<()> {
    let place = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (SIZE / DIRTY as u64);
    disk.file().write_all_at(&noise(salt << 32 | number, DIRTY), place * DIRTY as u64)?;
    Ok(())
}
