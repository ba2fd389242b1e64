//! Diff of two snapshots of an image that is full of data: the list of what differs, and bringing its
//! bytes to a file; beside what Ceph's commands do.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::mounted::MountedDisk;
use rand::RngCore;

use super::{GIB, MIB, timed};
use crate::calls::Calls;
use crate::peers::ceph::{Ceph, OpenImage};
use crate::random_bytes;
use crate::report::{Bound, Report, Table};
use crate::suite::Settings;

const SIZE: u64 = 4 * GIB;
const CHUNK: u64 = 256 << 10;
const LIST: [&str; 5] = [
    "blobcr, the command",
    "blobcr, the call",
    "rbd diff",
    "rbd diff, librbd's call",
    "rbd export-diff (and the bytes)",
];
const BYTES: [&str; 2] = ["blobcr image export --since", "rbd export-diff"];
/// What ours may take, in units of theirs.
const MOST: f64 = 0.5;

/// What is written between two snapshots: so many pieces, as far apart as that.
struct Change {
    label: &'static str,
    piece: u64,
    stride: u64,
    pieces: u64,
}

const CHANGES: [Change; 2] = [
    Change { label: "100 MiB in one piece", piece: MIB, stride: MIB, pieces: 100 },
    Change {
        label: "100 MiB in pieces of 64 KiB",
        piece: 64 << 10,
        stride: 10 * CHUNK,
        pieces: 1600,
    },
];

impl Change {
    /// Other bytes each time.
    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        let mut bytes = vec![0; self.piece as usize];
        for piece in 0..self.pieces {
            rand::rng().fill_bytes(&mut bytes);
            file.write_all_at(&bytes, piece * self.stride)?;
        }
        Ok(())
    }

    /// A diff lists whole chunks; no two pieces share one.
    const fn bytes_of_chunks(&self) -> u64 {
        self.pieces * self.piece.next_multiple_of(CHUNK)
    }
}

/// An image of ours and one of Ceph's.
struct Images {
    ours: PathBuf,
    /// A raw file of the snapshot before.
    kept: PathBuf,
    theirs: Option<OpenImage>,
    ceph: Option<Ceph>,
    calls: Calls,
    cluster: Cluster,
}

impl Images {
    fn make(settings: &Settings, report: &mut Report) -> anyhow::Result<Self> {
        let cluster = settings.cluster(&settings.disk_dir, &[])?;
        let kept = cluster.scratch().join("kept");
        random_bytes::fill(&File::create(&kept)?, 0..SIZE / MIB)?;
        cluster.import(&kept, "base")?;
        let ours = cluster.attach("base", "disk")?;
        // Makes the checkpoint image.
        MountedDisk::open(&ours, false)?.commit_stable()?;
        let ceph = settings.ceph(report)?;
        let theirs = ceph.as_ref().map(Self::full_image).transpose()?;
        let calls = Calls::to(&cluster)?;
        Ok(Self { ours, kept, theirs, ceph, calls, cluster })
    }

    fn full_image(ceph: &Ceph) -> anyhow::Result<OpenImage> {
        ceph.rbd(&["create", "image", "--size", &format!("{}M", SIZE / MIB)])?;
        let mut image = OpenImage::open(ceph, "image")?;
        image.write(4 * MIB, 4 * MIB, SIZE / (4 * MIB))?;
        image.snapshot("0")?;
        Ok(image)
    }

    /// Changes both, and takes their diffs.
    fn round(
        &mut self,
        change: &Change,
        number: u64,
        tables: &mut [Table; 2],
    ) -> anyhow::Result<()> {
        change.write(&self.ours)?;
        let made = MountedDisk::open(&self.ours, false)?.commit_stable()?;
        let (image, old, new) = (&*made.image, made.number - 1, made.number);
        let [list, bytes] = tables;
        let mut add = |subject, took: Duration| list.add(change.label, subject, ms(took));
        rustix::fs::sync();
        let names = [old, new].map(|number| format!("{image}@{number}"));
        let began = Instant::now();
        let diff = self.cluster.json(&["snapshot", "diff", &names[0], &names[1]])?;
        add(0, began.elapsed());
        add(1, self.calls.diff((image, old), (image, new))?.0);
        let changed = &diff["changed_bytes"];
        ensure!(*changed == change.bytes_of_chunks(), "{changed} bytes differ: {}", change.label);
        bytes.add(change.label, 0, ms(self.update(&names)?));
        let (Some(ceph), Some(theirs)) = (&self.ceph, &mut self.theirs) else { return Ok(()) };
        theirs.write(change.piece, change.stride, change.pieces)?;
        let (old, new) = (number.to_string(), (number + 1).to_string());
        theirs.snapshot(&new)?;
        rustix::fs::sync();
        let new_name = format!("image@{new}");
        add(2, ceph.rbd(&["diff", "--from-snap", &old, &new_name])?);
        let (took, extents) = theirs.diff(&old, &new)?;
        ensure!(extents > 0, "rbd finds no difference");
        add(3, took);
        let file = self.cluster.scratch().join("export-diff");
        let path = file.to_str().context("a path of the benchmark is no UTF-8")?;
        let took = ceph.rbd(&["export-diff", "--from-snap", &old, &new_name, path])?;
        add(4, took);
        bytes.add(change.label, 1, ms(took));
        let exported = std::fs::metadata(&file)?.len();
        ensure!(exported >= change.piece * change.pieces, "{exported} bytes exported");
        Ok(std::fs::remove_file(file)?)
    }

    /// Makes the file of the old snapshot one of the new.
    fn update(&self, [old, new]: &[String; 2]) -> anyhow::Result<Duration> {
        let kept = self.kept.to_str().context("a path of the benchmark is no UTF-8")?;
        timed(|| self.cluster.json(&["image", "export", new, kept, "--since", old]))
    }
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

pub(super) fn measure(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let mut images = Images::make(settings, report)?;
    let mut tables = [
        Table::new("The list of what differs", "ms", false, &LIST),
        Table::new("What differs, with its bytes in a file", "ms", false, &BYTES),
    ];
    let mut number = 0;
    for _ in 0..settings.rounds {
        for change in &CHANGES {
            images.round(change, number, &mut tables)?;
            number += 1;
        }
    }
    report.setup.push(format!(
        "Images of {} GiB, full of random bytes. Ours lists whole chunks of 256 KiB, Ceph's bytes. The first \
         table is like for like with rbd diff; export-diff reads and writes the bytes besides. The second has \
         image export --since, which compares what a raw file of the old snapshot holds where the two differ \
         and makes it one of the new, durably.",
        SIZE / GIB
    ));
    let [list, bytes] = &tables;
    for Change { label, .. } in &CHANGES {
        let mut claim = |what: &str, table: &Table, subject| {
            let what = format!("{what}, {label}");
            report.claim(&what, Bound::AtMost(MOST), table.ratio(label, subject), "×");
        };
        claim("diff (the command) against rbd export-diff", list, 4);
        claim("diff (the command) against rbd diff", list, 2);
        claim("image export --since against rbd export-diff", bytes, 1);
    }
    report.tables.extend(tables);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_counted_by_the_chunks_they_touch() {
        assert_eq!(CHANGES[0].bytes_of_chunks(), 100 * MIB);
        assert_eq!(CHANGES[1].bytes_of_chunks(), 400 * MIB);
    }
}
