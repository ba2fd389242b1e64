//! Syncs: how many, what they promise, and what happens when one fails.

use std::io::{self, BufRead, BufReader, IoSlice};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use blobcr_repo_node::disk::{Disk, DiskFile, Space};
use blobcr_repo_node::testing::{Fault, SimDisk};
use blobcr_repo_node::{ChunkStore, Fetched, Options, StoreError};

use crate::common::{assert_holds, chunk, key, open, options};

const POOL: u32 = 1;

/// A disk whose syncs wait while the gate is shut.
#[derive(Debug)]
struct Gated {
    disk: SimDisk,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.changed.notify_all();
    }

    fn pass(&self) {
        drop(self.changed.wait_while(self.shut.lock().unwrap(), |shut| *shut).unwrap());
    }
}

#[derive(Debug)]
struct GatedFile(Arc<dyn DiskFile>, Arc<Gate>);

impl Disk for Gated {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(GatedFile(self.disk.create(name)?, Arc::clone(&self.gate))))
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(GatedFile(self.disk.open(name)?, Arc::clone(&self.gate))))
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }
    fn unlink(&self, name: &str) -> io::Result<()> {
        self.disk.unlink(name)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn sync_dir(&self) -> io::Result<()> {
        self.disk.sync_dir()
    }
    fn space(&self) -> io::Result<Space> {
        self.disk.space()
    }
}

impl DiskFile for GatedFile {
    fn length(&self) -> io::Result<u64> {
        self.0.length()
    }
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.0.read_at(offset, len)
    }
    fn write_at(&self, offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.0.write_at(offset, pieces)
    }
    fn sync(&self) -> io::Result<()> {
        self.1.pass();
        self.0.sync()
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.truncate(len)
    }
    fn allocate(&self, len: u64) -> io::Result<()> {
        self.0.allocate(len)
    }
}

#[test]
fn many_concurrent_puts_share_one_sync() {
    const PUTS: u64 = 64;
    let (disk, gate) = (SimDisk::new(1), Arc::new(Gate::default()));
    let gated = Gated { disk: disk.clone(), gate: Arc::clone(&gate) };
    let (store, _) = ChunkStore::open_on(Arc::new(gated), options(64 << 20)).unwrap();
    store.put(POOL, 1, &[chunk(1000, 10)]).unwrap();
    gate.set(true);
    let before = disk.syncs();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| store.put(POOL, 1, &[chunk(0, 100)]));
        while store.counters().groups < 2 {
            std::thread::yield_now();
        }
        // The first waits for its sync; the others gather, some with the same records, some to
        // touch and to delete.
        let put = |n: u64| {
            let store = &store;
            scope.spawn(move || match n % 8 {
                6 => drop(store.touch(POOL, n, &[key(&chunk(1000, 10))]).unwrap()),
                7 => drop(store.delete(POOL, 0, &[key(&chunk(1000, 10))]).unwrap()),
                5 => drop(store.put(POOL, 1, &[chunk(4, 100)]).unwrap()),
                _ => drop(store.put(POOL, 1, &[chunk(n, 100)]).unwrap()),
            })
        };
        let others: Vec<_> = (1..PUTS).map(put).collect();
        while store.counters().waiting < PUTS - 1 {
            std::thread::yield_now();
        }
        assert_eq!(store.get(POOL, key(&chunk(0, 100))), Fetched::Absent, "not durable yet");
        gate.set(false);
        first.join().unwrap().unwrap();
        others.into_iter().for_each(|other| other.join().unwrap());
    });
    assert_eq!(disk.syncs() - before, 2, "one for the first, one for all others");
    for n in (0..PUTS).filter(|n| n % 8 < 5) {
        assert_holds(&store, POOL, &chunk(n, 100));
    }
}

