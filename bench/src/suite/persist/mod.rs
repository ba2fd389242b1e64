//! How fast a COMMIT becomes stable, by what was written and by policy; beside the limits of the
//! machine, and programs that keep the same changes.

mod limits;
mod ours;
mod peers;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blobcr_tests::disk_file::noise;

use super::Settings;
use crate::report::{Bound, Report, Table};
use limits::Limits;
use ours::Ours;
use peers::Peers;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 256 << 10;

/// Ours by policy, and the nodes that it takes.
const POLICIES: [(&str, usize); 3] = [("replica:1", 1), ("replica:3", 3), ("ec:4+2", 6)];
const SUBJECTS: [&str; 8] = [
    "replica:1",
    "replica:3",
    "ec:4+2",
    "restic",
    "borg",
    "qemu-img convert",
    "qemu-img convert -c",
    "rbd import-diff",
];
const RESTIC: usize = 3;
const BORG: usize = 4;
const QEMU: usize = 5;
const QEMU_COMPRESSED: usize = 6;
const RBD: usize = 7;

/// What is written before a COMMIT.
const KINDS: [&str; 5] =
    ["random", "zeros over it", "programs (compressible)", "the first again", "random again"];
const ZEROS: usize = 1;
const PROGRAMS: usize = 2;
const DUPLICATE: usize = 3;

/// What one change took.
struct Took {
    seconds: f64,
    /// Of all processes that took part.
    cpu_seconds: f64,
    stored_bytes: f64,
}

/// The contents of the kinds, of so many bytes each.
struct Contents {
    programs: Vec<u8>,
    bytes: u64,
}

impl Contents {
    fn new(bytes: u64) -> anyhow::Result<Self> {
        Ok(Self { programs: programs(bytes as usize)?, bytes })
    }

    /// Writes a kind, durably. `round` makes random bytes other ones.
    fn write(&self, path: &Path, kind: usize, round: u32) -> anyhow::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        match kind {
            ZEROS => all(&file, &vec![0; self.bytes as usize])?,
            PROGRAMS => all(&file, &self.programs)?,
            _ => {
                let fresh = if kind == DUPLICATE { 0 } else { kind as u64 };
                let seed = 1 + u64::from(round) * KINDS.len() as u64 + fresh;
                all(&file, &noise(seed, self.bytes as usize))?;
            }
        }
        Ok(file.sync_all()?)
    }
}

fn all(file: &File, bytes: &[u8]) -> anyhow::Result<()> {
    for (number, part) in bytes.chunks(MIB as usize).enumerate() {
        file.write_all_at(part, number as u64 * MIB)?;
    }
    Ok(())
}

/// Bytes of this host's programs and libraries.
fn programs(len: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    let mut dirs = vec![Path::new("/usr/lib").to_owned(), Path::new("/usr/bin").to_owned()];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file()
                && let Ok(file) = File::open(entry.path())
            {
                let _ = file.take((len - bytes.len()) as u64).read_to_end(&mut bytes);
            }
            if bytes.len() == len {
                return Ok(bytes);
            }
        }
    }
    anyhow::bail!("/usr/lib and /usr/bin together have only {} bytes", bytes.len())
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let bytes = settings.size(256, 16) * MIB;
    let contents = Contents::new(bytes)?;
    let mut report = Report::new("", "Persisting: how fast a COMMIT becomes stable");
    report.setup.push(format!(
        "{} MiB written and flushed before each COMMIT; roles as processes on loopback, the files \
         of all on one disk; {} rounds by turns. The others keep a file with the same changes.",
        bytes / MIB,
        settings.rounds
    ));
    let mut rate = Table::new("Changed bytes until stable", "MB/s", true, &SUBJECTS);
    let mut per_core = Table::new("Changed bytes per second of CPU", "MB/s", true, &SUBJECTS);
    let mut stored = Table::new("Bytes stored per byte changed", "", false, &SUBJECTS);
    let ours = POLICIES.map(|(policy, nodes)| Ours::start(policy, nodes, bytes));
    let ours = ours.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let peers = Peers::new(settings, bytes, &mut report)?;
    for round in 0..settings.rounds {
        for (kind, label) in KINDS.iter().enumerate() {
            let mut add = |subject: usize, took: Took| {
                rate.add(label, subject, bytes as f64 / 1e6 / took.seconds);
                per_core.add(label, subject, bytes as f64 / 1e6 / took.cpu_seconds);
                stored.add(label, subject, took.stored_bytes / bytes as f64);
            };
            for (subject, ours) in ours.iter().enumerate() {
                contents.write(ours.disk(), kind, round)?;
                add(subject, ours.commit()?);
            }
            contents.write(peers.file(), kind, round)?;
            for (subject, took) in peers.keep(kind)? {
                add(subject, took);
            }
        }
    }
    report.tables = vec![rate, per_core, stored];
    few_chunks(&ours[0], bytes, &mut report)?;
    drop(ours);
    one_core(settings, &contents, &mut report)?;
    Ok(report)
}

