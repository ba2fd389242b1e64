//! Reads that go to the device, many at once, while the disk is written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::fs::Advice;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Never changed.
const STILL: u64 = 32 * MIB;
/// Blocks behind that, which are written again and again.
const LIVELY: u64 = 256;
const READERS: u64 = 16;
const TIME: Duration = Duration::from_secs(4);

/// The guest's bytes on the host.
fn delta(dir: &Path) -> Result<File> {
    let mut found = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    while let Some(entry) = found.pop() {
        if entry.file_name() == "delta" {
            return File::open(entry.path()).context("open the delta");
        }
        if entry.file_type()?.is_dir() && entry.file_name() != "mnt" {
            found.extend(std::fs::read_dir(entry.path())?.collect::<Result<Vec<_>, _>>()?);
        }
    }
    anyhow::bail!("no delta below {}", dir.display())
}

/// A block of the lively part holds its version all over, of which none is less than that of the block's
/// last write that was acknowledged, in `versions`.
struct Load<'a> {
    disk: &'a File,
    still: &'a [u8],
    versions: &'a [AtomicU64],
    stop: &'a AtomicBool,
}

impl Load<'_> {
    fn read(&self, seed: u64) -> Result<u64> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut reads = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let len = rng.random_range(1..=64) * BLOCK;
            let offset = rng.random_range(0..=STILL - len);
            let mut bytes = vec![0; len as usize];
            self.disk.read_exact_at(&mut bytes, offset)?;
            ensure!(
                bytes == self.still[offset as usize..(offset + len) as usize],
                "{offset}+{len}"
            );
            let block = rng.random_range(0..LIVELY);
            let before = self.versions[block as usize].load(Ordering::SeqCst);
            let mut bytes = [0; BLOCK as usize];
            self.disk.read_exact_at(&mut bytes, STILL + block * BLOCK)?;
            // A write that is under way may be seen in part, as on any disk.
            let oldest = bytes
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
                .min();
            ensure!(
                oldest >= Some(before),
                "block {block}: {oldest:?} after {before} was acknowledged"
            );
            reads += 2;
        }
        Ok(reads)
    }

    fn write(&self) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(1);
        for version in 1_u64.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let block = rng.random_range(0..LIVELY);
            let bytes = version.to_le_bytes().repeat(BLOCK as usize / 8);
            self.disk.write_all_at(&bytes, STILL + block * BLOCK)?;
            self.versions[block as usize].store(version, Ordering::SeqCst);
        }
        Ok(())
    }
}

#[test]
fn what_comes_from_the_device_at_depth_is_what_was_written_last() -> Result<()> {
    let scratch =
        tempfile::Builder::new().prefix("cold-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let mut cluster = Cluster::start_in(scratch, &[])?;
    let size = STILL + LIVELY * BLOCK;
    let raw = sparse(&cluster.scratch().join("empty.raw"), size, &[])?;
    cluster.import(&raw, "empty")?;
    let path = cluster.attach("empty", "d")?;
    let still = noise(3, STILL as usize);
    let disk = MountedDisk::open(&path, false)?;
    disk.file().write_all_at(&still, 0)?;
    disk.file().write_all_at(&[0; (LIVELY * BLOCK) as usize], STILL)?;
    disk.file().sync_all()?;

    let delta = delta(&cluster.dir())?;
    let (versions, stop) =
        ((0..LIVELY).map(|_| AtomicU64::new(0)).collect::<Vec<_>>(), AtomicBool::new(false));
    let load = Load { disk: disk.file(), still: &still, versions: &versions, stop: &stop };
    let reads = std::thread::scope(|scope| -> Result<u64> {
        let load = &load;
        let readers: Vec<_> =
            (0..READERS).map(|seed| scope.spawn(move || load.read(seed))).collect();
        let writer = scope.spawn(|| load.write());
        let began = Instant::now();
        while began.elapsed() < TIME && !readers.iter().any(|reader| reader.is_finished()) {
            // The lively part is dirty most of the time, and stays; the rest goes.
            disk.file().sync_all()?;
            rustix::fs::fadvise(&delta, 0, None, Advice::DontNeed)?;
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the writer does not panic")?;
        let mut reads = 0;
        for reader in readers {
            reads += reader.join().expect("no reader panics")?;
        }
        Ok(reads)
    })
    .with_context(|| cluster.log())?;
    ensure!(reads > 1000, "only {reads} reads");
    drop(disk);
    cluster.stop(rustix::process::Signal::TERM)
}
