//! A disk with 10,000 snapshots beside one with 10: attach, read, COMMIT and diff.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;

use crate::{MIB, Options};

const SIZE: u64 = 64 * MIB;
const SAMPLES: u64 = 15;
/// What each COMMIT has dirty.
const DIRTY: usize = 4096;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let many = options.scaled(10_000).max(20);
    let cluster = Cluster::start_in(options.scratch()?, &[])?;
    let raw = sparse(&cluster.scratch().join("raw"), SIZE, &[(0, &noise(1, SIZE as usize))])?;
    cluster.import(&raw, "base")?;
    let few = Measured::of(&cluster, "few", 10)?;
    let many_measured = Measured::of(&cluster, "many", many)?;
    println!("\nMedians of {SAMPLES} (attach and diff with the start of a command), in ms");
    println!("{:<8} {:>10} {:>10} {:>8}", "", "10", many, "ratio");
    for ((what, few), (_, many)) in few.0.iter().zip(&many_measured.0) {
        println!("{what:<8} {few:>10.3} {many:>10.3} {:>8.2}", many / few);
    }
    Ok(())
}

struct Measured([(&'static str, f64); 4]);

impl Measured {
    fn of(cluster: &Cluster, disk: &str, snapshots: u64) -> anyhow::Result<Self> {
        let path = cluster.attach("base", disk)?;
        let mut image = String::new();
        {
            let mounted = MountedDisk::open(&path, false)?;
            for number in 0..snapshots {
                write(&mounted, number)?;
                image = mounted.commit_stable()?.image;
            }
        }
        let commits = median(|at| {
            let mounted = MountedDisk::open(&path, false)?;
            write(&mounted, snapshots + at)?;
            let begun = Instant::now();
            mounted.commit_stable()?;
            Ok(begun.elapsed().as_secs_f64())
        })?;
        let attach = median(|at| {
            let begun = Instant::now();
            let name = format!("{disk}-{at}");
            let attached = cluster.attach(&format!("{image}@{snapshots}"), &name)?;
            let took = begun.elapsed().as_secs_f64();
            drop(attached);
            cluster.json(&["disk", "detach", &name])?;
            Ok(took)
        })?;
        let fork = cluster.attach(&format!("{image}@{snapshots}"), &format!("{disk}-read"))?;
        let mounted = MountedDisk::open(&fork, false)?;
        let mut block = vec![0; DIRTY];
        let read = median(|at| {
            let begun = Instant::now();
            mounted.file().read_exact_at(&mut block, at * (SIZE / SAMPLES) / 4096 * 4096)?;
            Ok(begun.elapsed().as_secs_f64())
        })?;
        let diff = median(|_| {
            let begun = Instant::now();
            let (old, new) = (format!("{image}@{}", snapshots - 5), format!("{image}@{snapshots}"));
            cluster.json(&["snapshot", "diff", &old, &new])?;
            Ok(begun.elapsed().as_secs_f64())
        })?;
        let ms = |seconds: f64| seconds * 1e3;
        let rows = [("attach", attach), ("read", read), ("commit", commits), ("diff", diff)];
        Ok(Self(rows.map(|(what, seconds)| (what, ms(seconds)))))
    }
}

/// Another content at another place each time.
fn write(disk: &MountedDisk, number: u64) -> anyhow::Result<()> {
    let place = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (SIZE / DIRTY as u64);
    disk.file().write_all_at(&noise(number + 2, DIRTY), place * DIRTY as u64)?;
    Ok(())
}

fn median(mut once: impl FnMut(u64) -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let mut times = (0..SAMPLES).map(&mut once).collect::<anyhow::Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
