//! The paper's figure 7: a virtual machine starts on another host, from a disk that is fetched as it
//! is read, and from one that is copied first.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
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
const SUBJECTS: [&str; 2] = ["lazy", "copy first"];
const LAZY: usize = 0;
const COPY: usize = 1;
const HOST: Which = Which::Mirror(0);
/// For a busy machine without hardware virtualization.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a start cost, up to some moment.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    mib: f64,
}

/// Tells what a start has cost so far.
struct Meter<'a> {
    roles: &'a Roles,
    began: Instant,
    received: u64,
}

impl<'a> Meter<'a> {
    fn start(roles: &'a Roles) -> anyhow::Result<Self> {
        let received = roles.host(HOST)?.received_bytes()?;
        Ok(Self { roles, began: Instant::now(), received })
    }

    fn cost(&self) -> anyhow::Result<Cost> {
        let seconds = self.began.elapsed().as_secs_f64();
        let received = self.roles.host(HOST)?.received_bytes()? - self.received;
        Ok(Cost { seconds, mib: received as f64 / MIB as f64 })
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

/// One cluster, whose hosts have nothing of the image yet.
fn round(image: &GuestImage, sizes: Sizes) -> anyhow::Result<[Costs; 2]> {
    let roles = Roles::start(&Plan { isolated: true, ..Plan::default() }, |_| Ok(()))?;
    let raw = roles.dir().join("raw");
    sizes.disk(image, &raw)?;
    let raw_name = raw.to_str().context("the directory's name is no text")?;
    roles.json(&["image", "import", raw_name, "image"])?;
    std::fs::remove_file(&raw)?;
    roles.limit(HOST, MEGABITS)?;
    let meter = Meter::start(&roles)?;
    let path = roles.attach(0, "image", "lazy")?;
    let lazy = boot(image, path, &roles.dir().join("lazy"), sizes, &meter)?;
    let copy = roles.dir().join("copy");
    let copy_name = copy.to_str().context("the directory's name is no text")?;
    let meter = Meter::start(&roles)?;
    roles.json(&["image", "export", "image", copy_name])?;
    let copied = boot(image, copy, &roles.dir().join("copied"), sizes, &meter)?;
    Ok([lazy, copied])
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let image = GuestImage::get()?;
    let sizes = Sizes {
        image_mib: settings.size(2048, 256),
        read_mib: settings.size(288, 16),
        written_mib: settings.size(32, 4),
    };
    let mut seconds = Table::new("Time until", "s", false, &SUBJECTS);
    let mut bytes = Table::new("Moved over the network until", "MiB", false, &SUBJECTS);
    for _ in 0..settings.rounds {
        let costs = round(&image, sizes)?;
        for (subject, costs) in [LAZY, COPY].into_iter().zip(costs) {
            for (moment, cost) in MOMENTS.into_iter().zip(costs) {
                seconds.add(moment, subject, cost.seconds);
                bytes.add(moment, subject, cost.mib);
            }
        }
    }
    let mut report = Report::new("", "A virtual machine starts on another host");
    report.setup.push(format!(
        "A real guest under QEMU boots from an image of {} MiB, reads {} MiB of it in pieces of \
         {READ_MIB} MiB here and there, writes {} MiB, syncs and halts. Its host has nothing of \
         the image and receives {MEGABITS} Mbit/s; lazy: a disk is attached and fetches what is \
         read; copy first: blobcr image export, then the same from the local file.",
        sizes.image_mib, sizes.read_mib, sizes.written_mib
    ));
    report.setup.push(
        "Mirror, node and metadata server are processes in network namespaces of their own. The \
         mirror does not prefetch, so what it moves is what was waited for."
            .to_owned(),
    );
    let [_, _, finished] = MOMENTS;
    let ratio = bytes.ratio(finished, COPY);
    report.claim("bytes moved against copying first", Bound::AtMost(0.25), ratio, "×");
    let ratio = seconds.ratio(finished, COPY);
    report.claim("time until the program has ended", Bound::AtMost(0.5), ratio, "×");
    report.tables = vec![seconds, bytes];
    Ok(report)
}
