//! Fetching ahead beside everything else that a disk does: the bytes are those of a disk that does not.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blobcr_mirror_fuse::HostOptions;
use blobcr_proto::v1;
use blobcr_repository::StoreError;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{CHUNK, Mirror, World, eventually, pattern};

const CHUNKS: u64 = 150;
const SIZE: u64 = CHUNKS * CHUNK;
const STEPS: u64 = 300;
/// From what holds nearly nothing to what holds all.
const CACHES: [u64; 4] = [4 * CHUNK, 24 * CHUNK, 100 * CHUNK, 1000 * CHUNK];

/// Another host in the same place.
fn options(world: &World, name: &str, cache_bytes: u64) -> HostOptions {
    let mount = world.dir.path().join(format!("mnt-{name}"));
    std::fs::create_dir(&mount).unwrap();
    HostOptions {
        dir: world.dir.path().join(format!("mirror-{name}")),
        mount,
        cache_bytes,
        ..world.options()
    }
}

fn open(mirror: &Mirror<'_>) -> File {
    OpenOptions::new().read(true).write(true).open(mirror.path("disks/d.raw")).unwrap()
}

fn detach(mirror: &Mirror<'_>) {
    mirror.block_on(mirror.host().detach("d", true)).unwrap();
}

fn disk(mirror: &Mirror<'_>) -> v1::Disk {
    mirror.host().get("d").unwrap()
}

/// One host reads here and there, and leaves the trace of it.
fn record(world: &World, chunks: &[u64]) {
    let mirror = world.try_start(options(world, "first", 256 << 20)).unwrap();
    mirror.attach("vm", "d");
    let file = open(&mirror);
    for chunk in chunks {
        file.read_exact_at(&mut [0; 512], chunk * CHUNK).unwrap();
    }
    drop(file);
    detach(&mirror);
    eventually("the trace is kept", || trace(world) > 0);
    mirror.stop();
}

fn trace(world: &World) -> u64 {
    let image = Some(v1::ImageRef { name: "vm".into(), id: 0 });
    let found = world.repository.catalog().get_read_trace(v1::SnapshotRef { image, number: 1 });
    world.block_on(found).map_or(0, |found| found.trace.unwrap().count())
}

/// Random reads and writes of a disk against a model.
fn churn(mirror: &Mirror<'_>, original: &[u8], random: &mut StdRng) {
    mirror.attach("vm", "d");
    let (mut model, file) = (original.to_vec(), open(mirror));
    for step in 0..random.random_range(1..STEPS) {
        let offset = random.random_range(0..SIZE - 1);
        let most = [100, 4096, 3 * CHUNK][random.random_range(0..3)];
        let len = random.random_range(1..=most).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        if random.random_ratio(1, 3) {
            model[range.clone()].fill(step as u8);
            file.write_all_at(&model[range], offset).unwrap();
        } else {
            let mut found = vec![0; range.len()];
            file.read_exact_at(&mut found, offset).unwrap();
            assert!(found == model[range], "{offset}+{len} at step {step}");
        }
        if random.random_ratio(1, 100) {
            mirror.wait_stable(&mirror.checkpoint("d"));
        }
    }
    drop(file);
    if random.random() && disk(mirror).checkpoint_image.is_empty() {
        mirror.block_on(mirror.host().rollback("d", 0)).unwrap();
        let mut whole = vec![0; SIZE as usize];
        open(mirror).read_exact_at(&mut whole, 0).unwrap();
        assert!(whole == original, "after the rollback");
    }
    // Often in the middle of fetching ahead.
    detach(mirror);
}

#[test]
fn bytes_are_the_same_whatever_is_fetched_ahead() {
    let world = World::new();
    let original = pattern(SIZE);
    world.image("vm", original.clone());
    record(&world, &(0..CHUNKS).map(|n| n * 37 % CHUNKS).collect::<Vec<_>>());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(30));
                world.pool.faults().down(StoreError::Unavailable("no node answers".into()));
                std::thread::sleep(Duration::from_millis(5));
                world.pool.faults().up();
            }
        });
        // Also when an assertion fails.
        let _ends = Ends(&over);
        for (seed, cache_bytes) in (0..).zip(CACHES) {
            let options = options(&world, &seed.to_string(), cache_bytes);
            let mirror = world.try_start(options).unwrap();
            let mut random = StdRng::seed_from_u64(seed);
            for _ in 0..4 {
                churn(&mirror, &original, &mut random);
            }
            mirror.stop();
        }
    });
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_disk_that_reads_as_the_one_before_it_waits_for_its_first_chunk_only() {
    let world = World::new();
    world.image("vm", pattern(SIZE));
    // None of them a hole.
    let chunks: Vec<u64> = (0..CHUNKS / 3).map(|n| n * 3).collect();
    record(&world, &chunks);
    let mirror = world.try_start(options(&world, "second", 256 << 20)).unwrap();
    mirror.attach("vm", "d");
    let file = open(&mirror);
    let read = |chunk: &u64| file.read_exact_at(&mut [0; 512], chunk * CHUNK).unwrap();
    read(&chunks[0]);
    let ahead = (chunks.len() as u64 - 1) * CHUNK;
    eventually("the rest is fetched", || disk(&mirror).prefetched_bytes == ahead);
    assert_eq!(disk(&mirror).prefetched_used_bytes, 0);
    chunks.iter().for_each(read);
    let found = disk(&mirror);
    assert_eq!((found.waited_bytes, found.prefetched_used_bytes), (CHUNK, ahead));
    // What nobody read before is waited for.
    read(&1);
    assert_eq!(disk(&mirror).waited_bytes, 2 * CHUNK);
    drop(file);
    mirror.stop();
}
