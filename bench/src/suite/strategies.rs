//! What the paper's figures of checkpoints compare: one mirror for each strategy, which differ in
//! nothing else.

use std::fs::File;
use std::path::{Path, PathBuf};

use blobcr_tests::cluster::Cluster;
use blobcr_tests::mounted::MountedDisk;

use super::Settings;
use crate::file_layout::stored_bytes;
use crate::report::{Bound, Report, Table};
use crate::spread::Spread;

pub(super) const MIB: u64 = 1 << 20;
/// As `--strategy` names them; the first one, selective copy-on-write, is ours.
pub(super) const STRATEGIES: [&str; 4] = ["selective", "cow", "precopy", "offline"];
/// What our slowdown may be of theirs.
const TARGETS: [(usize, f64); 3] = [(1, 0.8), (2, 0.7), (3, 0.3)];

/// The strategies, and others beside them.
pub(super) fn subjects(others: &[&'static str]) -> Vec<&'static str> {
    STRATEGIES.iter().chain(others).copied().collect()
}

/// A mirror with its own repository, and its disks.
pub(super) struct Mirror {
    cluster: Cluster,
    disks: Vec<PathBuf>,
    bytes: u64,
}

impl Mirror {
    /// With so many disks of `mib` MiB.
    pub(super) fn start(
        settings: &Settings,
        strategy: &str,
        disks: usize,
        mib: u64,
    ) -> anyhow::Result<Self> {
        let cluster = settings.cluster(&settings.disk_dir, &["--strategy", strategy])?;
        let empty = cluster.scratch().join("empty");
        let bytes = mib * MIB;
        File::create(&empty)?.set_len(bytes)?;
        cluster.import(&empty, "empty")?;
        let disks = (0..disks).map(|disk| cluster.attach("empty", &Self::disk_name(disk)));
        let disks = disks.collect::<anyhow::Result<Vec<_>>>()?;
        // A disk's first checkpoint also makes its image: that is not what is measured here.
        for disk in &disks {
            MountedDisk::open(disk, false)?.commit_stable()?;
        }
        Ok(Self { cluster, disks, bytes })
    }

    pub(super) fn disk_name(disk: usize) -> String {
        format!("disk{disk}")
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The raw files of its disks.
    pub(super) fn disks(&self) -> &[PathBuf] {
        &self.disks
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.bytes
    }

    /// What a disk has on this host.
    pub(super) fn local(&self, disk: usize) -> PathBuf {
        let disks = Path::new("mirror").join("disks");
        self.cluster.dir().join(disks).join(Self::disk_name(disk))
    }

    pub(super) fn repository_bytes(&self) -> anyhow::Result<u64> {
        stored_bytes(&self.cluster.dir().join("nodes"))
    }
}

/// What is promised of the time that checkpoints add, in a table of the strategies' subjects.
pub(super) fn claim_slowdowns(report: &mut Report, added: &Table) {
    for (subject, bound) in TARGETS {
        let what = format!("slowdown against {}", STRATEGIES[subject]);
        report.claim(&what, Bound::AtMost(bound), slowdown(added, subject), "×");
    }
}

/// Our slowdown in units of the subject's: the median over the rounds, each with all its rows.
fn slowdown(added: &Table, subject: usize) -> Option<f64> {
    let rounds = added.rows.iter().map(|row| row.samples[subject].len()).min()?;
    let sum = |subject: usize, round: usize| -> f64 {
        added.rows.iter().map(|row| row.samples[subject][round]).sum()
    };
    let ratios = (0..rounds).map(|round| sum(0, round) / sum(subject, round));
    Some(Spread::of(ratios)?.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slowdown_is_that_of_all_rows_of_a_round() {
        let mut added = Table::new("", "", false, &["ours", "theirs"]);
        assert_eq!(slowdown(&added, 1), None);
        for (label, ours, theirs) in [
            ("1", 1.0, 2.0),
            ("2", 2.0, 10.0),
            ("1", 9.0, 3.0),
            ("2", 0.0, 3.0),
            ("1", 1.0, 4.0),
            ("2", 1.0, 4.0),
        ] {
            added.add(label, 0, ours);
            added.add(label, 1, theirs);
        }
        assert_eq!(slowdown(&added, 1), Some(0.25));
    }
}
