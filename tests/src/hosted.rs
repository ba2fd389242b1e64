//! VMs on a host whose proxy is a process of its own. Each has a disk of the guest image, and a second
//! one by which the test tells the guest to go on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::processes_naming;
use crate::daemon::wait_until;
use crate::guest_image::GuestImage;
use crate::roles::{Plan, Roles, Which};
use crate::vm::{Vm, VmSpec};

/// A guest boots in 3 s on an idle machine; this is for a very busy one.
pub const BOOT: Duration = Duration::from_secs(240);
/// For anything that a running guest does.
pub const SOON: Duration = Duration::from_secs(120);
/// The host's proxy.
pub const PROXY: Which = Which::Proxy(0);

/// What the test writes for the guest to see.
const SECTOR: u64 = 512;
/// Defines `raised N`, which tells whether the test has raised that flag, and `await N`.
const FLAGS: &str = "raised() { blockdev --flushbufs /dev/vdb; \
    dd if=/dev/vdb bs=512 skip=$1 count=1 2>/dev/null | grep -q raised; }; \
    await() { until raised $1; do sleep 0.1; done; }; ";

/// A host.
pub struct Hosted {
    /// Its processes, and those of the cluster behind them.
    pub roles: Roles,
    image: GuestImage,
}

/// A VM that the proxy knows.
pub struct Added {
    /// Its name, which is that of its disk too.
    pub name: String,
    /// What `blobcr vm add` printed.
    pub view: Value,
    disk: PathBuf,
    flags: PathBuf,
}

impl Hosted {
    /// Starts it. `isolated`: with a network of its own, where taps can be.
    ///
    /// # Errors
    /// When something is not ready in time.
    pub fn start(isolated: bool) -> Result<Self> {
        let image = GuestImage::get()?;
        let roles = Roles::start(&Plan { isolated, proxies: true, ..Plan::default() }, |_| Ok(()))?;
        let disk = image.disk.to_str().context("the image's path is no text")?;
        roles.json(&["image", "import", disk, "debian"])?;
        Ok(Self { roles, image })
    }

    /// Attaches a disk and adds a VM of that name.
    ///
    /// # Errors
    /// When a verb fails.
    pub fn add(&self, name: &str, more: &[&str]) -> Result<Added> {
        let disk = self.roles.attach(0, "debian", name)?;
        let words = [&["vm", "add", name, "--disk", name][..], more].concat();
        let view = self.roles.json_from(PROXY, &words)?;
        let flags = self.roles.dir().join(format!("{name}.flags"));
        fs::write(&flags, [0; 16 * SECTOR as usize])?;
        Ok(Added { name: name.to_owned(), view, disk, flags })
    }

    /// Boots it where its proxy lives. `disks`: more of them, from `/dev/vdc` on.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn boot(
        &self,
        vm: &Added,
        arguments: Vec<String>,
        disks: &[PathBuf],
        run: &str,
    ) -> Result<Vm> {
        let own = [vm.disk.clone(), vm.flags.clone()];
        let spec = VmSpec {
            disks: own.iter().chain(disks).cloned().collect(),
            arguments,
            ..VmSpec::new(&self.image, "", format!("{FLAGS}{run}"))
        };
        let dir = self.roles.dir().join(&vm.name);
        self.roles.host(PROXY)?.enter(|| Vm::start(&spec, &dir))?
    }

    /// The numbers of the snapshots that the VM's disk has.
    ///
    /// # Errors
    /// When it has none, or a verb fails.
    pub fn snapshots(&self, vm: &Added) -> Result<Vec<u64>> {
        let disk = self.roles.json(&["disk", "info", &vm.name])?;
        let image = disk["checkpoint_image"].as_str().context("no checkpoint was taken")?;
        let list = self.roles.json(&["snapshot", "list", image])?;
        let list = list.as_array().context("no list")?;
        list.iter().map(|one| one["snapshot"].as_u64().context("no number")).collect()
    }

    /// How many lines of the proxy's log contain all of this.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn logged(&self, all: &[&str]) -> Result<usize> {
        let log = self.roles.log_of(PROXY)?;
        Ok(log.lines().filter(|line| all.iter().all(|part| line.contains(part))).count())
    }

    /// Waits until so many lines of the proxy's log contain all of this.
    ///
    /// # Errors
    /// When it does not come to that; the message has the log.
    pub fn wait_logged(&self, lines: usize, all: &[&str]) -> Result<()> {
        wait_until(&format!("{lines} lines with {all:?}"), || Ok(self.logged(all)? >= lines))
            .with_context(|| self.roles.log())
    }
}

impl Added {
    /// A list of words that `blobcr vm add` printed.
    ///
    /// # Errors
    /// When it did not.
    pub fn words(&self, key: &str) -> Result<Vec<String>> {
        let words = self.view[key].as_array().with_context(|| format!("no {key}"))?;
        words.iter().map(|w| w.as_str().map(str::to_owned).context("no text")).collect()
    }

    /// A text that `blobcr vm add` printed.
    ///
    /// # Errors
    /// When it did not.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.view[key].as_str().with_context(|| format!("no {key}"))
    }

    /// Raises a flag, which the guest sees.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn raise(&self, flag: u64) -> Result<()> {
        ensure!(flag < 16, "there are 16 flags");
        let file = File::options().write(true).open(&self.flags)?;
        file.write_all_at(b"raised", flag * SECTOR)?;
        Ok(file.sync_data()?)
    }

    /// The processes that QEMU runs for connections of the VM.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn relays(&self) -> Result<usize> {
        let all = processes_naming(self.text("socket")?.as_ref())?;
        Ok(all.iter().filter(|line| line.starts_with("blobcr vm relay")).count())
    }
}
