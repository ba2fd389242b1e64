//! Downtime of COMMIT, by how much is dirty: the ioctl, and the call that a guest makes through its
//! VM's channel; beside them external and internal snapshots of a qcow2 file, and those of Ceph RBD.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use blobcr_tests::cluster::Cluster;
use blobcr_tests::mounted::MountedDisk;
use rand::RngCore;

use super::Settings;
use crate::latency::Latencies;
use crate::peers::ceph::{Ceph, OpenImage};
use crate::peers::storage_daemon::{Format, StorageDaemon};
use crate::report::{Bound, Report, Table};
use crate::vm_channel::VmChannel;

const MIB: u64 = 1 << 20;
const WRITE_BYTES: usize = 1 << 20;
/// Each of qcow2's external snapshots adds a file to a chain.
const QCOW2_SAMPLES: u64 = 20;
/// Fewer where all of them would keep more than this.
const QCOW2_MIB: u64 = 16 << 10;
/// What all COMMITs of one size dirty together, where that is enough for some.
const OURS_MIB: u64 = 64 << 10;
const SUBJECTS: [&str; 7] = [
    "COMMIT (ioctl)",
    "CHECKPOINT (guest's call)",
    "status (ioctl)",
    "qcow2 external",
    "qcow2 internal",
    "RBD (librbd's call)",
    "rbd snap create",
];
const RBD: usize = 5;

/// Two contents of a disk, written by turns: every write changes every byte, and yet what has to
/// be stored stays bounded, because the repository keeps equal chunks once.
struct Contents {
    random: Vec<u8>,
    round: usize,
}

impl Contents {
    fn new() -> Self {
        let mut random = vec![0; 2 * WRITE_BYTES];
        rand::rng().fill_bytes(&mut random);
        Self { random, round: 0 }
    }

    /// Writes `mib` MiB of the next content.
    fn dirty(&mut self, mib: u64, file: &File) -> anyhow::Result<()> {
        self.round ^= 1;
        for index in 0..mib {
            // A shift by the index makes every MiB another one.
            let start = self.round * (WRITE_BYTES / 2) + (index as usize * 64) % (WRITE_BYTES / 2);
            file.write_all_at(&self.random[start..start + WRITE_BYTES], index * MIB)?;
        }
        Ok(())
    }
}

/// The latencies of the ioctl, of the guest's call, and of an ioctl that only asks, in the same place.
fn ours(cluster: &Cluster, samples: u64, mib: u64) -> anyhow::Result<[Latencies; 3]> {
    let name = format!("dirty-{mib}");
    let raw = cluster.scratch().join(&name);
    File::create(&raw)?.set_len((mib + 1) * MIB)?;
    cluster.import(&raw, &name)?;
    let path = cluster.attach(&name, &name)?;
    let disk = MountedDisk::open(&path, false)?;
    let mut channel = VmChannel::add(cluster, &format!("vm-{mib}"), &name)?;
    let mut contents = Contents::new();
    // The first CHECKPOINT also makes the checkpoint image: that is not what is measured here.
    disk.commit_stable()?;
    let (mut ioctl, mut call) = (Latencies::new()?, Latencies::new()?);
    let mut asked = Latencies::new()?;
    for _ in 0..samples {
        contents.dirty(mib, disk.file())?;
        let began = Instant::now();
        disk.commit()?;
        ioctl.record(began.elapsed());
        let stable = disk.commit_stable()?;
        contents.dirty(mib, disk.file())?;
        let began = Instant::now();
        disk.is_stable(stable.number)?;
        asked.record(began.elapsed());
        contents.dirty(mib, disk.file())?;
        call.record(channel.checkpoint()?);
        disk.commit_stable()?;
    }
    drop(disk);
    cluster.json(&["vm", "remove", &format!("vm-{mib}")])?;
    cluster.json(&["disk", "detach", &name, "--discard-changes"])?;
    Ok([ioctl, call, asked])
}

fn qcow2(
    cluster: &Cluster,
    samples: u64,
    mib: u64,
    snapshot: fn(&mut StorageDaemon) -> anyhow::Result<Duration>,
) -> anyhow::Result<Latencies> {
    let size = (mib + 1) * MIB;
    let mut daemon = StorageDaemon::start(cluster.scratch(), Format::Qcow2, size, false)?;
    let file = OpenOptions::new().write(true).open(daemon.export())?;
    let mut contents = Contents::new();
    let mut latencies = Latencies::new()?;
    for _ in 0..samples {
        contents.dirty(mib, &file)?;
        latencies.record(snapshot(&mut daemon)?);
    }
    Ok(latencies)
}

