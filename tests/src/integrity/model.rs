//! A disk through the mount against plain bytes: random operations, kills of the daemon at random
//! moments, and a comparison of every byte of the disk and of every stable snapshot. One seed gives
//! one sequence of operations; where a kill hits it is up to the machine.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::Cluster;
use crate::daemon::wait_until;
use crate::disk_file::noise;
use crate::mounted::MountedDisk;

/// Small, so that a comparison of all snapshots is quick: borders are what matters.
const CHUNK: usize = 64 << 10;
/// The last chunk is cut within a sector.
const SIZE: usize = 33 * CHUNK + 2048 + 7;
/// Operations between two kills, at most.
const ROUND_STEPS: usize = 120;
/// A kill comes after this at most, so that many rounds end in the middle of something.
const KILL_AFTER_MAX: Duration = Duration::from_millis(400);

/// What a trial did, so that one that did nothing is seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Operations on the disk.
    pub operations: u64,
    /// Those that a kill interrupted.
    pub interrupted: u64,
    /// Kills of the daemon.
    pub kills: u64,
    /// Snapshots that were compared, each time anew.
    pub compared: u64,
    /// Snapshots that failed, as they may when the daemon was killed.
    pub failed: u64,
    /// Rollbacks.
    pub rollbacks: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.operations += other.operations;
        self.interrupted += other.interrupted;
        self.kills += other.kills;
        self.compared += other.compared;
        self.failed += other.failed;
        self.rollbacks += other.rollbacks;
    }
}

/// What the operation that a kill interrupted may have done.
#[derive(Debug)]
enum Unsure {
    /// Each byte of the range is as before or as this.
    Bytes(Range<usize>, Vec<u8>),
    /// The whole disk is as before, or as this.
    Whole(Rc<[u8]>),
    /// There may be one more snapshot.
    Snapshot(Rc<[u8]>),
}

/// How an operation ended.
enum Done {
    Yes,
    /// The daemon was killed meanwhile.
    Killed(Option<Unsure>),
}

struct Trial {
    cluster: Cluster,
    path: PathBuf,
    /// The disk, opened in two ways.
    files: Vec<MountedDisk>,
    model: Vec<u8>,
    /// Of the disk's checkpoint image.
    snapshots: BTreeMap<u64, Rc<[u8]>>,
    /// Snapshots that a kill left without a known number.
    nameless: Vec<Rc<[u8]>>,
    stable: Vec<u64>,
    image: Option<String>,
    random: StdRng,
    tally: Tally,
}

/// Runs one trial of `rounds` rounds, each of which ends with a kill or a stop of the daemon.
///
/// # Errors
/// Where the disk or a snapshot differs from what it should hold; with the seed.
pub fn trial(seed: u64, rounds: usize) -> Result<Tally> {
    let mut trial = Trial::new(seed)?;
    let ran = trial.run(rounds);
    ran.map(|()| trial.tally).map_err(|error| {
        // The alternate form has the causes too.
        let said = trial.cluster.log();
        anyhow::anyhow!("BLOBCR_SEED={seed}: {error:#}\n--- what blobcr up said\n{said}---")
    })
}

