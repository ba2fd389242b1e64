//! The paper's application: on each of several disks, it fills the disk with random data and syncs
//! it, has a checkpoint taken, and does the same again at once.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rand::RngCore;

/// Of one write: what the kernel hands to a FUSE server at most.
const WRITE_BYTES: u64 = 1 << 20;

/// What the application of one disk went through.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lived {
    /// The checkpoint, as the application sees it: a call.
    pub(super) downtime: Duration,
    /// What the checkpoint and the round after it took longer than the round before it.
    pub(super) added: f64,
    /// The longest write of the round after it.
    pub(super) longest_write: Duration,
}

/// One round of writes: how long it took, and its longest write.
fn write_all(file: &File, bytes: u64) -> anyhow::Result<(Duration, Duration)> {
    let began = Instant::now();
    let mut longest = Duration::ZERO;
    let mut block = vec![0; WRITE_BYTES as usize];
    for offset in (0..bytes).step_by(block.len()) {
        rand::rng().fill_bytes(&mut block);
        let since = Instant::now();
        file.write_all_at(&block, offset)?;
        longest = longest.max(since.elapsed());
    }
    file.sync_data()?;
    Ok((began.elapsed(), longest))
}

/// Does something for all disks at once.
fn each<T: Send>(
    files: &[File],
    act: impl Fn(usize, &File) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    std::thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(disk, file)| scope.spawn(move || act(disk, file)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect()
    })
}

fn open(path: &Path) -> anyhow::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.with_context(|| format!("open {}", path.display()))
}

/// Runs it on all of these disks, of so many bytes each. `checkpoint` is what it calls.
///
/// # Errors
/// When a write or the checkpoint fails.
pub(super) fn run(
    paths: &[PathBuf],
    bytes: u64,
    checkpoint: impl Fn(usize) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<Vec<Lived>> {
    let files: Vec<File> = paths.iter().map(|path| open(path)).collect::<Result<_, _>>()?;
    each(&files, |_, file| write_all(file, bytes))?;
    let before = each(&files, |_, file| write_all(file, bytes))?;
    each(&files, |disk, file| {
        let began = Instant::now();
        checkpoint(disk)?;
        let downtime = began.elapsed();
        let (_, longest_write) = write_all(file, bytes)?;
        let added = began.elapsed().as_secs_f64() - before[disk].0.as_secs_f64();
        Ok(Lived { downtime, added, longest_write })
    })
}