#[test]
fn a_failed_sync_poisons_the_store_until_a_restart() {
    let disk = SimDisk::new(2);
    let (store, _) = ChunkStore::open_on(Arc::new(disk.clone()), options(64 << 20)).unwrap();
    store.put(POOL, 1, &[chunk(1, 100)]).unwrap();
    disk.fault(1, Fault::SyncFails);
    let refused = store.put(POOL, 1, &[chunk(2, 100)]);
    let Err(error @ StoreError::Poisoned { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("restart"), "{error}");
    // The sync would succeed now; nobody asks.
    let syncs = disk.syncs();
    for _ in 0..2 {
        assert!(matches!(store.put(POOL, 1, &[chunk(3, 9)]), Err(StoreError::Poisoned { .. })));
        let keys = [key(&chunk(1, 100))];
        assert!(matches!(store.delete(POOL, 9, &keys), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.touch(POOL, 9, &keys), Err(StoreError::Poisoned { .. })));
    }
    assert_holds(&store, POOL, &chunk(1, 100));
    assert!(store.status().poisoned);
    drop(store);
    assert_eq!(disk.syncs(), syncs);
    let (store, _) = ChunkStore::open_on(Arc::new(disk.kill()), options(64 << 20)).unwrap();
    assert!(!store.status().poisoned);
    assert_holds(&store, POOL, &chunk(1, 100));
    store.put(POOL, 1, &[chunk(2, 100)]).unwrap();
    assert_holds(&store, POOL, &chunk(2, 100));
}

const CHILD_DIR: &str = "BLOBCR_TEST_KILL_DIR";
const CHILD_TEST: &str = "durability::child_that_puts_until_it_is_killed";
const CHILD_THREADS: u64 = 4;

/// Not a test by itself: what `kill_dash_nine_loses_nothing_acknowledged` runs and kills.
#[test]
fn child_that_puts_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let (store, report) = open(Path::new(&dir), 1 << 20);
    let start = report.records;
    std::thread::scope(|scope| {
        for thread in 0..CHILD_THREADS {
            let store = &store;
            scope.spawn(move || {
                for n in 0.. {
                    let n = (start + n) * CHILD_THREADS + thread;
                    store.put(POOL, 1, &[chunk(n, 20_000)]).unwrap();
                    println!("acknowledged {n}.");
                    if n.is_multiple_of(3) {
                        store.delete(POOL, 2, &[key(&chunk(n, 20_000))]).unwrap();
                        println!("deleted {n}.");
                    }
                    if n.is_multiple_of(50) {
                        store.compact().unwrap();
                    }
                }
            });
        }
    });
}

#[test]
fn kill_dash_nine_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = std::collections::BTreeSet::new();
    for round in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", CHILD_TEST, "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut deleting = std::collections::BTreeSet::new();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for (seen, line) in lines.map_while(Result::ok).enumerate() {
            if seen == 60 + 40 * round {
                child.kill().unwrap();
            }
            // The last line may be cut short: only with its stop it counts.
            let number = |what: &str| {
                let (_, rest) = line.split_once(what)?;
                rest.strip_suffix('.')?.parse::<u64>().ok()
            };
            if let Some(n) = number("acknowledged ") {
                acknowledged.insert(n);
                if n.is_multiple_of(3) {
                    deleting.insert(n);
                }
            } else if let Some(n) = number("deleted ") {
                acknowledged.remove(&n);
                deleting.remove(&n);
            }
        }
        child.wait().unwrap();
        // Deletes that had begun may or may not have happened.
        acknowledged.retain(|n| !deleting.contains(n));
        assert!(acknowledged.len() > 20 * (round + 1), "{}", acknowledged.len());
        let (store, report) = open(dir.path(), 1 << 20);
        for n in &acknowledged {
            assert_holds(&store, POOL, &chunk(*n, 20_000));
        }
        for finding in &report.findings {
            println!("{finding}");
        }
        let whole = store.list(POOL, blobcr_proto::v1::RecordKind::Chunk, None, 1 << 20).0;
        for listed in whole {
            let key = (&listed.r#ref.unwrap()).try_into().unwrap();
            assert!(matches!(store.get(POOL, key), Fetched::Found(_)));
        }
    }
}

/// Fills `store`, and sees that it refuses clearly, goes on serving, and takes puts again.
fn fill(store: &ChunkStore, make_room: impl FnOnce()) {
    let mut stored = 0;
    let refused = loop {
        match store.put(POOL, 1, &[chunk(stored, 50_000)]) {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 10_000, "never full");
    };
    assert!(matches!(refused, StoreError::Full { .. }), "{refused}");
    assert!(refused.to_string().contains("full"), "{refused}");
    assert!(stored > 10, "{stored}");
    let status = store.status();
    assert!(status.full && !status.poisoned);
    let all = || (0..stored).map(|n| chunk(n, 50_000));
    all().for_each(|record| assert_holds(store, POOL, &record));
    // What is held needs no room: again, and with a newer generation, and not at all.
    store.put(POOL, 1, &[chunk(0, 50_000)]).unwrap();
    assert_eq!(store.touch(POOL, 3, &[key(&chunk(0, 50_000))]).unwrap(), [true]);
    let keys: Vec<_> = all().map(|record| key(&record)).collect();
    let deleted = store.delete(POOL, 3, &keys).unwrap();
    assert_eq!((u64::from(deleted.deleted), deleted.kept), (stored - 1, 1));
    // The collector's work makes room by itself.
    assert!(store.compact().unwrap().segments > 0);
    make_room();
    store.put(POOL, 1, &[chunk(1, 50_000), chunk(2, 50_000)]).unwrap();
    assert!(!store.status().full);
    for n in 0..3 {
        assert_holds(store, POOL, &chunk(n, 50_000));
    }
}