/// A second COMMIT of which one chunk of a hundred has changed, by 4 KiB each.
fn few_chunks(ours: &Ours, bytes: u64, report: &mut Report) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).open(ours.disk())?;
    all(&file, &noise(77, bytes as usize))?;
    ours.commit()?;
    let changed: Vec<u64> = (0..bytes / CHUNK).step_by(100).collect();
    for chunk in &changed {
        file.write_all_at(&noise(1000 + chunk, 4096), chunk * CHUNK)?;
    }
    let took = ours.commit()?;
    let ratio = took.stored_bytes / (changed.len() as u64 * CHUNK) as f64;
    let what = "stored by a COMMIT of 1 % changed chunks, against those chunks";
    report.claim(what, Bound::AtMost(1.1), Some(ratio), "×");
    Ok(())
}

/// The mirror, which runs the pipeline, on one core.
fn one_core(settings: &Settings, contents: &Contents, report: &mut Report) -> anyhow::Result<()> {
    let ours = Ours::start("replica:1", 1, contents.bytes)?;
    ours.mirror_on_one_core()?;
    let subjects =
        ["persisted", "BLAKE3, cold memory", "disk, O_DIRECT", "loopback", "bare pipeline"];
    let mut table =
        Table::new("Random data, replica:1, the mirror on one core", "MB/s", true, &subjects);
    let mut shares = Vec::new();
    for round in 0..settings.rounds {
        contents.write(ours.disk(), 0, 1000 + round)?;
        let rate = contents.bytes as f64 / 1e6 / ours.commit()?.seconds;
        let Limits { hash, disk, loopback, bare } = Limits::measure(settings, contents.bytes)?;
        for (subject, value) in [rate, hash, disk, loopback, bare].into_iter().enumerate() {
            table.add("COMMIT to stable, and limits", subject, value);
        }
        shares.push(rate / (0.4 * hash).min(disk));
    }
    let what = "persisted by one core, against 40 % of its BLAKE3 or the disk, whichever is less";
    let share = crate::spread::Spread::of(shares).map(|spread| spread.median);
    report.claim(what, Bound::AtLeast(1.0), share, "×");
    report.setup.push(
        "\"One core\": all threads of the mirror, which hashes and sends, are bound to core 1, as \
         is the measured BLAKE3; the node is free to use what is left. The bare pipeline is the \
         least that any such program has to do: one thread on that core reads a file from the page \
         cache, hashes and sends it; others take it, hash it again, and write it past the page \
         cache, durably at the end."
            .to_owned(),
    );
    report.tables.push(table);
    Ok(())
}

/// A file of its own for what a program said.
fn quiet(dir: &Path) -> anyhow::Result<File> {
    let mut file = OpenOptions::new().create(true).append(true).open(dir.join("said"))?;
    writeln!(file)?;
    Ok(file)
}
