//! Stands for a guest: writes to a disk, reads from it, asks for COMMIT after COMMIT, and knows what each
//! snapshot must hold.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::daemon::wait_until;
use crate::disk_file::noise;
use crate::mounted::{Committed, MountedDisk};
use crate::roles::{Roles, Which};

const SECTOR: usize = 4096;
/// What one round writes at most.
const WRITE_MAX: usize = 75 * SECTOR;
/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(400);

/// What a round writes, and where.
fn change(seed: u64, round: u64, size: usize) -> (usize, Vec<u8>) {
    let random = noise(seed ^ round << 20, 16);
    let number =
        |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| random[at + byte])) as usize;
    let len = number(0) % WRITE_MAX / SECTOR * SECTOR + SECTOR;
    let offset = number(8) % (size - len) / SECTOR * SECTOR;
    (offset, noise(seed ^ round << 20 ^ 1, len))
}

/// A writer at work. One that is dropped ends by itself.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    thread: Option<JoinHandle<Result<Written>>>,
}

impl Writer {
    /// Begins to write to `disk`, which holds `base` now.
    #[must_use]
    pub fn start(disk: &Path, base: Vec<u8>, seed: u64) -> Self {
        let (stop, made) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let written = Written { disk: disk.to_owned(), base, seed, commits: Vec::new() };
        let shared = (Arc::clone(&stop), Arc::clone(&made));
        let thread = std::thread::spawn(move || written.go_on(&shared.0, &shared.1));
        Self { stop, made, thread: Some(thread) }
    }

    /// Waits until so many more COMMITs were accepted.
    ///
    /// # Errors
    /// When they are not within a minute, or the writer met an error.
    pub fn wait_more(&mut self, count: usize) -> Result<()> {
        let from = self.made.load(Ordering::SeqCst);
        let waited = wait_until("more COMMITs are accepted", || {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            ensure!(!ended, "the writer has ended");
            Ok(self.made.load(Ordering::SeqCst) >= from + count)
        });
        match (waited, self.thread.take_if(|thread| thread.is_finished())) {
            (Err(_), Some(ended)) => ended.join().expect("the writer does not panic").map(drop),
            (waited, _) => waited,
        }
    }

    /// Lets the writer make its last COMMIT, and waits until all of its snapshots are stable.
    ///
    /// # Errors
    /// What the writer met.
    pub fn finish(mut self) -> Result<Written> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("the writer has ended")?;
        thread.join().expect("the writer does not panic")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// What a writer did.
#[derive(Debug)]
pub struct Written {
    disk: PathBuf,
    base: Vec<u8>,
    seed: u64,
    commits: Vec<Committed>,
}

impl Written {
    fn go_on(mut self, stop: &AtomicBool, made: &AtomicUsize) -> Result<Self> {
        let mut model = self.base.clone();
        let disk = MountedDisk::open(&self.disk, false)?;
        for round in 0.. {
            let last = stop.load(Ordering::SeqCst);
            let (offset, bytes) = change(self.seed, round, model.len());
            disk.file().write_all_at(&bytes, offset as u64).context("write")?;
            model[offset..offset + bytes.len()].copy_from_slice(&bytes);
            // Some of it is here, some is fetched.
            let (offset, mut read) = change(!self.seed, round, model.len());
            disk.file().read_exact_at(&mut read, offset as u64).context("read")?;
            ensure!(read == model[offset..offset + read.len()], "round {round} read otherwise");
            if last {
                self.commits.push(disk.commit_stable()?);
                break;
            }
            self.commits.push(disk.commit().context("COMMIT")?);
            made.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(PAUSE);
        }
        Ok(self)
    }

    /// The COMMITs that were accepted, the oldest first.
    #[must_use]
    pub fn commits(&self) -> &[Committed] {
        &self.commits
    }

    /// Asserts that every snapshot is stable, intact and what the disk held then, read through the
    /// mirror `reader`; and that the disk holds what was written.
    ///
    /// # Errors
    /// Which is not.
    pub fn check(&self, roles: &Roles, reader: usize) -> Result<()> {
        let numbers: Vec<_> = self.commits.iter().map(|made| made.number).collect();
        ensure!(numbers.is_sorted_by(|a, b| a < b), "numbers that do not grow: {numbers:?}");
        let asked = |args: &[&str]| roles.json_from(Which::Mirror(reader), args);
        let image = &self.commits.first().context("there was no COMMIT")?.image;
        let listed = asked(&["snapshot", "list", image])?;
        let stable = listed.as_array().context("no list")?.iter();
        let stable = stable.filter(|one| one["state"] == "stable");
        let stable: BTreeSet<u64> = stable.filter_map(|one| one["snapshot"].as_u64()).collect();
        let lost: Vec<_> = numbers.iter().filter(|number| !stable.contains(number)).collect();
        ensure!(lost.is_empty(), "of {image} were accepted and are not stable: {lost:?}");
        let mut model = self.base.clone();
        for (round, made) in (0..).zip(&self.commits) {
            let (offset, bytes) = change(self.seed, round, model.len());
            model[offset..offset + bytes.len()].copy_from_slice(&bytes);
            let name = made.name();
            let verified = asked(&["snapshot", "verify", &name])?;
            ensure!(verified["intact"] == true, "{name}: {verified}");
            let file = format!("images/{}/{}.raw", made.image, made.number);
            holds(&roles.mount(reader).join(file), &model).with_context(|| name)?;
        }
        holds(&self.disk, &model).context("the disk")
    }
}

/// Asserts that a file holds these bytes.
fn holds(file: &Path, model: &[u8]) -> Result<()> {
    let size = File::open(file)?.metadata()?.len();
    ensure!(size == model.len() as u64, "{size} bytes");
    let content = fs::read(file)?;
    let differs = content.iter().zip(model).position(|(is, should)| is != should);
    ensure!(differs.is_none(), "byte {} differs", differs.unwrap_or(0));
    Ok(())
}
