//! What the verbs of snapshots and disks cost, and whether that grows with the size of the image,
//! with what was written, or with the number of snapshots.

mod by_dirty;
mod by_size;
mod by_snapshots;
mod diffs;
mod forks;

use std::time::Duration;

use blobcr_tests::cluster::Cluster;

use super::Settings;
use crate::peers::reflink::Reflinks;
use crate::report::Report;
use crate::spread::Spread;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What is compared where a verb has counterparts.
const SUBJECTS: [&str; 5] =
    ["blobcr, the call", "blobcr, the command", "qemu-img", "reflink on btrfs", "rbd"];
const CALL: usize = 0;
const COMMAND: usize = 1;
const QEMU: usize = 2;
const REFLINK: usize = 3;
const RBD: usize = 4;

/// What a verb may take, in ms.
const LIMIT_MS: f64 = 5.0;
/// What a cost that does not grow may differ by from the least to the greatest: as much as two
/// measurements of one thing do on a shared machine.
const FLAT: f64 = 1.5;

/// One part of the verbs: each is a benchmark of its own, because each makes a repository of its own
/// that takes a while to fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// By the size of the image, and by what was written.
    Sizes,
    /// Diff of a full image.
    Diffs,
    /// By the number of snapshots.
    Snapshots,
    /// Many disks at once.
    Forks,
}

pub(super) fn run(settings: &Settings, part: Part) -> anyhow::Result<Report> {
    let title = match part {
        Part::Sizes => "Verbs by the size of the image, and by what was written",
        Part::Diffs => "Diff of two snapshots of a full image",
        Part::Snapshots => "Verbs and reads by the number of snapshots",
        Part::Forks => "A thousand disks of one snapshot",
    };
    let mut report = Report::new("", title);
    report.setup.push(format!(
        "\"The call\" is what a client of the services waits for; \"the command\" has the start of \
         `blobcr` and its connections besides. Medians of {} in each of {} rounds.",
        if part == Part::Diffs { 1 } else { samples(settings) },
        settings.rounds
    ));
    match part {
        Part::Sizes => {
            by_size::measure(settings, &mut report)?;
            by_dirty::measure(settings, &mut report)?;
        }
        Part::Diffs => diffs::measure(settings, &mut report)?,
        Part::Snapshots => by_snapshots::measure(settings, &mut report)?,
        Part::Forks => forks::measure(settings, &mut report)?,
    }
    Ok(report)
}

fn samples(settings: &Settings) -> u64 {
    settings.size(9, 2)
}

/// The median of several tries, in ms.
fn median_ms(
    tries: u64,
    mut once: impl FnMut(u64) -> anyhow::Result<Duration>,
) -> anyhow::Result<f64> {
    let times = (0..tries).map(|number| Ok(once(number)?.as_secs_f64() * 1e3));
    let times = times.collect::<anyhow::Result<Vec<f64>>>()?;
    Ok(Spread::of(times).map_or(f64::NAN, |spread| spread.median))
}

/// How long something takes.
fn timed<T>(call: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Duration> {
    let began = std::time::Instant::now();
    call()?;
    Ok(began.elapsed())
}

/// A btrfs, where this host lets us have one.
fn reflinks(cluster: &Cluster, report: &mut Report) -> Option<Reflinks> {
    match Reflinks::mount(cluster.scratch()) {
        Ok(reflinks) => Some(reflinks),
        Err(error) => {
            report.setup.push(format!("No reflinks were measured: {error:#}."));
            None
        }
    }
}
