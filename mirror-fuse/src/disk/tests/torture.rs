//! Many threads at once, against what must hold whatever they do.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::*;
use super::crash_files::{Crash, CrashFiles};
use super::support::*;

const SECTOR: usize = 4096;
const WRITERS: u64 = 4;
/// Sectors that a writer writes in turn.
const SLOTS: u64 = 24;
/// Few, so that writers meet in chunks.
const CHUNKS: u64 = 8;
const SIZE: u64 = CHUNKS * CHUNK as u64;

/// Where a writer's slot is: on which of two disks, and at which byte.
fn place(writer: u64, slot: u64) -> (usize, u64) {
    let nth = writer * SLOTS + slot;
    let sector = nth / CHUNKS;
    ((nth % 2) as usize, (nth % CHUNKS) * CHUNK as u64 + sector * SECTOR as u64)
}

fn sector_of(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(SECTOR / 8)
}

/// The number that a slot holds, and whether all of it is that one's.
fn number_in(bytes: &[u8], at: u64) -> (u64, bool) {
    let sector = &bytes[at as usize..][..SECTOR];
    let number = u64::from_le_bytes(sector[..8].try_into().unwrap());
    (number, sector == sector_of(number))
}

/// Writes 1, 2, 3, … to the slots in turn, one after the other; `acked` is the last that is done.
fn writer(disks: &[Arc<Disk>], writer: u64, acked: &AtomicU64, stop: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for number in 1.. {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let (disk, at) = place(writer, number % SLOTS);
        let data = sector_of(number);
        if disks[disk].try_write(at, &data).unwrap() != Attempt::Done {
            runtime.block_on(disks[disk].write(at, data.into())).unwrap();
        }
        acked.store(number, Ordering::Release);
    }
}

/// What a cut holds of one writer must be a prefix of what it wrote. Returns its length.
fn prefix(snapshots: &[Vec<u8>], writer: u64) -> u64 {
    let mut slots = Vec::new();
    for slot in 0..SLOTS {
        let (disk, at) = place(writer, slot);
        let (number, whole) = number_in(&snapshots[disk], at);
        assert!(whole, "writer {writer}, slot {slot}: a torn sector");
        assert!(number == 0 || number % SLOTS == slot, "another slot's sector");
        slots.push(number);
    }
    let last = slots.iter().copied().max().unwrap();
    for (slot, number) in (0..).zip(slots) {
        // The last number up to `last` that goes to this slot.
        let expected = (last + SLOTS - slot) / SLOTS * SLOTS + slot;
        let expected = expected.saturating_sub(SLOTS);
        let expected = if expected % SLOTS == slot { expected } else { 0 };
        assert_eq!(number, expected, "writer {writer}, slot {slot}: {last} is in, this one not");
    }
    last
}

#[test]
fn snapshots_of_two_disks_are_one_consistent_cut_while_writers_go_on() {
    for (seed, room) in [(1, (100, 100)), (2, (2, 2)), (3, (0, 3)), (4, (1, 0))] {
        cuts(seed, room, Strategy::Selective);
    }
}

#[test]
fn so_are_they_whatever_the_strategy() {
    for strategy in [Strategy::Cow, Strategy::Precopy, Strategy::Offline] {
        cuts(5, (2, 3), strategy);
    }
}

