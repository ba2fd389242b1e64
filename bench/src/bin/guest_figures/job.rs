//! What checkpoints cost an MPI job in two VMs, beside the same job that sends its state's files to a
//! remote directory, or has its VMs stopped while the host copies what changed on their disks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blobcr_bench::latency::{Latencies, Summary};
use blobcr_bench::mpi_job::{Times, times_to_stable};
use blobcr_bench::spread::Spread;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::guest_image::{GuestImage, repository_root};
use blobcr_tests::vm::{Link, Vm, VmSpec};
use serde::Serialize;

use crate::Options;
use crate::remote::Remote;

const VMS: usize = 2;
const RANKS: u64 = 4;
/// From one checkpoint to the next, in iterations.
const EVERY: u64 = 10;
const GROUP: &str = "job";
/// Where the job keeps its state in its VMs.
const DIR: &str = "/root/job";
const BOOT: Duration = Duration::from_secs(300);
/// For the whole job, on a machine that others use.
const LIMIT: Duration = Duration::from_secs(3600);

/// What the job does every so many iterations, when each rank has its state in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Way {
    /// Nothing, and it writes no state either.
    Nothing,
    /// A global CHECKPOINT.
    Checkpoint,
    /// Each rank sends its file to a remote directory over TCP, where it is synced.
    Copy,
    /// The VMs are stopped together, what changed on their disks is copied to files and synced, and they
    /// go on.
    Stop,
}

const WAYS: [Way; 4] = [Way::Nothing, Way::Checkpoint, Way::Copy, Way::Stop];

/// One run of the job.
struct Ran {
    /// What it said: its time is from MPI_Init to MPI_Finalize.
    times: Times,
    /// From the begin of each set, when all VMs were flushed, until it was stable.
    stable: Vec<Duration>,
}

impl Ran {
    /// The part of the time that a rank spends in calls.
    fn share(&self) -> f64 {
        let in_calls: Duration = self.times.calls.iter().sum();
        in_calls.as_secs_f64() / RANKS as f64 / self.times.ran.as_secs_f64()
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    way: Way,
    /// What the application waits for in each call on each rank.
    call: Option<Summary>,
    /// Its median beside CHECKPOINT's.
    ratio_to_checkpoint: Option<f64>,
    share_of_run: Spread,
    run_s: Spread,
    to_stable: Option<Summary>,
}

struct Setup {
    cluster: Cluster,
    image: GuestImage,
    /// The library that takes the time, as a disk.
    timed: PathBuf,
    runs: usize,
    /// Taken so far; all of them are the group's.
    sets: u64,
}

pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let mut setup = Setup::new(options)?;
    let mut all: Vec<(Way, Ran)> = Vec::new();
    for round in 0..options.rounds {
        for at in 0..WAYS.len() {
            let way = WAYS[(at + round) % WAYS.len()];
            all.push((way, setup.run(way, options).with_context(|| format!("{way:?}"))?));
        }
    }
    let mut rows = WAYS.into_iter().map(|way| row(way, &all)).collect::<Result<Vec<_>>>()?;
    let ours = rows[1].call.context("no call")?.p50_us;
    for row in &mut rows {
        row.ratio_to_checkpoint = row.call.map(|call| call.p50_us / ours);
    }
    if !options.json {
        print_table(options, &rows);
    }
    Ok(rows)
}

fn row(way: Way, all: &[(Way, Ran)]) -> Result<Row> {
    let runs = || all.iter().filter(|(of, _)| *of == way).map(|(_, ran)| ran);
    let summary = |times: &dyn Fn(&Ran) -> Vec<Duration>| -> Result<Option<Summary>> {
        let mut latencies = Latencies::new()?;
        runs().flat_map(times).for_each(|time| latencies.record(time));
        Ok(Some(latencies.summary()).filter(|summary| summary.samples > 0))
    };
    Ok(Row {
        way,
        call: summary(&|ran| ran.times.calls.clone())?,
        ratio_to_checkpoint: None,
        share_of_run: Spread::of(runs().map(Ran::share)).context("no run")?,
        run_s: Spread::of(runs().map(|ran| ran.times.ran.as_secs_f64())).context("no run")?,
        to_stable: summary(&|ran| ran.stable.clone())?,
    })
}

#[expect(clippy::print_stdout, reason = "printing is what a benchmark is for")]
fn print_table(options: &Options, rows: &[Row]) {
    println!(
        "\nAn MPI job of {RANKS} ranks in {VMS} VMs, a state of {:.1} MiB, {} checkpoints a run, {} runs of \
         each way (least to most)",
        f64::from(options.side).powi(2) * 8.0 / f64::from(1 << 20),
        options.iterations / EVERY,
        options.rounds
    );
    println!(
        "{:<11} {:>24} {:>14} {:>22} {:>22} {:>24}",
        "way",
        "call p50 / p99, ms",
        "to checkpoint",
        "share of run",
        "run, s",
        "stable p50 / p99, ms"
    );
    let ms = |summary: &Option<Summary>| match summary {
        Some(summary) => format!("{:.1} / {:.1}", summary.p50_us / 1e3, summary.p99_us / 1e3),
        None => "-".to_owned(),
    };
    for row in rows {
        let ratio = row.ratio_to_checkpoint.map_or("-".to_owned(), |ratio| format!("{ratio:.2}x"));
        println!(
            "{:<11} {:>24} {:>14} {:>22} {:>22} {:>24}",
            format!("{:?}", row.way).to_lowercase(),
            ms(&row.call),
            ratio,
            row.share_of_run.to_string(),
            row.run_s.to_string(),
            ms(&row.to_stable)
        );
    }
}

