//! A file served by `qemu-storage-daemon` through FUSE (Debian: qemu-utils): raw, or qcow2 with and
//! without a backing file, with snapshots taken over QMP.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blobcr_tests::qmp::Qmp;
use serde_json::{Value, json};

/// How long the daemon may take to be ready.
const LIMIT: Duration = Duration::from_secs(60);

/// What is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format<'a> {
    /// A raw file.
    Raw,
    /// A qcow2 file.
    Qcow2,
    /// An empty qcow2 file over this raw file.
    Qcow2Over(&'a Path),
}

/// A running `qemu-storage-daemon`. Ended and its files deleted on drop.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    qmp: Qmp,
    top: String,
    snapshots: usize,
    export: PathBuf,
    /// Field order: the directory goes last.
    dir: tempfile::TempDir,
}

/// Runs `qemu-img`.
///
/// # Errors
/// When it is not there or fails.
pub fn qemu_img(args: &[&str]) -> anyhow::Result<()> {
    let ran = Command::new("qemu-img").args(args).output();
    let ran = ran.context("run qemu-img (Debian: qemu-utils)")?;
    ensure!(ran.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    Ok(())
}

impl StorageDaemon {
    /// Makes an empty file of `size` bytes below `parent` and serves it; `direct`: its own I/O
    /// passes the page cache by, as QEMU's `cache=none` does.
    ///
    /// # Errors
    /// When `qemu-img` or `qemu-storage-daemon` fail.
    pub fn start(
        parent: &Path,
        format: Format<'_>,
        size: u64,
        direct: bool,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("qemu-").tempdir_in(parent)?;
        let dir_path = std::fs::canonicalize(dir.path())?;
        let at = |name: &str| dir_path.join(name).display().to_string();
        let (image, bytes) = (at("image"), size.to_string());
        match format {
            Format::Raw => File::create(&image)?.set_len(size)?,
            Format::Qcow2 => qemu_img(&["create", "-q", "-f", "qcow2", &image, &bytes])?,
            Format::Qcow2Over(base) => {
                let base = std::path::absolute(base)?.display().to_string();
                let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &base];
                qemu_img(&[&args[..], &[&image, &bytes]].concat())?;
            }
        }
        let export = dir_path.join("disk");
        File::create(&export)?;
        let direct = if direct { "on" } else { "off" };
        let driver = if format == Format::Raw { "raw" } else { "qcow2" };
        let child = Command::new("qemu-storage-daemon")
            .args([
                "--blockdev",
                &format!("file,node-name=f0,filename={image},cache.direct={direct}"),
            ])
            .args(["--blockdev", &format!("{driver},node-name=n0,file=f0,cache.direct={direct}")])
            .args([
                "--export",
                &format!("fuse,id=e,node-name=n0,mountpoint={},writable=on", at("disk")),
            ])
            .args(["--chardev", &format!("socket,id=q,path={},server=on,wait=off", at("qmp"))])
            .args(["--monitor", "chardev=q"])
            .stdin(Stdio::null())
            .spawn()
            .context("start qemu-storage-daemon (Debian: qemu-utils)")?;
        let qmp = connect(&dir_path.join("qmp"))?;
        Ok(Self { child, qmp, top: "n0".to_owned(), snapshots: 0, export, dir })
    }

    /// The file that it serves.
    #[must_use]
    pub fn export(&self) -> &Path {
        &self.export
    }

    /// Takes an external snapshot; returns how long the call took.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn snapshot(&mut self) -> anyhow::Result<Duration> {
        self.snapshots += 1;
        let overlay = format!("n{}", self.snapshots);
        let file = self.dir.path().join(format!("{overlay}.qcow2"));
        let arguments = json!({
            "node-name": self.top, "snapshot-file": std::path::absolute(file)?,
            "snapshot-node-name": overlay, "format": "qcow2",
        });
        let took = self.timed("blockdev-snapshot-sync", arguments)?;
        self.top = overlay;
        Ok(took)
    }

    /// Takes an internal snapshot, inside the qcow2 file; returns how long the call took.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn internal_snapshot(&mut self) -> anyhow::Result<Duration> {
        self.snapshots += 1;
        let name = format!("s{}", self.snapshots);
        self.timed("blockdev-snapshot-internal-sync", json!({"device": self.top, "name": name}))
    }

    fn timed(&mut self, command: &str, arguments: Value) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.qmp.ask(command, arguments)?;
        Ok(start.elapsed())
    }
}

/// It listens a moment after it was started.
pub(super) fn connect(path: &Path) -> anyhow::Result<Qmp> {
    let start = Instant::now();
    loop {
        match Qmp::connect(path) {
            Err(_) if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(20)),
            connected => return connected.context("connect to QEMU"),
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        if self.qmp.ask("quit", Value::Null).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
