//! Random operations, crashes and failures against a plain disk in memory.
//!
//! Each run has a seed; a run that fails prints it, and `BLOBCR_SEED=N` runs just that one.
//! `BLOBCR_RUNS=N` makes more runs than the usual few.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::*;
use super::crash_files::{Crash, CrashFiles};
use super::support::*;
use blobcr_proto::v1::SnapshotState;

const SECTOR: usize = 4096;
const OPERATIONS: usize = 150;
const RUNS: u64 = 24;

/// A snapshot that was promised.
struct Snapshot {
    bytes: Vec<u8>,
    /// Chunks that may differ from the snapshot before.
    chunks: BTreeSet<usize>,
    /// Some of its bytes were overwritten since it was cut.
    touched: bool,
    settled: Option<Settled>,
}

/// What the disk under test must be like.
struct Model {
    path: PathBuf,
    disk: Option<Arc<Disk>>,
    room: (u64, u64),
    now: Vec<u8>,
    flushed: Vec<u8>,
    /// Of each sector, what it held since the last flush.
    versions: BTreeMap<usize, Vec<Vec<u8>>>,
    dirty: BTreeSet<usize>,
    snapshots: BTreeMap<u64, Snapshot>,
    image: Option<u64>,
    attached: Vec<u8>,
    /// A host crash came over what was pending.
    host_crashed: bool,
}

struct Run {
    rng: StdRng,
    seed: u64,
    strategy: Strategy,
    root: tempfile::TempDir,
    world: Arc<World>,
    files: Arc<CrashFiles>,
    boot: u64,
    directories: u64,
    disks: Vec<Model>,
    planned: usize,
    log: Vec<String>,
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in &self.log {
                println!("{line}");
            }
            println!("{:?}: replay with BLOBCR_SEED={}", self.strategy, self.seed);
        }
    }
}

impl Model {
    fn disk(&self) -> Arc<Disk> {
        Arc::clone(self.disk.as_ref().unwrap())
    }

    fn pending(&self) -> Vec<u64> {
        let open = self.snapshots.iter().filter(|(_, snapshot)| snapshot.settled.is_none());
        open.map(|(number, _)| *number).collect()
    }

    /// `now[range]` becomes `data`.
    fn change(&mut self, offset: usize, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let (first, last) = (offset / SECTOR, (offset + data.len() - 1) / SECTOR);
        self.now[offset..offset + data.len()].copy_from_slice(data);
        for sector in first..=last {
            let version = self.sector(sector).to_vec();
            self.versions.entry(sector).or_default().push(version);
        }
        for chunk in offset / CHUNK..=(offset + data.len() - 1) / CHUNK {
            self.dirty.insert(chunk);
            let mut holds = false;
            for number in self.pending() {
                let snapshot = self.snapshots.get_mut(&number).unwrap();
                holds |= snapshot.chunks.contains(&chunk);
                snapshot.touched |= holds;
            }
        }
    }

    fn sector(&self, sector: usize) -> &[u8] {
        let start = sector * SECTOR;
        &self.now[start..(start + SECTOR).min(self.now.len())]
    }

    fn set_flushed(&mut self) {
        self.flushed.clone_from(&self.now);
        self.versions.clear();
    }

    /// All is at once what `bytes` are.
    fn replace(&mut self, bytes: Vec<u8>) {
        self.now = bytes;
        self.dirty.clear();
        self.set_flushed();
    }

    /// Whether the disk may hold `found` after a crash of the host.
    fn may_hold(&self, found: &[u8]) -> Result<(), String> {
        for (sector, bytes) in found.chunks(SECTOR).enumerate() {
            let start = sector * SECTOR;
            let flushed = &self.flushed[start..start + bytes.len()];
            let versions = self.versions.get(&sector);
            let later = versions.is_some_and(|versions| versions.iter().any(|v| v == bytes));
            if bytes != flushed && !later {
                return Err(format!("sector {sector} holds none of its versions"));
            }
        }
        Ok(())
    }
}

