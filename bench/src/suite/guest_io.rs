//! What a guest's reads and writes cost: fio on the mounted disk, on the plain file, and on what
//! `qemu-storage-daemon` serves, by turns.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use blobcr_tests::cluster::Cluster;

use super::Settings;
use crate::fio::{Load, Span};
use crate::peers::storage_daemon::{Format, StorageDaemon};
use crate::random_bytes;
use crate::report::{Bound, Report, Table};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SUBJECTS: [&str; 4] = ["blobcr", "raw file", "qsd raw", "qsd qcow2"];
const OURS: usize = 0;
const RAW: usize = 1;
const QSD_RAW: usize = 2;
const QSD_QCOW2: usize = 3;
/// On a disk just made over an image: qcow2 has to copy clusters, we mark sectors.
const FRESH: &str = "4K randwrite QD32, fresh";
/// Of an image that this host has nothing of yet: ours come from a repository node as they are asked
/// for, the others have the whole file.
const ABSENT_SMALL: &str = "4K randread QD32, absent";
const ABSENT_LARGE: &str = "1M read QD8, absent";
/// It is so small a part of the others, or all of it would be here soon.
const ABSENT_PART: u64 = 4;
/// A disk is fresh for so small a part of the time that is measured else.
const FRESH_PART: u32 = 4;
const SYNCED: &str = "4K randwrite + fdatasync";

/// Where the files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In memory: nothing but the front end costs time.
    Memory,
    /// On a disk, read cold.
    Disk,
}

/// What is measured by requests a second, and its name.
const SMALL: [(&str, Load); 6] = [
    ("4K randread QD1", Load::new("randread", 4 * KIB, 1)),
    ("4K randread QD32", Load::new("randread", 4 * KIB, 32)),
    ("4K randwrite QD1", Load::new("randwrite", 4 * KIB, 1)),
    ("4K randwrite QD32", Load::new("randwrite", 4 * KIB, 32)),
    ("4K randrw QD32", Load::new("randrw", 4 * KIB, 32)),
    (SYNCED, Load { sync_each: true, ..Load::new("randwrite", 4 * KIB, 1) }),
];

/// What is measured by bytes a second.
const LARGE: [(&str, Load); 6] = [
    ("64K read QD8", Load::new("read", 64 * KIB, 8)),
    ("64K write QD8", Load::new("write", 64 * KIB, 8)),
    ("256K read QD1", Load::new("read", 256 * KIB, 1)),
    ("256K write QD1", Load::new("write", 256 * KIB, 1)),
    ("1M read QD8", Load::new("read", MIB, 8)),
    ("1M write QD8", Load::new("write", MIB, 8)),
];

/// The files that are compared, each full of other random bytes.
struct Subjects {
    paths: [PathBuf; 4],
    _daemons: [StorageDaemon; 2],
    cluster: Cluster,
    size: u64,
    direct: bool,
}

impl Place {
    fn parent(self, settings: &Settings) -> &Path {
        match self {
            Self::Memory => &settings.memory_dir,
            Self::Disk => &settings.disk_dir,
        }
    }

    fn size(self, settings: &Settings) -> u64 {
        match self {
            Self::Memory => settings.size(MIB << 10, 64 * MIB),
            Self::Disk => settings.size(MIB << 12, 64 * MIB),
        }
    }
}

/// Fills what is there, or a new file, with random bytes.
fn fill(path: &Path, size: u64) -> anyhow::Result<()> {
    let opened = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = opened.with_context(|| format!("open {}", path.display()))?;
    random_bytes::fill(&file, 0..size / MIB)?;
    Ok(file.sync_all()?)
}

