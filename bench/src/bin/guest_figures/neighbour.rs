//! What a user of one disk loses while a guest with another disk of the same mirror calls CHECKPOINT in a
//! loop. The user is fio on the host, and then a guest; what it gets is compared with what it gets when
//! nothing else runs, and when the other guest does the same without a CHECKPOINT.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blobcr_bench::spread::Spread;
use blobcr_bench::vm_channel::VmChannel;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::vm::{Vm, VmSpec};
use serde::Serialize;
use serde_json::Value;

use crate::Options;

const DISK: u64 = 256 << 20;
const BOOT: Duration = Duration::from_secs(240);
/// From a change to the measurement.
const SETTLE: Duration = Duration::from_secs(1);
/// Each round of the guest beside it dirties a little.
const WRITE: &str = "n=$((n + 1)); echo $n >/root/n;";
/// Writes all of its second disk and reads it again, past its cache.
const STREAM: &str = "while :; do \
    dd if=/dev/zero of=/dev/vdb bs=64k count=1024 oflag=direct conv=notrunc 2>/dev/null; \
    dd if=/dev/vdb of=/dev/null bs=64k count=1024 iflag=direct 2>/dev/null; echo streamed; done";

/// What goes on beside the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Noise {
    /// Nothing.
    Nothing,
    /// A guest flushes and asks its host for its status in a loop.
    Status,
    /// A guest calls CHECKPOINT in a loop.
    Checkpoint,
    /// CHECKPOINT after CHECKPOINT on a VM's channel without a guest behind it, as fast as answers come.
    Channel,
}

const NOISES: [Noise; 4] = [Noise::Nothing, Noise::Status, Noise::Checkpoint, Noise::Channel];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum User {
    Fio,
    Guest,
}

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    user: User,
    noise: Noise,
    mib_per_s: Spread,
    /// Beside the same round's with nothing else.
    ratio_to_nothing: Spread,
    /// Beside the same round's with a guest that asks for its status.
    ratio_to_status: Spread,
    noises_per_s: Spread,
}

/// One measurement: bytes of the user, and rounds of the noise, in a second.
#[derive(Clone, Copy)]
struct Taken(f64, f64);

struct Setup {
    fio_disk: PathBuf,
    channel: VmChannel,
    channel_disk: MountedDisk,
    status: Vm,
    checkpoint: Vm,
    user: Vm,
    /// Behind the VMs, which have its disks open.
    _cluster: Cluster,
}

pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let mut setup = Setup::new(options)?;
    let mut rows = Vec::new();
    for user in [User::Fio, User::Guest] {
        // The first one is slower: what it needs is not local yet.
        setup.measure(user, Noise::Nothing, SETTLE)?;
        let mut rounds = Vec::new();
        for round in 0..options.rounds {
            // Another one first each time, so that no drift favours any.
            let mut taken = [Taken(0.0, 0.0); 4];
            for at in 0..NOISES.len() {
                let at = (at + round) % NOISES.len();
                taken[at] =
                    setup.measure(user, NOISES[at], Duration::from_secs(options.seconds))?;
            }
            rounds.push(taken);
        }
        for (at, noise) in NOISES.into_iter().enumerate() {
            let spread = |of: &dyn Fn(&[Taken; 4]) -> f64| {
                Spread::of(rounds.iter().map(of)).context("no round at all")
            };
            rows.push(Row {
                user,
                noise,
                mib_per_s: spread(&|taken| taken[at].0 / f64::from(1 << 20))?,
                ratio_to_nothing: spread(&|taken| taken[at].0 / taken[0].0)?,
                ratio_to_status: spread(&|taken| taken[at].0 / taken[1].0)?,
                noises_per_s: spread(&|taken| taken[at].1)?,
            });
        }
    }
    if !options.json {
        print_table(options, &rows);
    }
    Ok(rows)
}

#[expect(clippy::print_stdout, reason = "printing is what a benchmark is for")]
fn print_table(options: &Options, rows: &[Row]) {
    println!(
        "\nThroughput of a disk's user beside a guest with another disk; medians of {} times {} s \
         (least to most)",
        options.rounds, options.seconds
    );
    println!(
        "{:<6} {:<11} {:>26} {:>20} {:>20} {:>12}",
        "user", "beside", "MiB/s", "to nothing", "to status", "beside 1/s"
    );
    for row in rows {
        println!(
            "{:<6} {:<11} {:>26} {:>20} {:>20} {:>12.1}",
            format!("{:?}", row.user).to_lowercase(),
            format!("{:?}", row.noise).to_lowercase(),
            row.mib_per_s.to_string(),
            row.ratio_to_nothing.to_string(),
            row.ratio_to_status.to_string(),
            row.noises_per_s.median
        );
    }
}

