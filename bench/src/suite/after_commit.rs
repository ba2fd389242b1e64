//! Writes right after a COMMIT against those right before it, in one run of fio; beside them the
//! same around a COMMIT of another disk, which costs the host as much and needs no copies of these
//! writes, around the least that any program does which persists as many bytes, and around snapshots
//! of a qcow2 file.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use blobcr_tests::cluster::Cluster;
use blobcr_tests::mounted::MountedDisk;
use rustix::process::{getpriority_process, setpriority_process};

use super::Settings;
use super::bare_pipeline::BarePipeline;
use crate::fio::{Load, Span};
use crate::fio_log::{Requests, Stretch};
use crate::peers::storage_daemon::{Format, StorageDaemon};
use crate::random_bytes;
use crate::report::{Bound, Report, Table};
use crate::spread::Spread;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Less than the mirror has memory for, so that no copy is spilled.
const DISK_MIB: u64 = 192;
const SUBJECTS: [&str; 5] =
    ["COMMIT", "COMMIT of another disk", "bare pipeline", "qcow2 external", "qcow2 internal"];
const OURS: usize = 0;
const OTHER: usize = 1;
const BARE: usize = 2;
/// How far the bare pipeline gives way: as what persists does by default.
const BARE_NICE: i32 = 5;
const DEPTH: u32 = 8;
const WRITES: Load = Load::new("randwrite", 4 * KIB, DEPTH);
const READS: Load = Load::new("randread", 256 * KIB, DEPTH);
const BEFORE: &str = "before";
const AFTER: &str = "after";

/// The figures.
struct Tables {
    iops: Table,
    latency: Table,
    slowest: Table,
}

impl Tables {
    fn add(&mut self, subject: usize, label: &str, stretch: Stretch) {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        self.iops.add(label, subject, stretch.iops);
        self.latency.add(&format!("{label}: half"), subject, us(stretch.p50));
        self.latency.add(&format!("{label}: 999 of 1000"), subject, us(stretch.p999));
        self.slowest.add(label, subject, us(stretch.slowest));
    }
}

/// Random bytes in every chunk.
fn fill(path: &Path, mib: u64) -> anyhow::Result<()> {
    random_bytes::fill(&OpenOptions::new().write(true).open(path)?, 0..mib)
}

fn measure(
    tables: &mut Tables,
    subject: usize,
    path: &Path,
    span: Span,
    snapshot: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    fill(path, span.bytes / MIB)?;
    let (requests, at) = Requests::around(WRITES, path, span.time, span, snapshot)?;
    tables.add(subject, BEFORE, requests.beside(at, span.time, false)?);
    tables.add(subject, AFTER, requests.beside(at, span.time, true)?);
    Ok(())
}

/// The same with the bare pipeline in place of a COMMIT, of as many bytes.
fn measure_bare(
    tables: &mut Tables,
    settings: &Settings,
    path: &Path,
    span: Span,
) -> anyhow::Result<()> {
    let dir = settings.scratch(&settings.memory_dir)?;
    let pipeline = BarePipeline::prepare(dir.path(), span.bytes)?;
    let mut running = None;
    measure(tables, BARE, path, span, || {
        running = Some(std::thread::spawn(move || {
            // On Linux it is the calling thread's, and of those that it starts.
            let lowered = getpriority_process(None)? + BARE_NICE;
            setpriority_process(None, lowered)?;
            pipeline.run(|| Ok(()))
        }));
        Ok(())
    })?;
    if let Some(running) = running {
        running.join().map_err(|_| anyhow::anyhow!("the bare pipeline panicked"))??;
    }
    Ok(())
}

/// A subject's values of one row in units of those of another.
fn ratio(table: &Table, subject: usize, label: &str, other: &str) -> Option<f64> {
    let samples = |label| Some(&table.row(label)?.samples[subject]);
    let (values, others) = (samples(label)?, samples(other)?);
    Some(Spread::of(values.iter().zip(others).map(|(a, b)| a / b))?.median)
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let mib = settings.size(DISK_MIB, 16);
    let time = Duration::from_millis(settings.size(2000, 200));
    let span = Span { bytes: mib * MIB, time, sync_at_end: false };
    let parent = &settings.memory_dir;
    let cluster: Cluster = settings.cluster(parent, &[])?;
    let empty = cluster.scratch().join("empty");
    File::create(&empty)?.set_len(mib * MIB)?;
    cluster.import(&empty, "empty")?;
    let path = cluster.attach("empty", "disk")?;
    let other_path = cluster.attach("empty", "other")?;
    let disk = MountedDisk::open(&path, false)?;
    let other = MountedDisk::open(&other_path, false)?;
    disk.commit_stable()?;
    other.commit_stable()?;
    let mut tables = Tables {
        iops: Table::new("Writes of 4 KiB", "IOPS", true, &SUBJECTS),
        latency: Table::new("Latency of those writes", "µs", false, &SUBJECTS),
        slowest: Table::new("The slowest write", "µs", false, &SUBJECTS),
    };
    let reads = format!("256K read QD{DEPTH}");
    for _ in 0..settings.rounds {
        measure(&mut tables, OURS, &path, span, || Ok(disk.commit().map(drop)?))?;
        disk.commit_stable()?;
        fill(&other_path, mib)?;
        measure(&mut tables, OTHER, &path, span, || Ok(other.commit().map(drop)?))?;
        other.commit_stable()?;
        measure_bare(&mut tables, settings, &path, span)?;
        disk.commit_stable()?;
        let (read, at) = Requests::around(READS, &path, Duration::ZERO, span, || Ok(()))?;
        tables.add(OURS, &reads, read.beside(at, time, true)?);
        for (subject, snapshot) in
            [(3, StorageDaemon::snapshot as fn(&mut _) -> _), (4, StorageDaemon::internal_snapshot)]
        {
            let mut daemon = StorageDaemon::start(parent, Format::Qcow2, mib * MIB, false)?;
            let export = daemon.export().to_owned();
            measure(&mut tables, subject, &export, span, || snapshot(&mut daemon).map(drop))?;
        }
    }
    let mut report = Report::new("", "Writes right after a COMMIT");
    report.setup.push(format!(
        "fio, io_uring, O_DIRECT, random writes of 4 KiB at depth {DEPTH} all over {mib} MiB of \
         random bytes, all of them changed since the snapshot before; files in memory. In the \
         middle of the run a snapshot is taken: the {time:?} before it against the {time:?} after."
    ));
    report.setup.push(
        format!(
            "A COMMIT of another disk as full shows what persisting takes of the processors alone; the \
             bare pipeline, with nice {BARE_NICE} as what persists, what the least that any program \
             does for as many bytes takes: one thread reads a file, hashes and sends it, others \
             take it, hash it again and write it."
        ),
    );
    for (subject, what) in
        [(OURS, "COMMIT"), (OTHER, "COMMIT of another disk"), (BARE, "the bare pipeline's begin")]
    {
        let what = format!("writes after {what} against before");
        let iops = ratio(&tables.iops, subject, AFTER, BEFORE);
        report.claim(&what, Bound::AtLeast(0.9), iops, "×");
    }
    let most = |label: &str| format!("{label}: 999 of 1000");
    let wait = ratio(&tables.latency, OURS, &most(AFTER), &most(&reads));
    let what = format!("p99.9 of writes after COMMIT against p99.9 of {reads}");
    report.claim(&what, Bound::AtMost(1.0), wait, "×");
    report.tables = vec![tables.iops, tables.latency, tables.slowest];
    Ok(report)
}
