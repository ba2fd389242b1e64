//! What holds for every byte, whatever happens: the tests run each for seconds, the soak for hours.

pub mod model;
pub mod tools;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::Cluster;
use crate::disk_file::same;
use crate::mounted::{Committed, MountedDisk};

/// Between two COMMITs beside a tool that writes: about as long as one needs to become stable.
pub const COMMIT_EVERY: Duration = Duration::from_millis(100);

/// Makes a COMMIT of the disk at `path` now and then while `work` runs. Returns what they made, the
/// oldest first; the last one was made when the work was done.
///
/// # Errors
/// The work's own, or when a COMMIT fails.
pub fn with_commits(
    path: &Path,
    every: Duration,
    work: impl FnOnce() -> Result<()>,
) -> Result<Vec<Committed>> {
    let done = AtomicBool::new(false);
    let disk = MountedDisk::open(path, false)?;
    std::thread::scope(|scope| {
        let commits = scope.spawn(|| {
            let mut made = Vec::new();
            while !done.load(Ordering::Relaxed) {
                made.push(disk.commit().context("COMMIT beside a writer")?);
                std::thread::sleep(every);
            }
            made.push(disk.commit_stable()?);
            Ok(made)
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let made = commits.join().expect("a COMMIT does not panic");
        worked?;
        made
    })
}

/// Asserts that every one of these snapshots of the disk at `path` is stable and intact, and that
/// the last is what the disk holds now.
///
/// # Errors
/// Which is not.
pub fn check_snapshots(cluster: &Cluster, path: &Path, made: &[Committed]) -> Result<()> {
    let last = made.last().context("there was no COMMIT")?;
    for one in made {
        let name = one.name();
        let waited = cluster.json(&["snapshot", "wait", &name])?;
        ensure!(waited["state"] == "stable", "{name}: {waited}");
        let verified = cluster.json(&["snapshot", "verify", &name])?;
        ensure!(verified["intact"] == true, "{name}: {verified}");
    }
    let numbers: Vec<_> = made.iter().map(|one| one.number).collect();
    ensure!(numbers.is_sorted_by(|a, b| a < b), "numbers that do not grow: {numbers:?}");
    let file = cluster.mount().join(format!("images/{}/{}.raw", last.image, last.number));
    same(path, &file).with_context(|| format!("the disk and {}", last.name()))
}