impl Run {
    fn new(seed: u64, strategy: Strategy) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let root = tempfile::tempdir().unwrap();
        let world = World::new();
        let files = CrashFiles::new(seed);
        let mut run = Self {
            seed,
            strategy,
            world,
            files,
            boot: 1,
            directories: 0,
            disks: Vec::new(),
            planned: 0,
            log: Vec::new(),
            root,
            rng: StdRng::seed_from_u64(seed ^ 0xB10B),
        };
        for index in 0..rng.random_range(1..=2u64) {
            let chunks = rng.random_range(1..7usize);
            let tail = [0, 1, 511, 4096, 5000][rng.random_range(0..5)];
            let size = chunks * CHUNK + tail;
            let attached = rng.random_range(0..=size);
            let mut base = pattern(seed ^ index, attached);
            for chunk in base.chunks_mut(CHUNK) {
                if rng.random_bool(0.3) {
                    chunk.fill(0);
                }
            }
            let room = [(100, 100), (2, 3), (1, 0), (0, 0), (0, 100)][rng.random_range(0..5)];
            let name = format!("disk{index}");
            let source = run.world.image(&format!("base{index}"), &base);
            base.resize(size, 0);
            let path = run.directory();
            let deps = run.deps(room);
            let spec = spec_of(&name, source, size as u64);
            let disk = Disk::create(&path, spec, deps).unwrap();
            run.disks.push(Model {
                path,
                disk: Some(disk),
                room,
                flushed: base.clone(),
                now: base.clone(),
                attached: base,
                versions: BTreeMap::new(),
                dirty: BTreeSet::new(),
                snapshots: BTreeMap::new(),
                image: None,
                host_crashed: false,
            });
        }
        run.world.hold();
        run
    }

    fn directory(&mut self) -> PathBuf {
        self.directories += 1;
        self.root.path().join(format!("d{}", self.directories))
    }

    fn deps(&self, room: (u64, u64)) -> DiskDeps {
        let io = Arc::clone(&self.files) as Arc<dyn FileIo>;
        let deps = deps(&self.world, room, &format!("boot{}", self.boot));
        DiskDeps { io, strategy: self.strategy, ..deps }
    }

    fn note(&mut self, text: String) {
        self.log.push(text);
    }

    /// Waits until every persister waits for a step, or has nothing to do.
    async fn quiesce(&mut self) {
        for _ in 0..100_000 {
            let busy = self.disks.iter().filter_map(|model| model.disk.as_ref());
            let busy = busy.filter(|disk| !disk.status().pending.is_empty()).count();
            if self.world.waiting.load(Ordering::SeqCst) == busy {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("a persister hangs");
    }

    /// One step of some persister, if one waits.
    async fn step(&mut self) -> bool {
        self.quiesce().await;
        if self.world.waiting.load(Ordering::SeqCst) == 0 {
            return false;
        }
        self.world.take_step().await;
        self.quiesce().await;
        self.look().await;
        true
    }

    /// Finds out what settled, and checks it.
    async fn look(&mut self) {
        for index in 0..self.disks.len() {
            let Some(disk) = self.disks[index].disk.clone() else { continue };
            let pending = disk.status().pending;
            for number in self.disks[index].pending() {
                if pending.contains(&number) {
                    continue;
                }
                let settled = disk.wait_stable(number).await.unwrap();
                self.settled(index, number, settled);
            }
        }
    }

    fn settled(&mut self, index: usize, number: u64, settled: Settled) {
        self.log.push(format!("disk{index}: snapshot {number} is {settled:?}"));
        let model = &mut self.disks[index];
        let image = model.image.unwrap();
        let before = model.snapshots.range(..number).next_back();
        let before_failed =
            before.is_some_and(|(_, s)| matches!(s.settled, Some(Settled::Failed { .. })));
        let host_crashed = model.host_crashed;
        let snapshot = model.snapshots.get_mut(&number).unwrap();
        snapshot.settled = Some(settled.clone());
        let reason = match settled {
            Settled::Stable => {
                assert!(self.world.bytes(image, number) == snapshot.bytes, "snapshot {number}");
                return;
            }
            Settled::Failed { reason } => reason,
        };
        if reason == "planned" {
            assert!(self.planned > 0, "no failure was planned");
            self.planned -= 1;
        } else if reason.contains("was overwritten after its snapshot") {
            assert!(before_failed && snapshot.touched, "{reason}");
        } else {
            assert!(reason.contains("stopped"), "{reason}");
            assert!(host_crashed || snapshot.touched, "its bytes were all there: {reason}");
        }
        // Its changes are the next one's.
        let chunks = snapshot.chunks.clone();
        match model.pending().first() {
            Some(next) => model.snapshots.get_mut(next).unwrap().chunks.extend(chunks),
            None => model.dirty.extend(chunks),
        }
    }

    /// Lets persisters go on until `done` is.
    async fn stepping<T>(&mut self, done: impl Future<Output = T>) -> T {
        let mut done = Box::pin(done);
        for _ in 0..10_000 {
            tokio::select! {
                biased;
                result = &mut done => return result,
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
            if self.world.waiting.load(Ordering::SeqCst) > 0 {
                self.world.take_step().await;
            }
        }
        panic!("it hangs");
    }

    fn range(&mut self, index: usize) -> (usize, usize) {
        let size = self.disks[index].now.len();
        let from = match self.rng.random_range(0..4) {
            0 => self.rng.random_range(0..size),
            1 => self.rng.random_range(0..=size / SECTOR) * SECTOR,
            2 => self.rng.random_range(0..=size / CHUNK) * CHUNK,
            _ => (self.rng.random_range(0..=size / CHUNK) * CHUNK)
                .saturating_sub(self.rng.random_range(0..10)),
        };
        let from = from.min(size - 1);
        let len = match self.rng.random_range(0..5) {
            0 => self.rng.random_range(1..600),
            1 => SECTOR * self.rng.random_range(1..5),
            2 => CHUNK * self.rng.random_range(1..3),
            3 => self.rng.random_range(1..3 * CHUNK),
            _ => self.rng.random_range(1..3 * SECTOR),
        };
        (from, len.min(size - from))
    }

    async fn write(&mut self, index: usize) {
        let (from, len) = self.range(index);
        self.note(format!("disk{index}: write {from}+{len}"));
        let data = pattern(self.rng.random(), len);
        let disk = self.disks[index].disk();
        self.stepping(disk.put(from as u64, &data)).await;
        self.disks[index].change(from, &data);
    }

    async fn zero(&mut self, index: usize) {
        let (from, len) = self.range(index);
        let how = if self.rng.random() { Zero::Discard } else { Zero::WriteZeroes };
        self.note(format!("disk{index}: {how:?} {from}+{len}"));
        let disk = self.disks[index].disk();
        self.stepping(disk.wipe(from as u64, len as u64, how)).await;
        let (from, to) = self.zeroed(index, from, len, how);
        self.disks[index].change(from, &vec![0; to - from]);
    }

    /// What of the range becomes zeros.
    fn zeroed(&self, index: usize, from: usize, len: usize, how: Zero) -> (usize, usize) {
        let size = self.disks[index].now.len();
        let end = from + len;
        match how {
            Zero::WriteZeroes => (from, end),
            Zero::Discard => {
                let first = from.next_multiple_of(SECTOR);
                let last = if end == size { end } else { end / SECTOR * SECTOR };
                (first.min(last), last)
            }
        }
    }

    async fn read(&mut self, index: usize) {
        let (from, len) = self.range(index);
        let disk = self.disks[index].disk();
        let found = disk.read(from as u64, len).await.unwrap();
        assert!(found == self.disks[index].now[from..from + len], "read {from}+{len}");
        let mut out = vec![0; len];
        if disk.try_read(from as u64, &mut out).unwrap() == Attempt::Done {
            assert!(out == found, "try_read {from}+{len}");
        }
    }

    async fn compare(&mut self, index: usize) {
        let found = self.disks[index].disk().all().await;
        let differs = found.iter().zip(&self.disks[index].now).position(|(a, b)| a != b);
        assert_eq!(differs, None, "disk{index}");
    }

    /// Holes are zeros, and what is no hole is found.
    fn seek(&mut self, index: usize) {
        let (from, _) = self.range(index);
        let model = &self.disks[index];
        let disk = model.disk();
        let data = disk.seek_data(from as u64).map_or(model.now.len(), |at| at as usize);
        assert!(model.now[from..data].iter().all(|byte| *byte == 0), "no hole {from}..{data}");
        let hole = disk.seek_hole(from as u64) as usize;
        assert!((from..=model.now.len()).contains(&hole));
    }

    fn promised(&mut self, index: usize, made: &Committed) {
        self.note(format!("disk{index}: commit {}", made.number));
        let model = &mut self.disks[index];
        assert_eq!(*model.image.get_or_insert(made.image_id), made.image_id);
        assert!(model.snapshots.keys().all(|number| *number < made.number), "numbers grow");
        let snapshot = Snapshot {
            bytes: model.now.clone(),
            chunks: std::mem::take(&mut model.dirty),
            touched: false,
            settled: None,
        };
        model.snapshots.insert(made.number, snapshot);
    }

    async fn commit(&mut self, index: usize) {
        let disk = self.disks[index].disk();
        let made = if disk.checkpoint_image().is_some() && self.rng.random() {
            let busy = disk.status().pending.len() == 2;
            let made = disk.try_commit().unwrap();
            assert_eq!(made.is_none(), busy || self.strategy.holds_writers());
            made
        } else {
            Some(self.stepping(disk.commit()).await.unwrap())
        };
        if let Some(made) = made {
            self.promised(index, &made);
        }
        self.look().await;
    }

    async fn commit_all(&mut self) {
        let disks: Vec<_> = self.disks.iter().map(Model::disk).collect();
        let key = format!("key{}", self.rng.random::<u32>());
        let made = self.stepping(Disk::commit_all(&disks, &key)).await.unwrap();
        for (index, made) in made.iter().enumerate() {
            self.promised(index, made);
        }
        let numbers = |made: &[Committed]| made.iter().map(|m| m.number).collect::<Vec<_>>();
        let again = self.stepping(Disk::commit_all(&disks, &key)).await.unwrap();
        assert_eq!(numbers(&again), numbers(&made));
        self.look().await;
    }

    fn flush(&mut self, index: usize) {
        self.note(format!("disk{index}: flush"));
        self.disks[index].disk().flush().unwrap();
        self.disks[index].set_flushed();
    }

    /// What a snapshot to roll back to holds.
    fn rollback_target(&mut self, index: usize) -> (u64, Vec<u8>) {
        let model = &self.disks[index];
        let stable = model.snapshots.iter().filter(|(_, s)| s.settled == Some(Settled::Stable));
        let mut stable: Vec<_> = stable.map(|(n, s)| (*n, s.bytes.clone())).collect();
        let newest = stable.last().map_or_else(|| model.attached.clone(), |(_, b)| b.clone());
        stable.push((0, newest));
        let choice = self.rng.random_range(0..stable.len());
        stable.swap_remove(choice)
    }

    async fn rollback(&mut self, index: usize) {
        self.settle(index).await;
        let (number, bytes) = self.rollback_target(index);
        self.note(format!("disk{index}: rollback {number}"));
        let disk = self.disks[index].disk();
        disk.rollback(number).await.unwrap();
        self.disks[index].replace(bytes);
    }

    async fn settle(&mut self, index: usize) {
        let disk = self.disks[index].disk();
        self.stepping(disk.settle()).await.unwrap();
        self.look().await;
    }

    /// The host's disk is full for a while.
    async fn full(&mut self, index: usize) {
        let which = [Which::Delta, Which::Map, Which::Journal, Which::Spill];
        let which = which[self.rng.random_range(0..which.len())];
        let (from, len) = self.range(index);
        self.note(format!("disk{index}: {which} full during write {from}+{len}"));
        let data = pattern(self.rng.random(), len);
        let disk = self.disks[index].disk();
        self.files.set_full(&[which]);
        let attempt = disk.try_write(from as u64, &data);
        let flushed = disk.flush();
        self.files.set_full(&[]);
        match &attempt {
            Ok(_) | Err(DiskError::NoSpace { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        self.partly(index, from, &data).await;
        match flushed {
            Ok(()) => self.disks[index].set_flushed(),
            Err(DiskError::NoSpace { .. }) => assert_eq!(which, Which::Journal),
            Err(error) => panic!("{error}"),
        }
        self.compare(index).await;
    }

    /// Some sectors of a write may have been done.
    async fn partly(&mut self, index: usize, from: usize, data: &[u8]) {
        let found = self.disks[index].disk().read(from as u64, data.len()).await.unwrap();
        let mut at = 0;
        while at < data.len() {
            let end = ((from + at) / SECTOR * SECTOR + SECTOR - from).min(data.len());
            let (new, old) = (&data[at..end], &self.disks[index].now[from + at..from + end]);
            assert!(found[at..end] == *new || found[at..end] == *old, "neither old nor new");
            at = end;
        }
        self.disks[index].change(from, &found);
    }

    async fn close(&mut self, index: usize) {
        let disk = self.disks[index].disk.take().unwrap();
        disk.crash().await;
    }

    fn open(&mut self, index: usize) {
        let deps = self.deps(self.disks[index].room);
        let disk = Disk::open(&self.disks[index].path, deps).unwrap();
        self.disks[index].disk = Some(disk);
    }

    async fn kill(&mut self, index: usize) {
        self.note(format!("disk{index}: kill -9"));
        self.close(index).await;
        self.open(index);
        self.compare(index).await;
    }

    async fn stop(&mut self, index: usize) {
        let reboot: bool = self.rng.random();
        self.note(format!("disk{index}: clean stop, reboot {reboot}"));
        self.disks[index].disk().shutdown().await.unwrap();
        self.disks[index].set_flushed();
        self.close(index).await;
        if reboot {
            // Other disks' page cache is lost only for them; here it is as good as any boot id.
            self.boot += 1;
            self.reboot_others(index).await;
        }
        self.open(index);
        self.compare(index).await;
    }

    async fn reboot_others(&mut self, but: usize) {
        for index in 0..self.disks.len() {
            if index != but {
                self.crash_host(index).await;
            }
        }
    }

    async fn host_crash(&mut self) {
        self.boot += 1;
        for index in 0..self.disks.len() {
            self.crash_host(index).await;
        }
    }

    async fn crash_host(&mut self, index: usize) {
        self.note(format!("disk{index}: host crash"));
        let to = self.directory();
        self.files.crash(Crash::Host, &self.disks[index].path, &to);
        self.close(index).await;
        self.disks[index].path = to;
        self.after_host_crash(index, None).await;
    }

    /// `or`: what it may hold instead.
    async fn after_host_crash(&mut self, index: usize, or: Option<Vec<u8>>) {
        self.open(index);
        let found = self.disks[index].disk().all().await;
        let model = &mut self.disks[index];
        model.host_crashed = true;
        if or.is_none_or(|or| or != found)
            && let Err(problem) = model.may_hold(&found)
        {
            panic!("{problem}");
        }
        model.replace(found);
        model.dirty = (0..model.now.len().div_ceil(CHUNK)).collect();
        self.look().await;
        self.disks[index].host_crashed = false;
    }

    /// A crash in the middle of an operation.
    async fn crash_during(&mut self, index: usize) {
        let crash = if self.rng.random() { Crash::Kill } else { Crash::Host };
        if crash == Crash::Host && self.disks.len() > 1 {
            return;
        }
        let calls = self.rng.random_range(0..9);
        let operation = self.rng.random_range(0..5);
        if operation == 3 {
            self.settle(index).await;
        }
        self.note(format!("disk{index}: {crash:?} at call {calls} of operation {operation}"));
        let to = self.directory();
        let from = self.disks[index].path.clone();
        let disk = self.disks[index].disk();
        self.files.arm(crash, calls, &from, &to);
        let (at, len) = self.range(index);
        let mut data = pattern(self.rng.random(), len);
        let mut or = None;
        match operation {
            0 => {
                let _ = disk.try_write(at as u64, &data).unwrap();
            }
            1 => {
                data.fill(0);
                let _ = disk.try_zero(at as u64, len as u64, Zero::WriteZeroes).unwrap();
            }
            2 => disk.flush().unwrap(),
            3 => {
                let (number, bytes) = self.rollback_target(index);
                disk.rollback(number).await.unwrap();
                or = Some(bytes);
            }
            _ => disk.shutdown().await.unwrap(),
        }
        let fired = self.files.disarm();
        if !fired {
            self.files.crash(crash, &from, &to);
        }
        drop(disk);
        self.close(index).await;
        self.disks[index].path = to;
        if operation < 2 {
            // It may be in any state: each sector old or new.
            let old = self.disks[index].now[at..at + len].to_vec();
            self.disks[index].change(at, &data);
            self.disks[index].now[at..at + len].copy_from_slice(&old);
        }
        match crash {
            Crash::Host => {
                self.boot += 1;
                self.after_host_crash(index, or).await;
            }
            Crash::Kill => {
                self.open(index);
                if operation < 2 {
                    self.partly(index, at, &data).await;
                }
                let found = self.disks[index].disk().all().await;
                match or {
                    // Where both are the same it may not have happened: nothing more is flushed.
                    Some(rolled_back) if rolled_back == found && found != self.disks[index].now => {
                        self.disks[index].replace(found);
                    }
                    _ => self.compare(index).await,
                }
                self.look().await;
            }
        }
    }

    fn plan_failure(&mut self) {
        let call = ["begin", "chunk", "persist", "publish"][self.rng.random_range(0..4)];
        let failure = match self.rng.random_range(0..3) {
            0 if call != "chunk" && call != "persist" => Failure::Transient,
            1 if call != "chunk" && call != "persist" => Failure::AnswerLost,
            _ => Failure::Permanent,
        };
        self.note(format!("plan: {call} {failure:?}"));
        self.planned += usize::from(failure == Failure::Permanent);
        self.world.fail_next(call, failure);
    }

    async fn operation(&mut self) {
        let index = self.rng.random_range(0..self.disks.len());
        match self.rng.random_range(0..100) {
            0..30 => self.write(index).await,
            30..36 => self.zero(index).await,
            36..46 => self.read(index).await,
            46..48 => self.seek(index),
            48..58 => self.commit(index).await,
            58..61 => self.commit_all().await,
            61..79 => drop(self.step().await),
            79..84 => self.flush(index),
            84..86 => self.rollback(index).await,
            86..89 => self.kill(index).await,
            89..90 => self.host_crash().await,
            90..92 => self.stop(index).await,
            92..94 => self.full(index).await,
            94..97 => self.crash_during(index).await,
            97..98 => self.world.evict(),
            _ => self.plan_failure(),
        }
    }

    /// Everything that was promised holds.
    async fn finish(&mut self) {
        self.world.forget_failures();
        for index in 0..self.disks.len() {
            self.settle(index).await;
            self.commit(index).await;
            self.settle(index).await;
            self.compare(index).await;
        }
        self.world.release();
        for index in 0..self.disks.len() {
            let image = self.disks[index].image.unwrap();
            let strays = || {
                let records = self.world.records(image);
                records.values().filter(|r| r.state == SnapshotState::Pending).count()
            };
            for _ in 0..1000 {
                if strays() == 0 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            assert_eq!(strays(), 0, "every snapshot that was begun is settled");
            for (number, record) in self.world.records(image) {
                if record.state != SnapshotState::Stable || number == 1 {
                    continue;
                }
                let model = &self.disks[index].snapshots[&number];
                assert!(self.world.bytes(image, number) == model.bytes, "snapshot {number}");
            }
            let status = self.disks[index].disk().status();
            assert_eq!((status.aside_bytes, status.spill_bytes), (0, 0));
        }
    }
}

async fn run(seed: u64, strategy: Strategy) {
    let mut run = Run::new(seed, strategy);
    for _ in 0..OPERATIONS {
        run.operation().await;
    }
    run.finish().await;
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn runs(strategy: Strategy) {
    let seeds = match number("BLOBCR_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BLOBCR_RUNS").unwrap_or(RUNS),
    };
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(run(seed, strategy));
    }
}

#[test]
fn a_disk_is_like_a_plain_one_whatever_happens() {
    runs(Strategy::Selective);
}

#[test]
fn so_is_one_with_plain_copy_on_write() {
    runs(Strategy::Cow);
}

#[test]
fn so_is_one_that_copies_first() {
    runs(Strategy::Precopy);
}

#[test]
fn so_is_one_that_persists_while_writers_wait() {
    runs(Strategy::Offline);
}
