//! The alternative: a qcow2 file served by `qemu-storage-daemon` through FUSE, with external
//! snapshots taken over QMP.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blobcr_tests::qmp::Qmp;
use serde_json::{Value, json};

/// How long the daemon may take to be ready.
const LIMIT: Duration = Duration::from_secs(60);

/// A running `qemu-storage-daemon`. Ended and its files deleted on drop.
#[derive(Debug)]
pub struct Qcow2 {
    child: Child,
    qmp: Qmp,
    file: Option<File>,
    top: String,
    snapshots: usize,
    /// Field order: the directory goes last.
    dir: tempfile::TempDir,
}

impl Qcow2 {
    /// Makes an empty qcow2 file of `size` bytes below `parent` and serves it.
    ///
    /// # Errors
    /// When `qemu-img` or `qemu-storage-daemon` (Debian: qemu-utils) fail.
    pub fn start(parent: &Path, size: u64) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("qcow2-").tempdir_in(parent)?;
        let dir_path = std::fs::canonicalize(dir.path())?;
        let at = |name: &str| dir_path.join(name).display().to_string();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", &at("base.qcow2"), &size.to_string()])
            .status()
            .context("run qemu-img (Debian: qemu-utils)")?;
        ensure!(made.success(), "qemu-img create failed");
        File::create(at("disk"))?;
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("file,node-name=f0,filename={}", at("base.qcow2"))])
            .args(["--blockdev", "qcow2,node-name=n0,file=f0"])
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
        let mut qcow2 = Self { child, qmp, file: None, top: "n0".to_owned(), snapshots: 0, dir };
        qcow2.file = Some(OpenOptions::new().write(true).open(dir_path.join("disk"))?);
        Ok(qcow2)
    }

    /// Writes through the daemon's FUSE export.
    ///
    /// # Errors
    /// When the write fails.
    pub fn write(&self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        let file = self.file.as_ref().context("the export is not open")?;
        Ok(file.write_all_at(data, offset)?)
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
        let start = Instant::now();
        self.qmp.ask("blockdev-snapshot-sync", arguments)?;
        let took = start.elapsed();
        self.top = overlay;
        Ok(took)
    }
}

/// It listens a moment after it was started.
fn connect(path: &Path) -> anyhow::Result<Qmp> {
    let start = Instant::now();
    loop {
        match Qmp::connect(path) {
            Err(_) if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(20)),
            connected => return connected.context("connect to qemu-storage-daemon"),
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        self.file = None;
        if self.qmp.ask("quit", Value::Null).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