impl Setup {
    fn new(options: &Options) -> Result<Self> {
        let (image, _) = GuestImage::with_mpi()?;
        let cluster = Cluster::start_in(options.scratch()?, &[])?;
        cluster.import(&image.disk, "job")?;
        let timed = cluster.scratch().join("timed.so");
        let source = repository_root().join("bench/guest/timed.c");
        let compiled = Command::new("mpicc.mpich")
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .args([&timed, &source])
            .status()
            .context("cannot run mpicc.mpich; run tests/setup.sh as root")?;
        ensure!(compiled.success(), "cannot compile {}", source.display());
        let library = std::fs::File::options().write(true).open(&timed)?;
        library.set_len(library.metadata()?.len().next_multiple_of(4096))?;
        Ok(Self { cluster, image, timed, runs: 0, sets: 0 })
    }

    /// Runs the job from its beginning to its end.
    fn run(&mut self, way: Way, options: &Options) -> Result<Ran> {
        self.runs += 1;
        let dir = self.cluster.scratch().join(format!("run-{}", self.runs));
        let disk_bytes = self.image.disk.metadata()?.len();
        let remote = Remote::start(&dir.join("remote"), VMS, disk_bytes)?;
        let mut vms = Vec::new();
        for vm in 0..VMS {
            vms.push(self.boot(vm, way, &remote, &dir, options)?);
        }
        for vm in &mut vms {
            vm.wait_for("guest: up", BOOT)?;
        }
        if way == Way::Stop {
            remote.watch(&vms.iter().map(Vm::qmp_socket).collect::<Vec<_>>())?;
        }
        let ended = vms[0].wait_for("job: ended with", LIMIT);
        remote.check()?;
        ensure!(ended?.ends_with("with 0"), "the job failed:\n{}", vms[0].console());
        let mut ran = Ran { times: Times::said(&vms[0].console())?, stable: Vec::new() };
        let calls = if way == Way::Nothing { 0 } else { options.iterations / EVERY * RANKS };
        ensure!(
            ran.times.calls.len() as u64 == calls,
            "{} calls:\n{}",
            ran.times.calls.len(),
            vms[0].console()
        );
        drop(vms);
        if way == Way::Checkpoint {
            let sets = options.iterations / EVERY;
            ran.stable = times_to_stable(&self.cluster, GROUP, self.sets + 1..=self.sets + sets)?;
            self.sets += sets;
        }
        self.detach(way)?;
        std::fs::remove_dir_all(&dir)?;
        Ok(ran)
    }

    /// The disks and channels of a run go, and the next one begins with others.
    fn detach(&self, way: Way) -> Result<()> {
        for vm in (0..VMS).filter(|_| way == Way::Checkpoint) {
            let name = format!("run{}-{vm}", self.runs);
            self.cluster.json(&["vm", "remove", &name])?;
            self.cluster.json(&["disk", "detach", &name])?;
        }
        Ok(())
    }

    fn boot(
        &self,
        vm: usize,
        way: Way,
        remote: &Remote,
        dir: &Path,
        options: &Options,
    ) -> Result<Vm> {
        let name = format!("run{}-{vm}", self.runs);
        let (disk, channel) = if way == Way::Checkpoint {
            let disk = self.cluster.attach("job", &name)?;
            let words = ["vm", "add", &name, "--disk", &name, "--group", GROUP];
            let added = self.cluster.json(&words)?;
            (disk, added["socket"].as_str().map(PathBuf::from))
        } else {
            // As it is without a repository: a file on the same file system.
            let disk = dir.join(format!("{vm}.raw"));
            self.image.copy_disk(&disk)?;
            (disk, None)
        };
        let spec = VmSpec {
            channel,
            link: Some(Link { socket: dir.join("link"), listens: vm == 0 }),
            arguments: [
                "-netdev",
                "user,id=remote",
                "-device",
                &format!("virtio-net-pci,netdev=remote,mac=52:54:00:b1:0c:0{vm}"),
            ]
            .map(str::to_owned)
            .to_vec(),
            memory_mib: 384,
            ..VmSpec::new(&self.image, disk, command(vm, way, remote.port(), options))
        };
        // A copy: QEMU lets no two of its processes have one file.
        let timed = dir.join(format!("{vm}.timed.so"));
        std::fs::copy(&self.timed, &timed)?;
        let spec = VmSpec { disks: vec![spec.disks[0].clone(), timed], ..spec };
        Vm::start(&spec, &dir.join(&name))
    }
}

/// What a VM runs.
fn command(vm: usize, way: Way, port: u16, options: &Options) -> String {
    let (side, iterations) = (options.side, options.iterations);
    let every = if way == Way::Nothing { 0 } else { EVERY };
    let what = format!("{way:?}").to_lowercase();
    let job = format!(
        "env LD_PRELOAD=/tmp/timed.so TIMED={what} TIMED_HOST=10.0.2.2:{port} TIMED_DIR={DIR} \
         heat {side} {side} {iterations} {every} {DIR}"
    );
    let job = if vm == 0 { job } else { String::new() };
    format!(
        "cat /dev/vdb >/tmp/timed.so; ip addr add 10.0.2.15/24 dev eth1; ip link set eth1 up; \
         job-node {vm} {job}"
    )
}