fn cuts(seed: u64, room: (u64, u64), strategy: Strategy) {
    let dir = tempfile::tempdir().unwrap();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let world = World::new();
    world.set_jitter(Duration::from_micros(300));
    let disks: Vec<_> = (0..2)
        .map(|index| {
            let source = world.image(&format!("base{index}"), &vec![0; SIZE as usize]);
            let spec = spec_of(&format!("disk{index}"), source, SIZE);
            let path = dir.path().join(format!("disk{index}"));
            let deps = DiskDeps { strategy, ..deps(&world, room, "boot") };
            Disk::create(&path, spec, deps).unwrap()
        })
        .collect();
    let acked: Vec<_> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut rng = StdRng::seed_from_u64(seed);
    thread::scope(|scope| {
        for id in 0..WRITERS {
            let (disks, acked, stop) = (&disks, &acked[id as usize], &stop);
            scope.spawn(move || writer(disks, id, acked, stop));
        }
        let _stops = Stops(&stop);
        for _ in 0..60 {
            thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
            let before: Vec<_> = acked.iter().map(|n| n.load(Ordering::Acquire)).collect();
            let made = runtime.block_on(Disk::commit_all(&disks, "")).unwrap();
            let after: Vec<_> = acked.iter().map(|n| n.load(Ordering::Acquire)).collect();
            let mut snapshots = Vec::new();
            for (disk, made) in disks.iter().zip(&made) {
                let settled = runtime.block_on(disk.wait_stable(made.number)).unwrap();
                assert_eq!(settled, Settled::Stable);
                snapshots.push(world.bytes(made.image_id, made.number));
            }
            for id in 0..WRITERS {
                let last = prefix(&snapshots, id);
                let (before, after) = (before[id as usize], after[id as usize]);
                // One more may be done and not said yet.
                assert!((before..=after + 1).contains(&last), "{before} {last} {after}");
            }
        }
    });
    let all: Vec<_> = disks.iter().map(|disk| runtime.block_on(disk.all())).collect();
    for id in 0..WRITERS {
        assert_eq!(prefix(&all, id), acked[id as usize].load(Ordering::Acquire));
    }
}

/// Ends the writers, also when the test fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// What the disk holds before anything is written: no zeros, as a hole has them.
const BASE: u64 = 1 << 40;

/// Several threads write and flush; whatever a flush covered is there after a crash of the host at
/// any moment, and what is not there is what was there before.
#[test]
fn what_was_flushed_survives_the_host_whoever_else_writes() {
    let dir = tempfile::tempdir().unwrap();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let world = World::new();
    let files = CrashFiles::new(5);
    let source = world.image("base", &BASE.to_le_bytes().repeat(SIZE as usize / 8));
    let deps = |boot: &str| DiskDeps {
        io: Arc::clone(&files) as Arc<dyn FileIo>,
        ..deps(&world, (10, 10), boot)
    };
    let mut rng = StdRng::seed_from_u64(6);
    for round in 0..8u64 {
        let path = dir.path().join(format!("disk{round}"));
        let spec = spec_of(&format!("disk{round}"), source.clone(), SIZE);
        let disk = Disk::create(&path, spec, deps("before")).unwrap();
        runtime.block_on(disk.all());
        let flushed: Vec<Vec<AtomicU64>> =
            (0..WRITERS).map(|_| (0..SLOTS).map(|_| AtomicU64::new(0)).collect()).collect();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for (id, flushed) in flushed.iter().enumerate() {
                let (disk, stop) = (&disk, &stop);
                scope.spawn(move || {
                    for number in 1.. {
                        if stop.load(Ordering::Acquire) {
                            return;
                        }
                        let slot = number % SLOTS;
                        let (_, at) = place(id as u64, slot);
                        assert_eq!(disk.try_write(at, &sector_of(number)).unwrap(), Attempt::Done);
                        disk.flush().unwrap();
                        flushed[slot as usize].store(number, Ordering::Release);
                    }
                });
            }
            let _stops = Stops(&stop);
            for crash in 0..6 {
                thread::sleep(Duration::from_micros(
                    rng.random_range(0..3000 * (1 + crash * crash)),
                ));
                let promised: Vec<Vec<u64>> = flushed
                    .iter()
                    .map(|slots| slots.iter().map(|n| n.load(Ordering::Acquire)).collect())
                    .collect();
                let left = dir.path().join(format!("left{round}-{crash}"));
                files.crash(Crash::Host, &path, &left);
                let disk = Disk::open(&left, deps("after")).unwrap();
                let all = runtime.block_on(disk.all());
                for (id, slots) in promised.iter().enumerate() {
                    for (slot, promised) in slots.iter().enumerate() {
                        let (_, at) = place(id as u64, slot as u64);
                        let words = all[at as usize..][..SECTOR].chunks_exact(8);
                        let words = words.map(|word| u64::from_le_bytes(word.try_into().unwrap()));
                        let least = words.min().unwrap();
                        if *promised == 0 && least == BASE {
                            continue;
                        }
                        assert!(least > 0 && least < BASE, "neither old nor new: {least}");
                        assert!(
                            least >= *promised,
                            "round {round}, crash {crash}, writer {id}, slot {slot}: {least} \
                             instead of {promised}"
                        );
                    }
                }
            }
        });
    }
}
