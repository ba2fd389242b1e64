//! Copies of files that share their blocks (FICLONE), on a btrfs of our own (Debian: btrfs-progs).

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// Of the file system: room for metadata, and for what is written to copies.
const BYTES: u64 = 16 << 30;

/// A btrfs in a file, mounted through a loop device. Unmounted and deleted on drop.
#[derive(Debug)]
pub struct Reflinks {
    mounted: PathBuf,
    _dir: tempfile::TempDir,
}

fn run(program: &str, args: &[&Path]) -> anyhow::Result<()> {
    let ran = Command::new(program).args(args).output();
    let ran = ran.with_context(|| format!("run {program}"))?;
    ensure!(ran.status.success(), "{program}: {}", String::from_utf8_lossy(&ran.stderr).trim());
    Ok(())
}

impl Reflinks {
    /// Makes and mounts it below `parent`.
    ///
    /// # Errors
    /// When the tools are not there, or this host has no loop devices or does not let us mount.
    pub fn mount(parent: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("btrfs-").tempdir_in(parent)?;
        let (image, mounted) = (dir.path().join("image"), dir.path().join("mounted"));
        File::create(&image)?.set_len(BYTES)?;
        run("mkfs.btrfs", &["-q".as_ref(), &image])?;
        std::fs::create_dir(&mounted)?;
        run("mount", &["-o".as_ref(), "loop".as_ref(), &image, &mounted])?;
        Ok(Self { mounted, _dir: dir })
    }

    /// Where its files are.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.mounted.join(name)
    }

    /// Makes `to` (new or not) a copy of `from`; returns how long that took.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn copy(&self, from: &str, to: &str) -> anyhow::Result<Duration> {
        let source = File::open(self.path(from))?;
        let began = Instant::now();
        let copy =
            OpenOptions::new().write(true).create(true).truncate(true).open(self.path(to))?;
        rustix::fs::ioctl_ficlone(&copy, &source).context("FICLONE")?;
        Ok(began.elapsed())
    }
}

impl Drop for Reflinks {
    fn drop(&mut self) {
        let _ = run("umount", &[&self.mounted]);
    }
}