impl Subjects {
    fn make(settings: &Settings, place: Place) -> anyhow::Result<Self> {
        let (parent, size) = (place.parent(settings), place.size(settings));
        let direct = place == Place::Disk;
        let cluster = settings.cluster(parent, &[])?;
        let raw = cluster.scratch().join("raw");
        fill(&raw, size)?;
        cluster.import(&raw, "base")?;
        let empty = cluster.scratch().join("empty");
        File::create(&empty)?.set_len(size)?;
        cluster.import(&empty, "empty")?;
        let ours = cluster.attach("empty", "local")?;
        let scratch = cluster.scratch();
        let daemons = [Format::Raw, Format::Qcow2Over(&raw)]
            .map(|format| StorageDaemon::start(scratch, format, size, direct));
        let [a, b] = daemons;
        let daemons = [a?, b?];
        let [qsd_raw, qsd_qcow2] = [0, 1].map(|which| daemons[which].export().to_owned());
        for path in [&ours, &qsd_raw, &qsd_qcow2] {
            fill(path, size)?;
        }
        let paths = [ours, raw, qsd_raw, qsd_qcow2];
        Ok(Self { paths, _daemons: daemons, cluster, size, direct })
    }

    fn span(&self, settings: &Settings) -> Span {
        let time = Duration::from_millis(settings.size(2000, 200));
        Span { bytes: self.size, time, sync_at_end: self.direct }
    }

    /// Runs a load on all of them.
    fn round(
        &self,
        settings: &Settings,
        (label, load): (&str, Load),
        mut tell: impl FnMut(usize, crate::fio::Measured),
    ) -> anyhow::Result<()> {
        for (subject, path) in self.paths.iter().enumerate() {
            self.cold()?;
            let measured = load.run(path, self.span(settings));
            tell(subject, measured.with_context(|| format!("{label} on {}", SUBJECTS[subject]))?);
        }
        Ok(())
    }

    /// Where the files are on a disk: nothing that was read before helps.
    fn cold(&self) -> anyhow::Result<()> {
        if self.direct {
            rustix::fs::sync();
            let mut drop_caches = OpenOptions::new()
                .write(true)
                .open("/proc/sys/vm/drop_caches")
                .context("dropping the page cache needs root")?;
            drop_caches.write_all(b"3")?;
        }
        Ok(())
    }

    /// Random writes on disks just made over an image.
    fn fresh_round(&self, settings: &Settings, table: &mut Table) -> anyhow::Result<()> {
        let load = Load::new("randwrite", 4 * KIB, 32);
        let whole = self.span(settings);
        // Later most writes of any format would hit what it has copied before.
        let span = Span { time: whole.time / FRESH_PART, ..whole };
        let ours = self.cluster.attach("base", "fresh")?;
        self.cold()?;
        table.add(FRESH, OURS, load.run(&ours, span)?.iops);
        self.cluster.json(&["disk", "detach", "fresh", "--discard-changes"])?;
        // How quick the file system is at giving space to a new file: no disk is quicker.
        let raw = self.cluster.scratch().join("fresh");
        File::create(&raw)?.set_len(self.size)?;
        self.cold()?;
        table.add(FRESH, RAW, load.run(&raw, span)?.iops);
        std::fs::remove_file(&raw)?;
        let format = Format::Qcow2Over(&self.paths[RAW]);
        let daemon = StorageDaemon::start(self.cluster.scratch(), format, self.size, self.direct)?;
        self.cold()?;
        table.add(FRESH, QSD_QCOW2, load.run(daemon.export(), span)?.iops);
        Ok(())
    }

    /// A load on disks of a new image, of which nothing was read yet.
    fn absent_round(
        &self,
        settings: &Settings,
        (name, load): (&str, Load),
        mut tell: impl FnMut(usize, crate::fio::Measured),
    ) -> anyhow::Result<()> {
        let whole = self.span(settings);
        let bytes = whole.bytes / ABSENT_PART;
        let span = Span { bytes, time: whole.time / FRESH_PART, ..whole };
        let raw = self.cluster.scratch().join(name);
        fill(&raw, bytes)?;
        self.cluster.import(&raw, name)?;
        let ours = self.cluster.attach(name, name)?;
        let format = Format::Qcow2Over(&raw);
        let daemon = StorageDaemon::start(self.cluster.scratch(), format, bytes, self.direct)?;
        for (subject, path) in [(OURS, ours.as_path()), (RAW, &raw), (QSD_QCOW2, daemon.export())] {
            self.cold()?;
            tell(subject, load.run(path, span)?);
        }
        drop(daemon);
        self.cluster.json(&["disk", "detach", name])?;
        Ok(std::fs::remove_file(&raw)?)
    }
}

