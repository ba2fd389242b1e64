//! A repository of the benchmark's own: `blobcr up` as a process, in a directory that goes away.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long `blobcr up` may take to be ready, or to stop.
const START_STOP_LIMIT: Duration = Duration::from_secs(30);

/// A running repository with one mirror. Stopped, unmounted and deleted on drop.
#[derive(Debug)]
pub struct Up {
    binary: PathBuf,
    child: Child,
    /// Field order: the directory goes last.
    dir: tempfile::TempDir,
}

/// The `blobcr` beside the benchmark's own executable.
///
/// # Errors
/// When it was not built.
pub fn blobcr_binary() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.parent().context("the executable has no directory")?.join("blobcr");
    ensure!(
        beside.exists(),
        "{} is missing: build it in the same profile (cargo build --release -p blobcr-cli)",
        beside.display()
    );
    Ok(beside)
}

impl Up {
    /// Starts `blobcr up` with `arguments` in a new directory below `parent`.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn start(parent: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let binary = blobcr_binary()?;
        let dir = tempfile::Builder::new().prefix("blobcr-bench-").tempdir_in(parent)?;
        let log = File::create(dir.path().join("log"))?;
        let child = Command::new(&binary)
            .args(["up", "--dir"])
            .arg(dir.path().join("up"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start blobcr up")?;
        let mut up = Self { binary, child, dir };
        up.wait_ready()?;
        Ok(up)
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        while !self.endpoint().join("endpoint").exists() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || start.elapsed() > START_STOP_LIMIT {
                let log = std::fs::read_to_string(self.dir.path().join("log"))?;
                bail!("blobcr up is not ready ({ended:?}):\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What `BLOBCR_ENDPOINT` is for it.
    #[must_use]
    pub fn endpoint(&self) -> PathBuf {
        self.dir.path().join("up")
    }

    /// A directory beside it, on the same file system.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Process id of the daemon.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a verb and returns its JSON.
    ///
    /// # Errors
    /// When the verb fails.
    pub fn verb(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = Command::new(&self.binary)
            .arg("--json")
            .args(arguments)
            .env("BLOBCR_ENDPOINT", self.endpoint())
            .output()
            .with_context(|| format!("run blobcr {arguments:?}"))?;
        ensure!(
            output.status.success(),
            "blobcr {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).with_context(|| format!("JSON of {arguments:?}"))
    }

    /// Imports a sparse file of zeros as `image`, attaches it as `disk`, and returns its path.
    ///
    /// # Errors
    /// When a verb fails.
    pub fn attach_empty(&self, image: &str, disk: &str, size: u64) -> anyhow::Result<PathBuf> {
        let raw = self.scratch().join(format!("{image}.raw"));
        File::create(&raw)?.set_len(size)?;
        let raw = raw.to_str().context("the directory's name is no UTF-8")?;
        self.verb(&["image", "import", raw, image])?;
        let attached = self.verb(&["disk", "attach", image, disk])?;
        Ok(attached["path"].as_str().context("no path in the attached disk")?.into())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) else { return };
        // The daemon may have ended by itself; then there is nothing to stop.
        let _ = kill_process(pid, Signal::TERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if start.elapsed() > START_STOP_LIMIT {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