/// Snapshots of an image of Ceph's that a process has open: by its own call, and by the command. What
/// was written is flushed before, so that nothing but the snapshot counts.
fn rbd(ceph: &Ceph, samples: u64, mib: u64) -> anyhow::Result<[Latencies; 2]> {
    let image = format!("dirty-{mib}");
    ceph.rbd(&["create", &image, "--size", &format!("{}M", mib + 1)])?;
    let mut open = OpenImage::open(ceph, &image)?;
    let (mut call, mut command) = (Latencies::new()?, Latencies::new()?);
    for number in 0..samples {
        open.write(MIB, MIB, mib)?;
        call.record(open.snapshot(&format!("call-{number}"))?);
        open.write(MIB, MIB, mib)?;
        command.record(ceph.rbd(&["snap", "create", &format!("{image}@command-{number}")])?);
    }
    drop(open);
    ceph.rbd(&["snap", "purge", &image])?;
    ceph.rbd(&["rm", &image])?;
    Ok([call, command])
}

/// Each keeps all that was written before it: as many as there is room for.
fn rbd_samples(settings: &Settings, mib: u64) -> u64 {
    settings.size((8192 / mib).clamp(2, 20), 2)
}

fn add(half: &mut Table, most: &mut Table, mib: u64, subject: usize, latencies: &Latencies) {
    let (label, summary) = (format!("{mib} MiB dirty"), latencies.summary());
    half.add(&label, subject, summary.p50_us);
    most.add(&label, subject, summary.p99_us);
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let sizes: &[u64] = if settings.quick { &[1, 4] } else { &[10, 1024, 4096] };
    // At 4 GiB a COMMIT takes seconds to persist, and a hundred of them the better part of an hour.
    let samples = |mib: u64| settings.size((OURS_MIB / mib).clamp(16, 100), 3);
    let mut report = Report::new("", "Downtime of a checkpoint, by how much is dirty");
    report.setup.push(format!(
        "Dirtied before each snapshot by writes of 1 MiB; {} COMMITs of each size ({} of the \
         largest), {QCOW2_SAMPLES} snapshots of qcow2, {} of Ceph ({} of the largest).",
        samples(1),
        samples(u64::MAX),
        rbd_samples(settings, sizes[0]),
        rbd_samples(settings, sizes[sizes.len() - 1])
    ));
    let mut half = Table::new("half of the calls took no longer", "µs", false, &SUBJECTS);
    let mut most = Table::new("99 of 100 calls took no longer", "µs", false, &SUBJECTS);
    let (mut worst, mut asks) = (Vec::new(), Vec::new());
    let cluster = settings.cluster(&settings.disk_dir, &[])?;
    for &mib in sizes {
        let [ioctl, call, asked] = ours(&cluster, samples(mib), mib)?;
        let qcow2_samples = settings.size((QCOW2_MIB / mib).clamp(4, QCOW2_SAMPLES), 2);
        let external = qcow2(&cluster, qcow2_samples, mib, StorageDaemon::snapshot)?;
        let internal = qcow2(&cluster, qcow2_samples, mib, StorageDaemon::internal_snapshot)?;
        worst.push(ioctl.summary().p99_us);
        asks.push(asked.summary().p99_us);
        for (subject, latencies) in [ioctl, call, asked, external, internal].iter().enumerate() {
            add(&mut half, &mut most, mib, subject, latencies);
        }
    }
    // Its daemons take time of the processors: not before the others were measured.
    if let Some(ceph) = settings.ceph(&mut report)? {
        for &mib in sizes {
            let measured = rbd(&ceph, rbd_samples(settings, mib), mib)?;
            for (subject, latencies) in (RBD..).zip(&measured) {
                add(&mut half, &mut most, mib, subject, latencies);
            }
        }
    }
    report.setup.push(format!(
        "Fewer of both where more is dirty than {} GiB (ours) or {} GiB (qcow2) together.",
        OURS_MIB / 1024,
        QCOW2_MIB / 1024
    ));
    let (least, greatest) =
        worst.iter().fold((f64::MAX, 0.0_f64), |(a, b), p99| (a.min(*p99), b.max(*p99)));
    report.claim("p99 of COMMIT's ioctl", Bound::AtMost(1000.0), Some(greatest), "µs");
    let flat = Some(greatest / least);
    report.claim("the largest p99 against the smallest", Bound::AtMost(1.5), flat, "×");
    report.setup.push(
        "status (ioctl): a question that costs the mirror nothing, asked instead of a COMMIT, after the \
         same writes. What it takes is the machine's."
            .to_owned(),
    );
    let beside = worst.iter().zip(&asks).map(|(commit, asked)| commit / asked).fold(0.0, f64::max);
    let what = "the p99 of COMMIT's ioctl against that of an ioctl that only asks, at most";
    report.claim(what, Bound::AtMost(1.5), Some(beside), "×");
    report.tables = vec![half, most];
    Ok(report)
}