pub(super) fn run(settings: &Settings, place: Place) -> anyhow::Result<Report> {
    let (title, how) = match place {
        Place::Memory => ("A guest's reads and writes, files in memory", "warm"),
        Place::Disk => (
            "A guest's reads and writes, files on a disk",
            "the page cache dropped before each measurement, an fsync at its end counted, the \
             storage daemons with cache.direct=on",
        ),
    };
    let subjects = Subjects::make(settings, place)?;
    let mut small = Table::new("Small requests", "IOPS", true, &SUBJECTS);
    let mut large = Table::new("Large requests", "MB/s", true, &SUBJECTS);
    for round in 0..settings.rounds {
        for (label, load) in SMALL {
            subjects.round(settings, (label, load), |subject, measured| {
                small.add(label, subject, measured.iops);
            })?;
        }
        subjects.fresh_round(settings, &mut small)?;
        let load = Load::new("randread", 4 * KIB, 32);
        subjects.absent_round(
            settings,
            (&format!("small-{round}"), load),
            |subject, measured| {
                small.add(ABSENT_SMALL, subject, measured.iops);
            },
        )?;
        for (label, load) in LARGE {
            subjects.round(settings, (label, load), |subject, measured| {
                large.add(label, subject, measured.bytes_per_second / 1e6);
            })?;
        }
        let load = Load::new("read", MIB, 8);
        subjects.absent_round(
            settings,
            (&format!("large-{round}"), load),
            |subject, measured| {
                large.add(ABSENT_LARGE, subject, measured.bytes_per_second / 1e6);
            },
        )?;
    }
    let mut report = Report::new("", title);
    report.setup.push(format!(
        "fio, io_uring, O_DIRECT, {} MiB of random bytes, {how}; {} rounds by turns. Fresh: on a disk just \
         made over an image, and on an empty raw file; for a quarter of the time, because then most \
         clusters of a qcow2 file would be copied. Absent: reads of a new image as long and a quarter \
         as large, which ours fetches from a repository node as it is asked for it, by whole chunks; \
         the others have it.",
        subjects.size / MIB,
        settings.rounds
    ));
    match place {
        Place::Memory => claims_in_memory(&mut report, &small, &large),
        Place::Disk => claims_on_disk(&mut report, &small, &large),
    }
    report.tables = vec![small, large];
    Ok(report)
}

fn at_least(report: &mut Report, bound: f64, table: &Table, label: &str, subject: usize) {
    let what = format!("{label} against {}", SUBJECTS[subject]);
    report.claim(&what, Bound::AtLeast(bound), table.ratio(label, subject), "×");
}

fn claims_in_memory(report: &mut Report, small: &Table, large: &Table) {
    at_least(report, 0.9, large, "1M read QD8", RAW);
    at_least(report, 0.9, large, "1M write QD8", RAW);
    at_least(report, 0.5, large, "256K read QD1", RAW);
    at_least(report, 0.85, large, "256K write QD1", RAW);
    at_least(report, 3.0, small, "4K randread QD32", QSD_RAW);
    at_least(report, 3.0, small, "4K randwrite QD32", QSD_RAW);
    at_least(report, 10.0, small, FRESH, QSD_QCOW2);
}

fn claims_on_disk(report: &mut Report, small: &Table, large: &Table) {
    at_least(report, 0.95, large, "1M read QD8", RAW);
    at_least(report, 0.95, large, "1M write QD8", RAW);
    for label in ["4K randread QD32", "4K randwrite QD32"] {
        at_least(report, 0.8, small, label, RAW);
        at_least(report, 1.4, small, label, QSD_RAW);
    }
    at_least(report, 0.6, small, SYNCED, RAW);
}