impl Trial {
    fn new(seed: u64) -> Result<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut model = noise(seed, SIZE);
        // Some chunks are absent, and some bytes of others are zero.
        for chunk in model.chunks_mut(CHUNK) {
            match random.random_range(0..4) {
                0 => chunk.fill(0),
                1 => {
                    let cut = chunk.len() / 8;
                    chunk[cut..].fill(0);
                }
                _ => {}
            }
        }
        // Small budgets, so that writers meet the end of them.
        let cluster = Cluster::start(&["--aside", "256K", "--spill", "1M", "--cache", "1M"])?;
        let raw = cluster.scratch().join("base.raw");
        fs::write(&raw, &model)?;
        let raw = raw.to_string_lossy();
        cluster.json(&["image", "import", &raw, "base", "--chunk-size", "64K"])?;
        let path = cluster.attach("base", "d")?;
        let (snapshots, nameless, stable) = Default::default();
        let (image, tally) = Default::default();
        let files = Vec::new();
        Ok(Self { cluster, path, files, model, snapshots, nameless, stable, image, random, tally })
    }

    fn run(&mut self, rounds: usize) -> Result<()> {
        for round in 0..rounds {
            let kill = self.random.random_ratio(3, 4);
            self.round(kill).with_context(|| format!("round {round}"))?;
            self.compare_disk().with_context(|| format!("after round {round}"))?;
            if self.random.random_ratio(1, 2) {
                self.compare_snapshots().with_context(|| format!("after round {round}"))?;
            }
        }
        self.compare_snapshots().context("at the end")?;
        self.compare_disk().context("at the end")?;
        self.cluster.stop(Signal::TERM)
    }

    /// Operations until the daemon is gone, and its restart.
    fn round(&mut self, kill: bool) -> Result<()> {
        self.open()?;
        let killer = if kill { Some(self.kill_soon()?) } else { None };
        let mut unsure = None;
        for step in 0..ROUND_STEPS {
            match self.step(kill).with_context(|| format!("step {step}"))? {
                Done::Yes => self.tally.operations += 1,
                Done::Killed(what) => {
                    self.tally.interrupted += 1;
                    unsure = what;
                    break;
                }
            }
        }
        self.files.clear();
        match killer {
            Some(killer) => {
                killer.join().expect("the killer does not panic");
                self.cluster.kill()?;
                self.tally.kills += 1;
            }
            None => self.cluster.stop(Signal::TERM)?,
        }
        self.cluster.restart().context("restart")?;
        match unsure {
            Some(unsure) => self.settle(unsure),
            None => Ok(()),
        }
    }

    fn kill_soon(&mut self) -> Result<JoinHandle<()>> {
        let pid = Pid::from_raw(i32::try_from(self.cluster.daemon()?.pid())?).context("no pid")?;
        // Most in the middle of what takes a while, some at once.
        let after = self.random.random_range(Duration::ZERO..KILL_AFTER_MAX);
        Ok(std::thread::spawn(move || {
            std::thread::sleep(after);
            // It has not been waited for, so its id is still its own.
            let _ = kill_process(pid, Signal::KILL);
        }))
    }

    /// A range that likes borders of sectors and chunks.
    fn range(&mut self) -> Range<usize> {
        let unit = [1, 512, 4096, CHUNK][self.random.random_range(0..4)];
        let mut start = self.random.random_range(0..SIZE) / unit * unit;
        if self.random.random_ratio(1, 4) {
            start = (start + self.random.random_range(0..3)).saturating_sub(1).min(SIZE - 1);
        }
        let max = [10, 4096, 3 * CHUNK, 20 * CHUNK][self.random.random_range(0..4)];
        let mut len = self.random.random_range(1..=max);
        if self.random.random_ratio(1, 3) {
            // Up to a border.
            len = (start + len).next_multiple_of(unit) - start;
        }
        start..(start + len).min(SIZE)
    }

    fn open(&mut self) -> Result<()> {
        for direct in [false, true] {
            self.files.push(MountedDisk::open(&self.path, direct)?);
        }
        Ok(())
    }

    fn step(&mut self, kill: bool) -> Result<Done> {
        let range = self.range();
        let way = self.random.random_range(0..self.files.len());
        let file = &self.files[way];
        let what = self.random.random_range(0..100);
        let done = match what {
            0..40 => {
                let mut data = vec![0; range.len()];
                self.random.fill(&mut data[..]);
                let wrote = file.file().write_all_at(&data, range.start as u64);
                self.changed(wrote, range.clone(), data)
            }
            40..60 => self.read(way, &range),
            60..68 => {
                let zeros = vec![0; range.len()];
                self.changed(file.zero(&range), range.clone(), zeros)
            }
            68..76 => {
                let zeros = vec![0; range.len()];
                self.changed(file.punch(&range), range.clone(), zeros)
            }
            76..82 => Self::ended(file.file().sync_data(), || None),
            82..97 => self.commit(way),
            _ => self.rollback(),
        };
        let done = done.with_context(|| format!("operation {what} on {range:?}"))?;
        if let (Done::Killed(_), false) = (&done, kill) {
            bail!("operation {what} on {range:?} failed and nobody killed the daemon");
        }
        Ok(done)
    }

    /// Only the death of the daemon makes a call fail, with one of these.
    fn ended(called: io::Result<()>, unsure: impl FnOnce() -> Option<Unsure>) -> Result<Done> {
        use rustix::io::Errno;
        let Err(error) = called else { return Ok(Done::Yes) };
        let errno = Errno::from_io_error(&error);
        let gone = [Errno::NOTCONN, Errno::CONNABORTED, Errno::IO, Errno::INTR, Errno::NODEV];
        ensure!(errno.is_some_and(|errno| gone.contains(&errno)), "failed: {error}");
        Ok(Done::Killed(unsure()))
    }

    fn changed(&mut self, called: io::Result<()>, at: Range<usize>, new: Vec<u8>) -> Result<Done> {
        if called.is_ok() {
            self.model[at].copy_from_slice(&new);
            return Ok(Done::Yes);
        }
        Self::ended(called, || Some(Unsure::Bytes(at, new)))
    }

    fn read(&self, way: usize, range: &Range<usize>) -> Result<Done> {
        let mut data = vec![0; range.len()];
        let read = self.files[way].file().read_exact_at(&mut data, range.start as u64);
        if read.is_ok() {
            differs(&data, &self.model[range.clone()])?;
        }
        Self::ended(read, || None)
    }

    fn commit(&mut self, way: usize) -> Result<Done> {
        let now: Rc<[u8]> = self.model.as_slice().into();
        match self.files[way].commit() {
            Ok(made) => {
                let newest = self.snapshots.keys().next_back().copied().unwrap_or_default();
                ensure!(made.number > newest, "{} after {newest}", made.name());
                self.image = Some(made.image);
                self.snapshots.insert(made.number, now);
                Ok(Done::Yes)
            }
            Err(error) => Self::ended(Err(error), || Some(Unsure::Snapshot(now))),
        }
    }

    /// Rolls back to a snapshot that was seen stable. Nobody may have the disk open meanwhile.
    fn rollback(&mut self) -> Result<Done> {
        if self.stable.is_empty() {
            return Ok(Done::Yes);
        }
        let number = self.stable[self.random.random_range(0..self.stable.len())];
        let then = Rc::clone(self.snapshots.get(&number).context("a stable one is known")?);
        self.files.clear();
        let mut ran = None;
        wait_until("the disk is no longer in use", || {
            let now = self.cluster.run(&["disk", "rollback", "d", &format!("@{number}")])?;
            let in_use = now.code == 4;
            ran = Some(now);
            Ok(!in_use)
        })?;
        let ran = ran.context("it was tried")?;
        if ran.code == 0 {
            self.model.copy_from_slice(&then);
            self.tally.rollbacks += 1;
            // It may be killed just now.
            return Ok(if self.open().is_ok() { Done::Yes } else { Done::Killed(None) });
        }
        // 5: the repository, here the daemon, is unavailable.
        ensure!(ran.code == 5 || ran.code == 1, "rollback to {number}: {ran:?}");
        Ok(Done::Killed(Some(Unsure::Whole(then))))
    }

    /// Sees what became of an interrupted operation, which must be one of what it may be.
    fn settle(&mut self, unsure: Unsure) -> Result<()> {
        match unsure {
            Unsure::Snapshot(content) => self.nameless.push(content),
            Unsure::Whole(other) => {
                if fs::read(&self.path)? == *other {
                    self.model.copy_from_slice(&other);
                }
            }
            Unsure::Bytes(range, new) => {
                let file = MountedDisk::open(&self.path, false)?;
                let mut now = vec![0; range.len()];
                file.file().read_exact_at(&mut now, range.start as u64)?;
                let old = &mut self.model[range.clone()];
                let wrong = (0..now.len()).find(|at| now[*at] != old[*at] && now[*at] != new[*at]);
                if let Some(at) = wrong {
                    bail!("byte {} of {range:?} is neither old nor new", range.start + at);
                }
                old.copy_from_slice(&now);
            }
        }
        Ok(())
    }

    fn compare_disk(&self) -> Result<()> {
        differs(&fs::read(&self.path)?, &self.model).context("the disk")
    }

    /// Waits until no snapshot is pending, and compares all of them.
    fn compare_snapshots(&mut self) -> Result<()> {
        if self.image.is_none() {
            self.image = self.cluster.json(&["disk", "info", "d"])?["checkpoint_image"]
                .as_str()
                .map(str::to_owned);
        }
        let Some(image) = self.image.clone() else { return Ok(()) };
        let mut states = BTreeMap::new();
        wait_until("no snapshot is pending", || {
            let disk = self.cluster.json(&["disk", "info", "d"])?;
            let none = disk["pending"].as_array().is_some_and(Vec::is_empty);
            let list = self.cluster.json(&["snapshot", "list", &image])?;
            let list = list.as_array().context("no list")?;
            states = list
                .iter()
                .filter_map(|one| {
                    Some((one["snapshot"].as_u64()?, one["state"].as_str()?.to_owned()))
                })
                .collect();
            // One that failed is announced after it is no longer pending.
            let announced = self.snapshots.keys().all(|number| states.contains_key(number));
            Ok(none && announced && states.values().all(|state| state != "pending"))
        })
        .with_context(|| {
            let lost = self.snapshots.keys().filter(|number| !states.contains_key(number));
            format!("accepted and not listed: {:?}; listed: {states:?}", lost.collect::<Vec<_>>())
        })?;
        // The first is the CLONE: what was attached.
        states.remove(&1);
        self.stable.clear();
        for (number, state) in states {
            if state != "stable" {
                ensure!(state == "failed" && self.tally.kills > 0, "{image}@{number} is {state}");
                self.tally.failed += 1;
                continue;
            }
            let file = self.cluster.mount().join(format!("images/{image}/{number}.raw"));
            let content = fs::read(file).with_context(|| format!("read {image}@{number}"))?;
            self.compare_snapshot(number, &content).with_context(|| format!("{image}@{number}"))?;
            self.stable.push(number);
            self.tally.compared += 1;
        }
        Ok(())
    }

    fn compare_snapshot(&mut self, number: u64, content: &[u8]) -> Result<()> {
        if let Some(known) = self.snapshots.get(&number) {
            return differs(content, known);
        }
        let found = self.nameless.iter().find(|nameless| content == nameless.as_ref());
        let found = Rc::clone(found.context("nobody asked for a snapshot that holds this")?);
        self.snapshots.insert(number, found);
        Ok(())
    }
}

/// Says where two runs of bytes differ, if they do.
fn differs(is: &[u8], should: &[u8]) -> Result<()> {
    ensure!(is.len() == should.len(), "{} bytes, not {}", is.len(), should.len());
    let Some(first) = (0..is.len()).find(|at| is[*at] != should[*at]) else { return Ok(()) };
    let last = (0..is.len()).rfind(|at| is[*at] != should[*at]).unwrap_or(first);
    let count = (0..is.len()).filter(|at| is[*at] != should[*at]).count();
    bail!(
        "{count} bytes in {first}..={last} differ (chunk {}, sector {}): {:?} should be {:?}",
        first / CHUNK,
        first % CHUNK / 4096,
        &is[first..(first + 16).min(is.len())],
        &should[first..(first + 16).min(is.len())],
    )
}
