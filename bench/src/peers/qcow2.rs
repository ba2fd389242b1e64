//! qcow2 files and the snapshots in them, by the commands of Debian's qemu-utils.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::storage_daemon::qemu_img;

/// A qcow2 file.
#[derive(Debug)]
pub struct Qcow2(PathBuf);

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path of the benchmark is no UTF-8")
}

impl Qcow2 {
    /// `qemu-img create -b`: an empty file over a raw one. Returns how long it took, too.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn over(base: &Path, path: &Path) -> anyhow::Result<(Self, Duration)> {
        let began = Instant::now();
        let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(base)?, text(path)?];
        qemu_img(&args)?;
        Ok((Self(path.to_owned()), began.elapsed()))
    }

    fn timed(&self, args: &[&str]) -> anyhow::Result<Duration> {
        let began = Instant::now();
        qemu_img(&[args, &[text(&self.0)?]].concat())?;
        Ok(began.elapsed())
    }

    /// `qemu-img snapshot -c`: a snapshot inside of it.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn snapshot(&self, name: &str) -> anyhow::Result<Duration> {
        self.timed(&["snapshot", "-c", name])
    }

    /// `qemu-img snapshot -a`: back to a snapshot.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn apply(&self, name: &str) -> anyhow::Result<Duration> {
        self.timed(&["snapshot", "-a", name])
    }

    /// `qemu-img snapshot -l`.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn list(&self) -> anyhow::Result<Duration> {
        self.timed(&["snapshot", "-l"])
    }

    /// Writes the first so many MiB.
    ///
    /// # Errors
    /// When qemu-io fails.
    pub fn dirty(&self, mib: u64) -> anyhow::Result<()> {
        let ran = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &format!("write -P 7 0 {mib}M"), text(&self.0)?])
            .output()
            .context("run qemu-io (Debian: qemu-utils)")?;
        ensure!(ran.status.success(), "qemu-io: {}", String::from_utf8_lossy(&ran.stderr));
        Ok(())
    }
}