fn small_disk_options(reserve_bytes: Option<u64>) -> Options {
    Options { reserve_bytes, ..options(1 << 20) }
}

#[test]
fn a_full_disk_is_refused_clearly_and_the_node_goes_on() {
    // With a reserve of its own, and with one that others have used up.
    for (reserve, free) in [(None, 6 << 20), (Some(64 << 10), 6 << 20)] {
        let disk = SimDisk::new(3);
        disk.leave(free);
        let (store, _) =
            ChunkStore::open_on(Arc::new(disk.clone()), small_disk_options(reserve)).unwrap();
        fill(&store, || ());
        drop(store);
        let (store, report) =
            ChunkStore::open_on(Arc::new(disk.crash()), small_disk_options(reserve)).unwrap();
        assert!(report.findings.is_empty(), "{report:?}");
        assert_eq!(report.records, 3);
        assert_holds(&store, POOL, &chunk(2, 50_000));
    }
}

#[test]
fn deletes_work_when_others_have_filled_the_disk_to_the_last_byte() {
    let disk = SimDisk::new(4);
    disk.leave(8 << 20);
    let (store, _) = ChunkStore::open_on(Arc::new(disk.clone()), small_disk_options(None)).unwrap();
    let records: Vec<_> = (0..40).map(|n| chunk(n, 50_000)).collect();
    store.put(POOL, 1, &records).unwrap();
    disk.leave(0);
    assert!(matches!(store.put(POOL, 1, &[chunk(99, 9)]), Err(StoreError::Full { .. })));
    for record in &records[..30] {
        assert_eq!(store.delete(POOL, 2, &[key(record)]).unwrap().deleted, 1);
    }
    records[30..].iter().for_each(|record| assert_holds(&store, POOL, record));
    disk.leave(4 << 20);
    store.put(POOL, 1, &[chunk(99, 9)]).unwrap();
    drop(store);
    let after = Arc::new(disk.crash());
    let (store, report) = ChunkStore::open_on(after, small_disk_options(None)).unwrap();
    assert_eq!((report.records, report.findings.len()), (11, 0));
    assert_holds(&store, POOL, &chunk(99, 9));
}

#[test]
fn a_write_that_found_no_room_leaves_nothing_behind() {
    let disk = SimDisk::new(5);
    let (store, _) = ChunkStore::open_on(Arc::new(disk.clone()), options(64 << 20)).unwrap();
    store.put(POOL, 1, &[chunk(1, 50_000)]).unwrap();
    let used = disk.used();
    // As with a quota: there seems to be room until the write.
    disk.leave(100_000);
    disk.boast(true);
    let many: Vec<_> = (2..9).map(|n| chunk(n, 50_000)).collect();
    assert!(matches!(store.put(POOL, 1, &many), Err(StoreError::Full { .. })));
    assert_eq!(disk.used(), used);
    store.put(POOL, 1, &many[..1]).unwrap();
    assert!(disk.used() > used + 50_000);
    for n in 1..3 {
        assert_holds(&store, POOL, &chunk(n, 50_000));
    }
}

/// A small file system of its own, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(size: &std::ffi::CStr) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, size)?;
        Ok(Self(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        if let Err(error) = rustix::mount::unmount(self.0.path(), flags) {
            println!("cannot unmount {}: {error}", self.0.path().display());
        }
    }
}

#[test]
fn a_real_file_system_that_fills_up() {
    let tmpfs = match Tmpfs::mount(c"size=6m") {
        Ok(tmpfs) => tmpfs,
        Err(error) => {
            println!("mounting is not permitted here ({error}): only the simulated disk is tested");
            return;
        }
    };
    for reserve in [None, Some(0)] {
        let dir = tmpfs.0.path().join(format!("{reserve:?}"));
        let (store, _) = ChunkStore::open(&dir, small_disk_options(reserve)).unwrap();
        let other = tmpfs.0.path().join("other");
        // Somebody else has used a part, and gives it back.
        std::fs::write(&other, vec![1; 1 << 20]).unwrap();
        fill(&store, || std::fs::remove_file(&other).unwrap());
        drop(store);
        let (store, report) = ChunkStore::open(&dir, small_disk_options(reserve)).unwrap();
        assert_eq!((report.records, report.findings.len()), (3, 0));
        assert_holds(&store, POOL, &chunk(2, 50_000));
        drop(store);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
