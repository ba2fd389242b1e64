//! `blobcr-guest checkpoint --freeze` in a real guest with two file systems, its root one of them, while
//! a program writes to both.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blobcr_tests::cluster::{Cluster, json};
use blobcr_tests::daemon::Daemon;
use blobcr_tests::ext4::Ext4;
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::vm::{Vm, VmSpec};
use rustix::process::Signal;

/// A guest boots in 3 s on an idle machine; this is for a very busy one.
const BOOT: Duration = Duration::from_secs(240);
/// For anything that a running guest does.
const SOON: Duration = Duration::from_secs(120);
/// What the guest does all the time: each round changes both file systems, and tells when it was.
const WRITER: &str = "mount -t ext4 /dev/vdb /mnt; \
    (n=0; while n=$((n + 1)); do \
       for d in /root /mnt; do echo $n >>$d/log; echo $n >$d/new; mv $d/new $d/now; done; \
       read up rest </proc/uptime; echo round $n at $up; \
     done) & ";

/// A guest with two disks, and a proxy that is a process of its own.
struct Setup {
    vm: Vm,
    proxy: Daemon,
    cluster: Cluster,
}

impl Setup {
    fn new(run: &str) -> Result<Self> {
        let image = GuestImage::get()?;
        let cluster = Cluster::start(&[])?;
        let blank = Ext4::make(&cluster.scratch().join("blank"), 64)?;
        cluster.import(&image.disk, "debian")?;
        cluster.import(blank.path(), "blank")?;
        let disks = vec![cluster.attach("debian", "root")?, cluster.attach("blank", "data")?];
        let endpoint = std::fs::read_to_string(cluster.dir().join("endpoint"))?;
        let sockets = cluster.scratch().join("vms");
        let sockets = sockets.to_str().context("ASCII")?;
        let args = ["proxy", "--mirror", endpoint.trim(), "--sockets", sockets];
        let proxy = Daemon::start(&args, &cluster.scratch().join("proxy.log"))?;
        let vm = ["vm", "add", "vm", "--disk", "root", "--disk", "data"];
        let added = json(proxy.address().as_ref(), &vm)?;
        let channel = added["socket"].as_str().map(PathBuf::from);
        let run = format!("{WRITER}{run}");
        let spec = VmSpec { channel, disks, ..VmSpec::new(&image, "", run) };
        let vm = Vm::start(&spec, &cluster.scratch().join("vm"))?;
        Ok(Self { vm, proxy, cluster })
    }

    /// A copy of what a snapshot of this disk holds.
    fn snapshot(&self, disk: &str, number: u64) -> Result<Ext4> {
        let info = self.cluster.json(&["disk", "info", disk])?;
        let image = info["checkpoint_image"].as_str().context("a checkpoint image")?;
        let file = self.cluster.mount().join(format!("images/{image}/{number}.raw"));
        Ext4::copy_of(&file, &self.cluster.scratch().join("copy"))
    }

    /// When the writer ended its rounds so far, by the guest's clock.
    fn rounds(&self) -> Vec<f64> {
        let console = self.vm.console();
        let whole = console.rfind('\n').unwrap_or(0);
        let rounds = console[..whole]
            .lines()
            .filter_map(|line| line.split_once("round ")?.1.split_once(" at "));
        rounds.filter_map(|(_, at)| at.parse().ok()).collect()
    }

    /// Waits until the writer is at work so many seconds later, by the guest's clock.
    fn goes_on_for(&self, seconds: f64) -> Result<()> {
        let last = || self.rounds().last().copied().unwrap_or_default();
        let (from, began) = (last(), Instant::now());
        while last() < from + seconds {
            let late = began.elapsed() > SOON;
            ensure!(!late, "the writer does not go on:\n{}", self.vm.console());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.vm.kill()?;
        drop(self.vm);
        self.proxy.stop(Signal::TERM)
    }
}

/// The number of the snapshot in a line such as `d-ckpt@2 disk=d …`.
fn number(line: &str, disk: &str) -> Result<u64> {
    let head = line.split_once(&format!(" disk={disk} ")).context("another line")?.0;
    Ok(head.rsplit('@').next().unwrap_or_default().parse()?)
}

#[test]
fn a_snapshot_of_frozen_file_systems_needs_no_journal() -> Result<()> {
    let mut setup = Setup::new(
        "for how in --no-flush '' --freeze --freeze --freeze; do \
           sleep 1; blobcr-guest checkpoint $how --freeze-limit 100 --wait; echo \"how=$how exit=$?\"; \
         done; sleep 100000",
    )?;
    setup.vm.wait_for("round 5 at", BOOT)?;
    for (how, frozen) in [
        ("--no-flush", false),
        ("", false),
        ("--freeze", true),
        ("--freeze", true),
        ("--freeze", true),
    ] {
        let root = setup.vm.wait_for(" disk=root ", SOON)?;
        let data = setup.vm.wait_for(" disk=data ", SOON)?;
        setup.vm.wait_for(&format!("how={how} exit=0"), SOON)?;
        // Thawed: both file systems are written to again.
        setup.goes_on_for(0.1)?;
        for (disk, line) in [("root", root), ("data", data)] {
            let snapshot = setup.snapshot(disk, number(&line, disk)?)?;
            let found = snapshot.needs_recovery()?;
            ensure!(found != frozen, "{disk} {how}: whether it needs recovery: {found}");
            if !frozen {
                snapshot.replay()?;
            }
            snapshot.check().with_context(|| format!("{disk} {how}"))?;
        }
    }
    setup.end()
}

/// The root is frozen too, on which the program itself lies.
#[test]
fn a_host_that_hangs_keeps_no_guest_frozen() -> Result<()> {
    let mut setup = Setup::new(
        "while :; do \
           blobcr-guest checkpoint --freeze --freeze-limit 2 --timeout 600 && echo taken; \
         done",
    )?;
    setup.vm.wait_for("taken", BOOT)?;
    // Where the guest is slow it may not have asked before the host is back: then once more.
    for _ in 0..5 {
        setup.proxy.signal(Signal::STOP)?;
        setup.goes_on_for(10.0)?;
        setup.proxy.signal(Signal::CONT)?;
        // It says what the snapshot is worth.
        if setup.vm.wait_for("and thawed before", Duration::from_secs(15)).is_ok() {
            setup.vm.wait_for("taken", SOON)?;
            return setup.end();
        }
    }
    bail!("no request took longer than its limit:\n{}", setup.vm.console())
}

#[test]
fn a_program_that_is_killed_leaves_nothing_frozen() -> Result<()> {
    let mut setup = Setup::new(
        "while :; do \
           blobcr-guest checkpoint --freeze --freeze-limit 100000 & \
           sleep 5; kill -9 $! && echo killed; wait; \
         done",
    )?;
    setup.vm.wait_for("round 5 at", BOOT)?;
    // Nobody answers, so it holds all still until it is killed.
    setup.proxy.signal(Signal::STOP)?;
    setup.vm.wait_for("killed", SOON)?;
    let began = Instant::now();
    let stood_still = |two: &[f64]| two[1] - two[0] > 2.0;
    while !setup.rounds().windows(2).any(stood_still) {
        ensure!(began.elapsed() < SOON, "never frozen:\n{}", setup.vm.console());
        std::thread::sleep(Duration::from_millis(50));
    }
    setup.proxy.signal(Signal::CONT)?;
    setup.end()
}
