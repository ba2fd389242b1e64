//! The benchmarks that `./do bench` runs. Each is a file here: it runs us and the alternatives by
//! turns, round after round, and returns a [`Report`].

mod after_commit;
mod bare_pipeline;
mod checkpoint_strategies;
mod downtime;
mod guest_io;
mod persist;
mod restart;
mod scale;
mod strategies;
mod verbs;
mod weak_scaling;

use std::path::{Path, PathBuf};

use anyhow::Context;
use blobcr_tests::cluster::Cluster;
use clap::ValueEnum;
use tempfile::TempDir;

use crate::peers::ceph::Ceph;
use crate::report::Report;

/// What there is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Benchmark {
    /// Reads and writes of a guest where files are in memory: what the front end costs
    GuestIoMemory,
    /// Reads and writes of a guest where files are on a disk
    GuestIoDisk,
    /// COMMIT and a guest's CHECKPOINT, by how much is dirty, beside snapshots of qcow2 and of Ceph RBD
    Downtime,
    /// A checkpoint of several disks whose applications write on, by strategy: the paper's figures 4 and 5
    CheckpointStrategies,
    /// An MPI job of 1 to 8 ranks with three global checkpoints, by strategy: the paper's figure 6
    WeakScaling,
    /// Writes right after a COMMIT against those before it, beside snapshots of qcow2 and the least that persisting takes
    AfterCommit,
    /// A virtual machine starts on another host, lazily and after a copy: the paper's figure 7
    Restart,
    /// Many hosts that commit at once, and a model of thousands
    Scale,
    /// How fast a COMMIT becomes stable, by content and policy, beside restic, borg, qemu-img and rbd import-diff
    Persist,
    /// Attach, clone, roll back and diff by the size of the image and by what was written
    Verbs,
    /// Diff of two snapshots of a full image, beside rbd diff and rbd export-diff
    VerbsDiff,
    /// The same as verbs, and reads, by the number of snapshots
    VerbsSnapshots,
    /// A thousand disks of one snapshot, and an agent's step
    VerbsFork,
}

/// Where and how much.
#[derive(Debug)]
pub struct Settings {
    /// A directory on the disk to measure.
    pub disk_dir: PathBuf,
    /// A directory in memory.
    pub memory_dir: PathBuf,
    /// How often each measurement is repeated.
    pub rounds: u32,
    /// Just enough to see that it works; the figures mean nothing.
    pub quick: bool,
}

impl Benchmark {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Runs it. Nothing is left mounted, running or on the disk.
    ///
    /// # Errors
    /// When a part of it, or an alternative that must be there, fails.
    pub fn run(self, settings: &Settings) -> anyhow::Result<Report> {
        let mut report = match self {
            Self::GuestIoMemory => guest_io::run(settings, guest_io::Place::Memory),
            Self::GuestIoDisk => guest_io::run(settings, guest_io::Place::Disk),
            Self::Downtime => downtime::run(settings),
            Self::CheckpointStrategies => checkpoint_strategies::run(settings),
            Self::WeakScaling => weak_scaling::run(settings),
            Self::AfterCommit => after_commit::run(settings),
            Self::Restart => restart::run(settings),
            Self::Scale => scale::run(settings),
            Self::Persist => persist::run(settings),
            Self::Verbs => verbs::run(settings, verbs::Part::Sizes),
            Self::VerbsDiff => verbs::run(settings, verbs::Part::Diffs),
            Self::VerbsSnapshots => verbs::run(settings, verbs::Part::Snapshots),
            Self::VerbsFork => verbs::run(settings, verbs::Part::Forks),
        }?;
        report.name = self.name();
        report.setup.push(machine());
        Ok(report)
    }
}

impl Settings {
    /// The usual size, or a small one where only the working is of interest.
    fn size(&self, usual: u64, small: u64) -> u64 {
        if self.quick { small } else { usual }
    }

    fn scratch(&self, parent: &Path) -> anyhow::Result<TempDir> {
        let parent = std::path::absolute(parent)?;
        std::fs::create_dir_all(&parent).with_context(|| format!("make {}", parent.display()))?;
        Ok(tempfile::Builder::new().prefix("blobcr-bench-").tempdir_in(parent)?)
    }

    fn cluster(&self, parent: &Path, args: &[&str]) -> anyhow::Result<Cluster> {
        Cluster::start_in(self.scratch(parent)?, args)
    }

    /// Ceph on the disk, where it is installed; elsewhere the report says that it is not.
    fn ceph(&self, report: &mut Report) -> anyhow::Result<Option<Ceph>> {
        if !Ceph::is_installed() {
            let packages = "ceph-mon, ceph-mgr, ceph-osd, ceph-common";
            let said = format!("Ceph (Debian: {packages}) is not installed, and was not measured.");
            report.setup.push(said);
            return Ok(None);
        }
        report.setup.push(
            "Ceph: one monitor, one manager and one OSD on this host, one copy of everything; its \
             object maps and fast diff are on."
                .to_owned(),
        );
        Ok(Some(Ceph::start(&std::path::absolute(&self.disk_dir)?)?))
    }
}

/// What it ran on: figures of one machine say little of another.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = model.map_or("processor unknown", |(_, model)| model);
    format!("{cores} cores, {model}, Linux {}.", kernel.trim())
}
