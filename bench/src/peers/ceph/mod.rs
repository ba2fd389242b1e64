//! Ceph RBD: a whole cluster on this host, as small as one can be, and the commands of `rbd`
//! (Debian: ceph-mon, ceph-mgr, ceph-osd, ceph-common).

mod client;
mod cluster;
mod diff_file;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

pub use client::OpenImage;
pub use diff_file::write as write_diff_file;

/// What has to be installed for it.
const PROGRAMS: [&str; 5] = ["ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd"];

/// One monitor, one manager and one OSD, which keeps one copy in a BlueStore on a file. Ended and its
/// files deleted on drop.
#[derive(Debug)]
pub struct Ceph {
    daemons: Vec<Child>,
    /// Field order: the directory goes last.
    dir: tempfile::TempDir,
}

impl Ceph {
    /// Whether all of its programs are on this host.
    #[must_use]
    pub fn is_installed() -> bool {
        PROGRAMS.iter().all(|program| super::installed(program, "--version"))
    }

    /// Starts one below `parent`, with an empty pool for images.
    ///
    /// # Errors
    /// When a part of it does not start.
    pub fn start(parent: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ceph-").tempdir_in(parent)?;
        let mut ceph = Self { daemons: Vec::new(), dir };
        ceph.boot().context("start Ceph")?;
        Ok(ceph)
    }

    fn conf(&self) -> PathBuf {
        self.dir.path().join("ceph.conf")
    }

    /// A program of Ceph's that is to talk to this cluster.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // By the environment, because not all of them take an option for it.
        command.env("CEPH_CONF", self.conf()).env_remove("CEPH_ARGS");
        command
    }

    fn run<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> anyhow::Result<Output> {
        let ran = self.command(program).args(args).output();
        let ran = ran.with_context(|| format!("run {program}"))?;
        let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
        let said = String::from_utf8_lossy(&ran.stderr);
        ensure!(ran.status.success(), "{program} {args:?}: {}", said.trim());
        Ok(ran)
    }

    /// `rbd ARGS`; returns how long the command took.
    ///
    /// # Errors
    /// When it fails.
    pub fn rbd<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<Duration> {
        let began = Instant::now();
        self.run("rbd", args)?;
        Ok(began.elapsed())
    }

    /// Writes the first so many MiB of an image, one after the other.
    ///
    /// # Errors
    /// When `rbd bench` fails.
    pub fn dirty(&self, image: &str, mib: u64) -> anyhow::Result<()> {
        let how = ["--io-type", "write", "--io-pattern", "seq", "--io-threads", "1"];
        let much = ["--io-size", "1M", "--io-total", &format!("{mib}M"), image];
        self.rbd(&[&["bench"][..], &how, &much].concat()).map(drop)
    }

    /// What the OSD has allocated for data, in bytes.
    ///
    /// # Errors
    /// When it does not tell.
    pub fn stored_bytes(&self) -> anyhow::Result<u64> {
        let counters = self.run("ceph", &["tell", "osd.0", "perf", "dump"])?.stdout;
        let counters: Value = serde_json::from_slice(&counters).context("ceph's JSON")?;
        let allocated = &counters["bluestore"]["bluestore_allocated"];
        allocated.as_u64().context("the OSD does not tell what is allocated")
    }

    /// The process ids of its daemons.
    pub fn processes(&self) -> impl Iterator<Item = u32> {
        self.daemons.iter().map(Child::id)
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        // What they keep goes with them: they need not end in order.
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