impl Setup {
    fn new(options: &Options) -> Result<Self> {
        let image = GuestImage::get()?;
        let cluster = Cluster::start_in(options.scratch()?, &[])?;
        cluster.import(&image.disk, "debian")?;
        let raw = sparse(&cluster.scratch().join("raw"), DISK, &[(0, &noise(1, DISK as usize))])?;
        cluster.import(&raw, "noise")?;
        let fio_disk = cluster.attach("noise", "fio")?;
        // So that later all of it is read on this host.
        std::io::copy(&mut std::fs::File::open(&fio_disk)?, &mut std::io::sink())?;
        let channel_disk = MountedDisk::open(&cluster.attach("noise", "channel")?, false)?;
        let channel = VmChannel::add(&cluster, "channel", "channel")?;
        let status =
            format!("while :; do {WRITE} sync; blobcr-guest status >/dev/null && echo asked; done");
        let checkpoint =
            format!("while :; do {WRITE} blobcr-guest checkpoint >/dev/null && echo taken; done");
        let status = standing(&cluster, &image, "status", &status, "asked", &[])?;
        let checkpoint = standing(&cluster, &image, "checkpoint", &checkpoint, "taken", &[])?;
        let more = cluster.attach("noise", "user-data")?;
        let user = standing(&cluster, &image, "user", STREAM, "streamed", &[&more])?;
        Ok(Self { fio_disk, channel, channel_disk, status, checkpoint, user, _cluster: cluster })
    }

    fn measure(&mut self, user: User, noise: Noise, time: Duration) -> Result<Taken> {
        let Self { channel, channel_disk, status, checkpoint, .. } = self;
        let noisy = match noise {
            Noise::Status => Some((&*status, "asked")),
            Noise::Checkpoint => Some((&*checkpoint, "taken")),
            Noise::Nothing | Noise::Channel => None,
        };
        let guest = (user == User::Guest).then_some(&self.user);
        let running: Vec<&Vm> = noisy.map(|(vm, _)| vm).into_iter().chain(guest).collect();
        for vm in &running {
            vm.qmp("cont", Value::Null)?;
        }
        let (ended, calls) = (AtomicBool::new(false), AtomicU64::new(0));
        let rounds = || match noisy {
            Some((vm, word)) => vm.console().matches(word).count() as u64,
            None => calls.load(Ordering::Relaxed),
        };
        let taken = std::thread::scope(|scope| {
            let caller = (noise == Noise::Channel)
                .then(|| scope.spawn(|| call(channel, channel_disk, &ended, &calls)));
            std::thread::sleep(SETTLE);
            let (before, begun) = (rounds(), Instant::now());
            let bytes = match guest {
                None => fio(&self.fio_disk, time),
                Some(vm) => streamed(vm, time),
            };
            let rounds = (rounds() - before) as f64 / begun.elapsed().as_secs_f64();
            ended.store(true, Ordering::Relaxed);
            caller.map(|thread| thread.join().expect("no panic")).transpose()?;
            Ok(Taken(bytes?, rounds))
        });
        for vm in &running {
            vm.qmp("stop", Value::Null)?;
        }
        taken
    }
}

/// Boots a VM that does something in a loop, and stops it when it is at it.
fn standing(
    cluster: &Cluster,
    image: &GuestImage,
    name: &str,
    run: &str,
    at_it: &str,
    more: &[&Path],
) -> Result<Vm> {
    let disk = cluster.attach("debian", name)?;
    let added = cluster.json(&["vm", "add", name, "--disk", name])?;
    let mut spec = VmSpec::new(image, disk, run);
    spec.channel = added["socket"].as_str().map(PathBuf::from);
    spec.disks.extend(more.iter().map(|path| path.to_path_buf()));
    let mut vm = Vm::start(&spec, &cluster.scratch().join(name))?;
    vm.wait_for(at_it, BOOT)?;
    vm.qmp("stop", Value::Null)?;
    Ok(vm)
}

/// CHECKPOINT of a disk that is a little dirty, again and again.
fn call(
    channel: &mut VmChannel,
    disk: &MountedDisk,
    ended: &AtomicBool,
    calls: &AtomicU64,
) -> Result<()> {
    while !ended.load(Ordering::Relaxed) {
        let call = calls.fetch_add(1, Ordering::Relaxed);
        disk.file().write_all_at(&noise(call, 4096), 0)?;
        channel.checkpoint()?;
    }
    Ok(())
}

/// What fio reads and writes in a second.
fn fio(disk: &Path, time: Duration) -> Result<f64> {
    let ran = Command::new("fio")
        .args(["--name=user", "--rw=randrw", "--rwmixread=70", "--bs=4k", "--direct=1"])
        .args(["--ioengine=libaio", "--iodepth=8", "--fallocate=none", "--time_based=1"])
        .args(["--output-format=json", "--norandommap"])
        .arg(format!("--runtime={}", time.as_secs()))
        .arg(format!("--size={DISK}"))
        .arg(format!("--filename={}", disk.display()))
        .output()
        .context("start fio (tests/setup.sh installs it)")?;
    ensure!(ran.status.success(), "fio: {}", String::from_utf8_lossy(&ran.stderr));
    let said: Value = serde_json::from_slice(&ran.stdout)?;
    let bytes = |what: &str| said["jobs"][0][what]["bw_bytes"].as_f64().context("a bandwidth");
    Ok(bytes("read")? + bytes("write")?)
}

/// What the disks of a VM read and write in a second.
fn streamed(vm: &Vm, time: Duration) -> Result<f64> {
    let bytes = || -> Result<f64> {
        let stats = vm.qmp("query-blockstats", Value::Null)?;
        let stats = stats.as_array().context("a list")?;
        let bytes = |disk: &Value, what: &str| disk["stats"][what].as_f64().unwrap_or_default();
        Ok(stats.iter().map(|disk| bytes(disk, "rd_bytes") + bytes(disk, "wr_bytes")).sum())
    };
    let (before, begun) = (bytes()?, Instant::now());
    std::thread::sleep(time);
    Ok((bytes()? - before) / begun.elapsed().as_secs_f64())
}
