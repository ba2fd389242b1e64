//! Downtime of COMMIT, by how much is dirty: the ioctl, and the call that a guest makes through
//! its VM's channel; beside them an external snapshot of a qcow2 file by `qemu-storage-daemon`,
//! on the same file system and with the same writes before it.
//!
//! `cargo build --release -p blobcr-cli -p blobcr-bench && target/release/checkpoint_downtime`

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use blobcr_bench::latency::{Latencies, Summary};
use blobcr_bench::qcow2::Qcow2;
use blobcr_bench::vm_channel::VmChannel;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::mounted::MountedDisk;
use clap::Parser;
use rand::RngCore;
use serde::Serialize;

const MIB: u64 = 1 << 20;
const WRITE_BYTES: usize = 1 << 20;

/// Downtime of COMMIT, by how much is dirty.
#[derive(Parser)]
struct Options {
    /// Directory on the file system to measure.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Dirty MiB before each COMMIT.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1024, 4096])]
    dirty: Vec<u64>,
    /// COMMITs of each kind for each size; at least 100 for a p99 that means something.
    #[arg(long, default_value_t = 100)]
    samples: u64,
    /// qcow2 snapshots for each size (0: leave them out). Each adds a file to a chain.
    #[arg(long, default_value_t = 20)]
    qcow2_samples: u64,
    /// Print JSON on stdout instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    dirty_mib: u64,
    ioctl: Summary,
    channel: Summary,
    qcow2_external: Option<Summary>,
}

/// Two contents of a disk, written by turns: every write changes every byte, and yet what has to
/// be stored stays bounded, because the repository keeps equal chunks once.
struct Contents {
    random: Vec<u8>,
    round: usize,
}

impl Contents {
    fn new() -> Self {
        let mut random = vec![0; 2 * WRITE_BYTES];
        rand::rng().fill_bytes(&mut random);
        Self { random, round: 0 }
    }

    /// Writes `mib` MiB of the next content, and calls `write` for each MiB of it.
    fn dirty(
        &mut self,
        mib: u64,
        mut write: impl FnMut(u64, &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.round ^= 1;
        for index in 0..mib {
            // A shift by the index makes every MiB another one.
            let start = self.round * (WRITE_BYTES / 2) + (index as usize * 64) % (WRITE_BYTES / 2);
            write(index * MIB, &self.random[start..start + WRITE_BYTES])?;
        }
        Ok(())
    }
}

fn measure(cluster: &Cluster, options: &Options, mib: u64) -> anyhow::Result<Row> {
    let name = format!("dirty-{mib}");
    let raw = cluster.scratch().join(&name);
    File::create(&raw)?.set_len((mib + 1) * MIB)?;
    cluster.import(&raw, &name)?;
    let path = cluster.attach(&name, &name)?;
    let disk = MountedDisk::open(&path, false)?;
    let mut channel = VmChannel::add(cluster, &format!("vm-{mib}"), &name)?;
    let mut contents = Contents::new();
    // The first CHECKPOINT also makes the checkpoint image: that is not what is measured here.
    disk.commit_stable()?;
    let (mut ioctl, mut call) = (Latencies::new()?, Latencies::new()?);
    for _ in 0..options.samples {
        contents.dirty(mib, |offset, data| Ok(disk.file().write_all_at(data, offset)?))?;
        let began = Instant::now();
        disk.commit()?;
        ioctl.record(began.elapsed());
        disk.commit_stable()?;
        contents.dirty(mib, |offset, data| Ok(disk.file().write_all_at(data, offset)?))?;
        call.record(channel.checkpoint()?);
        disk.commit_stable()?;
    }
    drop(disk);
    let qcow2_external = match options.qcow2_samples {
        0 => None,
        samples => Some(measure_qcow2(cluster, samples, mib)?),
    };
    Ok(Row { dirty_mib: mib, ioctl: ioctl.summary(), channel: call.summary(), qcow2_external })
}

fn measure_qcow2(cluster: &Cluster, samples: u64, mib: u64) -> anyhow::Result<Summary> {
    let mut qcow2 = Qcow2::start(cluster.scratch(), (mib + 1) * MIB)?;
    let mut contents = Contents::new();
    let mut latencies = Latencies::new()?;
    for _ in 0..samples {
        contents.dirty(mib, |offset, data| qcow2.write(offset, data))?;
        latencies.record(qcow2.snapshot()?);
    }
    Ok(latencies.summary())
}

#[expect(clippy::print_stdout, reason = "printing is what a benchmark is for")]
fn print_table(rows: &[Row]) {
    println!("downtime of a checkpoint, microseconds, by how much was dirty");
    println!(
        "{:>10} {:>22} {:>22} {:>22} {:>12}",
        "dirty MiB",
        "ioctl p50 / p99",
        "guest call p50 / p99",
        "qcow2 ext. p50 / p99",
        "qcow2/ours"
    );
    let cell = |summary: &Summary| format!("{:.0} / {:.0}", summary.p50_us, summary.p99_us);
    for row in rows {
        let (qcow2, ratio) = match &row.qcow2_external {
            Some(qcow2) => (cell(qcow2), format!("{:.1}x", qcow2.p50_us / row.ioctl.p50_us)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let (ioctl, channel) = (cell(&row.ioctl), cell(&row.channel));
        println!("{:>10} {ioctl:>22} {channel:>22} {qcow2:>22} {ratio:>12}", row.dirty_mib);
    }
    let p99 = rows.iter().map(|row| row.ioctl.p99_us);
    let (least, most) = p99.fold((f64::MAX, 0f64), |(a, b), x| (a.min(x), b.max(x)));
    println!("largest p99 of the ioctl against the smallest: {:.2}x", most / least);
}

#[expect(clippy::print_stdout, reason = "printing is what a benchmark is for")]
fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let scratch = tempfile::Builder::new()
        .prefix("blobcr-bench-")
        .tempdir_in(std::path::absolute(&options.dir)?)?;
    let cluster = Cluster::start_in(scratch, &[])?;
    let mut rows = Vec::new();
    for &mib in &options.dirty {
        rows.push(measure(&cluster, &options, mib)?);
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print_table(&rows);
    }
    Ok(())
}
