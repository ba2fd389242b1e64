//! The real guest that the tests and the demo boot: built once by `tests/guest/build.sh`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

use crate::daemon::blobcr;
use crate::disk_file::copy_sparse;

/// A kernel, an initramfs that finds `/dev/vda`, and an ext4 root for it.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The root disk, raw. A template: boot a copy of it.
    pub disk: PathBuf,
}

/// The directory of the repository's sources.
#[must_use]
pub fn repository_root() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir).to_owned()
}

/// Where cargo builds.
#[must_use]
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => repository_root().join(dir),
        None => repository_root().join("target"),
    }
}

impl GuestImage {
    /// The guest, built when it is not there or something that is in it has changed.
    ///
    /// # Errors
    /// When it cannot be built; the message has what the script said.
    pub fn get() -> Result<Self> {
        static BUILT: OnceLock<Result<GuestImage, String>> = OnceLock::new();
        BUILT
            .get_or_init(|| Self::build().map_err(|e| format!("{e:#}")))
            .clone()
            .map_err(|e| anyhow!("{e}"))
    }

    /// The same with MPICH, the MPI hook and the example job, and the job itself for this machine.
    ///
    /// # Errors
    /// When it cannot be built; the message has what the script said.
    pub fn with_mpi() -> Result<(Self, PathBuf)> {
        static BUILT: OnceLock<Result<GuestImage, String>> = OnceLock::new();
        let dir = target_dir().join("guest-mpi");
        let image = BUILT
            .get_or_init(|| {
                Self::built("tests/guest/mpi.sh", &dir, &[]).map_err(|e| format!("{e:#}"))
            })
            .clone()
            .map_err(|e| anyhow!("{e}"))?;
        Ok((image, dir.join("host/heat")))
    }

    fn build() -> Result<Self> {
        Self::built("tests/guest/build.sh", &target_dir().join("guest-image"), &[])
    }

    /// The same as a host of virtual machines, with vsock and the `blobcr` that was built beside
    /// the tests.
    ///
    /// # Errors
    /// When it cannot be built; the message has what the script said.
    pub fn host() -> Result<Self> {
        Self::built("tests/guest/vsock.sh", &target_dir().join("guest-vsock"), &[&blobcr()?])
    }

    fn built(script: &str, dir: &Path, more: &[&Path]) -> Result<Self> {
        let script = repository_root().join(script);
        let output = Command::new(&script)
            .arg(dir)
            .args(more)
            .env("CARGO_TARGET_DIR", target_dir())
            .output()
            .with_context(|| format!("cannot run {}", script.display()))?;
        ensure!(
            output.status.success(),
            "{} failed ({}): {}",
            script.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Self {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
            disk: dir.join("disk.raw"),
        })
    }

    /// A copy of the root disk, with its holes.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn copy_disk(&self, to: &Path) -> Result<()> {
        copy_sparse(&self.disk, to)
    }
}
