//! The paper's figure 7: a virtual machine starts on another host, from a disk that is fetched as it
//! is read, from one that is fetched ahead as well, and from one that is copied first.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blobcr_tests::daemon::wait_until;
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::roles::{Plan, Roles, Which};
use blobcr_tests::vm::{Vm, VmSpec};

use super::Settings;
use crate::random_bytes;
use crate::report::{Bound, Report, Table};

const MIB: u64 = 1 << 20;
/// Where the data of the program begins: behind the operating system.
const DATA_FROM_MIB: u64 = 128;
/// Of one read of the program.
const READ_MIB: u64 = 4;
/// The network of the paper's evaluation.
const MEGABITS: u32 = 1000;
const SUBJECTS: [&str; 3] = ["lazy+prefetch", "lazy", "copy first"];
const PREFETCH: usize = 0;
const LAZY: usize = 1;
const COPY: usize = 2;
/// Where nobody has read the image before, and where it is copied to afterwards.
const FIRST: Which = Which::Mirror(0);
/// Where it starts after somebody has.
const SECOND: Which = Which::Mirror(1);
/// For a busy machine without hardware virtualization.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a start cost, up to some moment.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    moved_mib: f64,
    waited_mib: f64,
}

/// Tells what a start has cost so far.
struct Meter<'a> {
    roles: &'a Roles,
    host: Which,
    /// What it starts from; without one a copy, all of which is waited for.
    disk: Option<&'a str>,
    began: Instant,
    received: u64,
}

impl<'a> Meter<'a> {
    fn start(roles: &'a Roles, host: Which, disk: Option<&'a str>) -> anyhow::Result<Self> {
        let received = roles.host(host)?.received_bytes()?;
        Ok(Self { roles, host, disk, began: Instant::now(), received })
    }

    fn cost(&self) -> anyhow::Result<Cost> {
        let seconds = self.began.elapsed().as_secs_f64();
        let moved = self.roles.host(self.host)?.received_bytes()? - self.received;
        let waited = match self.disk {
            None => moved,
            Some(disk) => {
                let info = self.roles.json_from(self.host, &["disk", "info", disk])?;
                info["waited_bytes"].as_u64().context("a disk does not tell what it waited for")?
            }
        };
        let mib = |bytes| bytes as f64 / MIB as f64;
        Ok(Cost { seconds, moved_mib: mib(moved), waited_mib: mib(waited) })
    }
}

/// Costs until the first byte of the disk can be read, until the guest runs the program, and until
/// that has ended.
type Costs = [Cost; 3];
const MOMENTS: [&str; 3] = ["first byte", "booted", "finished"];

/// How much of everything there is.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    image_mib: u64,
    read_mib: u64,
    written_mib: u64,
}

impl Sizes {
    /// What the guest runs: it reads its state, here and there in its data, and writes some.
    fn program(self) -> String {
        let places = (self.image_mib - DATA_FROM_MIB) / READ_MIB;
        let reads = self.read_mib / READ_MIB;
        // A prime steps through all places in an order that no readahead guesses.
        format!(
            "echo BOOTED; i=0; while [ $i -lt {reads} ]; do \
             dd if=/dev/vda of=/dev/null bs={READ_MIB}M count=1 \
             skip=$(({first} + i * 7919 % {places})) 2>/dev/null || echo FAILED; i=$((i + 1)); done; \
             dd if=/dev/zero of=/state bs=1M count={written} 2>/dev/null || echo FAILED; sync; \
             echo FINISHED",
            first = DATA_FROM_MIB / READ_MIB,
            written = self.written_mib,
        )
    }

    /// A bootable disk with so much data behind the operating system.
    fn disk(self, image: &GuestImage, path: &Path) -> anyhow::Result<()> {
        image.copy_disk(path)?;
        ensure!(path.metadata()?.len() <= DATA_FROM_MIB * MIB, "the guest's image has grown");
        let file = OpenOptions::new().write(true).open(path)?;
        random_bytes::fill(&file, DATA_FROM_MIB..self.image_mib)
    }
}

/// Boots the disk at `path` and lets the program run.
fn boot(
    image: &GuestImage,
    path: PathBuf,
    dir: &Path,
    sizes: Sizes,
    meter: &Meter<'_>,
) -> anyhow::Result<Costs> {
    let mut first = [0; 4096];
    OpenOptions::new().read(true).open(&path)?.read_exact_at(&mut first, 0)?;
    let first = meter.cost()?;
    let mut vm = Vm::start(&VmSpec::new(image, path, sizes.program()), dir)?;
    vm.wait_for("BOOTED", PATIENCE)?;
    let booted = meter.cost()?;
    vm.wait_for("FINISHED", PATIENCE)?;
    let finished = meter.cost()?;
    ensure!(!vm.console().contains("FAILED"), "the guest's program failed: {}", vm.console());
    vm.wait_until_down(PATIENCE)?;
    Ok([first, booted, finished])
}

