//! Much at once: random operations against a model, and fio's own verification.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};

use crate::support::{CHUNK, Mirror, World, pattern};

const SIZE: u64 = 16 * CHUNK + 2048;
const STEPS: usize = 400;
/// As many as a run of the tests has time for; any seed can be given by `BLOBCR_TEST_SEED`.
const SEEDS: u64 = 6;

/// One disk, opened in two ways, and what it should hold.
struct Differ<'a> {
    world: &'a World,
    mirror: Option<Mirror<'a>>,
    path: PathBuf,
    files: Vec<File>,
    model: Vec<u8>,
    /// What every snapshot should hold.
    snapshots: Vec<(String, u64, Vec<u8>)>,
    random: StdRng,
}

fn open(path: &Path, direct: bool) -> File {
    let flags = if direct { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

impl<'a> Differ<'a> {
    fn new(world: &'a World, seed: u64) -> Self {
        let model = pattern(SIZE);
        world.image("vm", model.clone());
        let mirror = world.start();
        let path = mirror.attach("vm", "d");
        let files = vec![open(&path, false), open(&path, true)];
        let random = StdRng::seed_from_u64(seed);
        Self { world, mirror: Some(mirror), path, files, model, snapshots: Vec::new(), random }
    }

    fn mirror(&self) -> &Mirror<'a> {
        self.mirror.as_ref().unwrap()
    }

    fn file(&mut self) -> File {
        let at = self.random.random_range(0..self.files.len());
        self.files[at].try_clone().unwrap()
    }

    /// A range that likes borders of sectors and chunks.
    fn range(&mut self) -> (u64, usize) {
        let unit = *[1, 512, 4096, CHUNK].get(self.random.random_range(0..4)).unwrap();
        let mut offset = self.random.random_range(0..SIZE) / unit * unit;
        if self.random.random_ratio(1, 4) {
            offset = (offset + self.random.random_range(0..3)).saturating_sub(1).min(SIZE - 1);
        }
        let max = [10, 4096, 3 * CHUNK][self.random.random_range(0..3)];
        let len = self.random.random_range(1..=max).min(SIZE - offset);
        (offset, len as usize)
    }

    fn step(&mut self) {
        let (offset, len) = self.range();
        let range = offset as usize..offset as usize + len;
        let file = self.file();
        match self.random.random_range(0..100) {
            0..40 => {
                let mut data = vec![0; len];
                self.random.fill(&mut data[..]);
                file.write_all_at(&data, offset).unwrap();
                self.model[range].copy_from_slice(&data);
            }
            40..70 => {
                let mut data = vec![0; len];
                file.read_exact_at(&mut data, offset).unwrap();
                assert!(data == self.model[range], "read of {len} at {offset}");
            }
            70..80 => {
                fallocate(&file, FallocateFlags::ZERO_RANGE, offset, len as u64).unwrap();
                self.model[range].fill(0);
            }
            80..87 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, flags, offset, len as u64).unwrap();
                self.model[range].fill(0);
            }
            87..90 => file.sync_data().unwrap(),
            90..93 => self.check_holes(&file, offset),
            93..99 => {
                let made = self.mirror().checkpoint("d");
                self.snapshots.push((made.image, made.number, self.model.clone()));
            }
            _ => {
                drop(file);
                self.restart();
            }
        }
    }

    /// What is said to be a hole holds zeros.
    fn check_holes(&self, file: &File, offset: u64) {
        let data = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => SIZE,
            Err(error) => panic!("{error}"),
        };
        assert!(self.model[offset as usize..data as usize].iter().all(|byte| *byte == 0));
        let hole = rustix::fs::seek(file, SeekFrom::Hole(offset)).unwrap();
        assert!((offset..=SIZE).contains(&hole));
    }

    fn restart(&mut self) {
        self.files.clear();
        self.mirror.take().unwrap().stop();
        self.mirror = Some(self.world.start());
        self.files = vec![open(&self.path, false), open(&self.path, true)];
    }

    fn check_all(&self) {
        assert!(fs::read(&self.path).unwrap() == self.model, "the disk");
        for (image, number, model) in &self.snapshots {
            self.world.wait_stable(image, *number);
            let path = self.mirror().path(format!("images/{image}/{number}.raw"));
            assert!(fs::read(path).unwrap() == *model, "snapshot {image}@{number}");
        }
    }
}

#[test]
fn random_operations_do_what_they_would_do_to_plain_bytes() {
    let given = std::env::var("BLOBCR_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = given.map_or(0..SEEDS, |seed: u64| seed..seed + 1);
    for seed in seeds {
        println!("BLOBCR_TEST_SEED={seed}");
        let world = World::new();
        let mut differ = Differ::new(&world, seed);
        for step in 0..STEPS {
            differ.step();
            if step % 50 == 49 {
                assert!(fs::read(&differ.path).unwrap() == differ.model, "after step {step}");
            }
        }
        differ.check_all();
    }
}

/// Runs fio on the disk, with COMMITs all the while, and lets fio verify every block.
fn fio(engine: &str, blocks: &str, more: &[&str]) {
    let world = World::new();
    world.image("vm", pattern(64 << 20));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    mirror.wait_stable(&mirror.checkpoint("d"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let commits = scope.spawn(|| {
            let mut made = Vec::new();
            while !done.load(Ordering::Relaxed) {
                made.push(mirror.checkpoint("d"));
                std::thread::sleep(Duration::from_millis(20));
            }
            made
        });
        let ran = Command::new("fio")
            .args(["--name=verify", "--rw=randwrite"])
            .args([format!("--bsrange={blocks}-128k"), format!("--blockalign={blocks}")])
            .args(["--size=48m", "--offset=4m", "--verify=crc32c", "--verify_fatal=1"])
            .args([
                "--do_verify=1",
                "--verify_backlog=64",
                "--verify_state_save=0",
                "--fallocate=none",
            ])
            .args(["--randrepeat=0", "--fsync=64", "--output-format=terse"])
            .arg(format!("--ioengine={engine}"))
            .arg(format!("--filename={}", path.display()))
            .args(more)
            .output();
        done.store(true, Ordering::Relaxed);
        let ran = ran.expect("fio must be installed: apt-get install fio");
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "fio {engine}: {said}");
        let made = commits.join().unwrap();
        assert!(made.len() > 1, "there were COMMITs while it ran");
        let last = made.last().unwrap();
        mirror.wait_stable(last);
    });
    // The last COMMIT of all holds what the disk holds.
    let last = mirror.checkpoint("d");
    mirror.wait_stable(&last);
    let snapshot = mirror.path(format!("images/{}/{}.raw", last.image, last.number));
    assert!(fs::read(snapshot).unwrap() == fs::read(&path).unwrap());
}

#[test]
fn fio_verifies_with_io_uring() {
    fio("io_uring", "512", &["--direct=1", "--iodepth=16"]);
}

#[test]
fn fio_verifies_with_libaio() {
    fio("libaio", "512", &["--direct=1", "--iodepth=16"]);
}

#[test]
fn fio_verifies_with_plain_calls() {
    fio("psync", "512", &[]);
}

#[test]
fn fio_verifies_through_a_map() {
    fio("mmap", "4k", &[]);
}
