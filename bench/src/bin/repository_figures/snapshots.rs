//! A disk with 10,000 snapshots beside one with 10: attach, read, COMMIT and diff.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use blobcr_bench::spread::Spread;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;

use crate::{MIB, Options};

const SIZE: u64 = 64 * MIB;
const SAMPLES: u64 = 31;
/// What each COMMIT has dirty.
const DIRTY: usize = 4096;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let many = options.scaled(10_000).max(20);
    let cluster = Cluster::start_in(options.scratch()?, &[])?;
    let raw = sparse(&cluster.scratch().join("raw"), SIZE, &[(0, &noise(1, SIZE as usize))])?;
    cluster.import(&raw, "base")?;
    // As many writes on both, so that their chunks are as new and as many.
    let few = Disk::with(&cluster, "few", 10, many / 10)?;
    let many_of_them = Disk::with(&cluster, "many", many, 1)?;
    println!("\nMedians of {SAMPLES} (attach and diff with the start of a command), in ms");
    println!("{:<8} {:>10} {:>10} {:>8}", "", "10", many, "ratio");
    type Once<'c> = fn(&Disk<'c>, u64) -> anyhow::Result<f64>;
    let measured: [(&str, Once<'_>); 4] = [
        ("attach", Disk::attach),
        ("read", Disk::read),
        ("commit", Disk::commit),
        ("diff", Disk::diff),
    ];
    for (what, once) in measured {
        // In turns, so that whatever else the machine does meets both.
        let (mut few_ms, mut many_ms) = (Vec::new(), Vec::new());
        for at in 0..SAMPLES {
            if at % 2 == 0 {
                few_ms.push(once(&few, at)? * 1e3);
                many_ms.push(once(&many_of_them, at)? * 1e3);
            } else {
                many_ms.push(once(&many_of_them, at)? * 1e3);
                few_ms.push(once(&few, at)? * 1e3);
            }
        }
        let median = |ms| Spread::of(ms).map_or(f64::NAN, |spread: Spread| spread.median);
        let (few, many) = (median(few_ms), median(many_ms));
        println!("{what:<8} {few:>10.3} {many:>10.3} {:>8.2}", many / few);
    }
    Ok(())
}

/// A disk whose checkpoint image has many snapshots.
struct Disk<'c> {
    cluster: &'c Cluster,
    name: &'static str,
    mounted: MountedDisk,
    image: String,
    snapshots: u64,
    written: u64,
    /// Another disk, from the last of them, of which nothing was read yet.
    fork: MountedDisk,
}

impl<'c> Disk<'c> {
    fn with(
        cluster: &'c Cluster,
        name: &'static str,
        snapshots: u64,
        writes_each: u64,
    ) -> anyhow::Result<Self> {
        let mounted = MountedDisk::open(&cluster.attach("base", name)?, false)?;
        let mut image = String::new();
        for snapshot in 0..snapshots {
            for write in 0..writes_each {
                write_once(&mounted, snapshots, snapshot * writes_each + write)?;
            }
            image = mounted.commit_stable()?.image;
        }
        let fork = cluster.attach(&format!("{image}@{snapshots}"), &format!("{name}-read"))?;
        let fork = MountedDisk::open(&fork, false)?;
        let written = snapshots * writes_each;
        Ok(Self { cluster, name, mounted, image, snapshots, written, fork })
    }

    fn attach(&self, at: u64) -> anyhow::Result<f64> {
        let Self { cluster, image, snapshots, .. } = self;
        let name = format!("{}-{at}", self.name);
        let begun = Instant::now();
        cluster.attach(&format!("{image}@{snapshots}"), &name)?;
        let took = begun.elapsed();
        cluster.json(&["disk", "detach", &name])?;
        Ok(took.as_secs_f64())
    }

    fn read(&self, at: u64) -> anyhow::Result<f64> {
        let mut block = vec![0; DIRTY];
        let begun = Instant::now();
        self.fork.file().read_exact_at(&mut block, at * (SIZE / SAMPLES) / 4096 * 4096)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn commit(&self, at: u64) -> anyhow::Result<f64> {
        write_once(&self.mounted, self.snapshots, self.written + at)?;
        let begun = Instant::now();
        self.mounted.commit_stable()?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn diff(&self, _at: u64) -> anyhow::Result<f64> {
        let Self { cluster, image, snapshots, .. } = self;
        let (old, new) = (format!("{image}@{}", snapshots - 5), format!("{image}@{snapshots}"));
        let begun = Instant::now();
        cluster.json(&["snapshot", "diff", &old, &new])?;
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// Another content at another place each time, and on each disk.
fn write_once(disk: &MountedDisk, salt: u64, number: u64) -> anyhow::Result<()> {
    let place = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (SIZE / DIRTY as u64);
    disk.file().write_all_at(&noise(salt << 32 | number, DIRTY), place * DIRTY as u64)?;
    Ok(())
}