/// A cluster of two hosts that have nothing of the image yet.
fn cluster(image: &GuestImage, sizes: Sizes) -> anyhow::Result<Roles> {
    let log = Some("info,blobcr_mirror_fuse::prefetch=debug".to_owned());
    let plan = Plan { mirrors: 2, isolated: true, log, ..Plan::default() };
    let roles = Roles::start(&plan, |_| Ok(()))?;
    let raw = roles.dir().join("raw");
    sizes.disk(image, &raw)?;
    roles.json(&["image", "import", raw.to_str().context("no text")?, "image"])?;
    std::fs::remove_file(&raw)?;
    roles.limit(FIRST, MEGABITS)?;
    roles.limit(SECOND, MEGABITS)?;
    Ok(roles)
}

/// By subject.
fn round(image: &GuestImage, sizes: Sizes) -> anyhow::Result<[Costs; 3]> {
    let roles = cluster(image, sizes)?;
    let meter = Meter::start(&roles, FIRST, Some("lazy"))?;
    let path = roles.attach(0, "image", "lazy")?;
    let lazy = boot(image, path, &roles.dir().join("lazy"), sizes, &meter)?;
    roles.json(&["disk", "detach", "lazy", "--discard-changes"])?;
    wait_until("what it read is kept", || {
        Ok(roles.log_of(FIRST)?.contains("what is read is recorded no more"))
    })?;
    let meter = Meter::start(&roles, SECOND, Some("ahead"))?;
    let path = roles.attach(1, "image", "ahead")?;
    let ahead = boot(image, path, &roles.dir().join("ahead"), sizes, &meter)?;
    let copy = roles.dir().join("copy");
    let meter = Meter::start(&roles, FIRST, None)?;
    roles.json(&["image", "export", "image", copy.to_str().context("no text")?])?;
    let copied = boot(image, copy, &roles.dir().join("copied"), sizes, &meter)?;
    Ok([ahead, lazy, copied])
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let image = GuestImage::get()?;
    let sizes = Sizes {
        image_mib: settings.size(2048, 256),
        read_mib: settings.size(288, 16),
        written_mib: settings.size(32, 4),
    };
    let mut seconds = Table::new("Time until", "s", false, &SUBJECTS);
    let mut moved = Table::new("Moved over the network until", "MiB", false, &SUBJECTS);
    let mut waited = Table::new("Waited for until", "MiB", false, &SUBJECTS);
    for _ in 0..settings.rounds {
        let costs = round(&image, sizes)?;
        for (subject, costs) in [PREFETCH, LAZY, COPY].into_iter().zip(costs) {
            for (moment, cost) in MOMENTS.into_iter().zip(costs) {
                seconds.add(moment, subject, cost.seconds);
                moved.add(moment, subject, cost.moved_mib);
                waited.add(moment, subject, cost.waited_mib);
            }
        }
    }
    let mut report = Report::new("", "A virtual machine starts on another host");
    report.setup = setup(sizes);
    let [_, _, finished] = MOMENTS;
    for subject in [LAZY, PREFETCH] {
        let name = SUBJECTS[subject];
        let ratio = moved.ratio_of(finished, subject, COPY);
        let what = format!("{name}: bytes moved against copying first");
        report.claim(&what, Bound::AtMost(0.25), ratio, "×");
        let ratio = seconds.ratio_of(finished, subject, COPY);
        let what = format!("{name}: time until the program has ended");
        report.claim(&what, Bound::AtMost(0.5), ratio, "×");
    }
    report.tables = vec![seconds, moved, waited];
    Ok(report)
}

fn setup(sizes: Sizes) -> Vec<String> {
    vec![
        format!(
            "A real guest under QEMU boots from an image of {} MiB, reads {} MiB of it in pieces of \
             {READ_MIB} MiB here and there, writes {} MiB, syncs and halts. Its host has nothing of \
             the image and receives {MEGABITS} Mbit/s. lazy: a disk is attached and fetches what is \
             read, and nobody has read the image before; lazy+prefetch: the same on another host \
             after that, which fetches ahead what the first one read; copy first: blobcr image \
             export, then the same from the local file.",
            sizes.image_mib, sizes.read_mib, sizes.written_mib
        ),
        "Mirrors, node and metadata server are processes in network namespaces of their own. Waited \
         for: of chunks that a read had to wait for, also where they were just being fetched ahead; \
         of a copy all of it."
            .to_owned(),
    ]
}
