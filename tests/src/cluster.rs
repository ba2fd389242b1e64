//! A `blobcr up` in a directory of its own, and the command that talks to it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::{Daemon, blobcr};

/// What a verb did.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// Its data.
    pub stdout: String,
    /// The rest.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs `blobcr ARGS` against `endpoint`.
///
/// # Errors
/// When it does not start.
pub fn run<S: AsRef<OsStr>>(endpoint: &OsStr, args: &[S]) -> anyhow::Result<Ran> {
    Ok(command(endpoint, args)?.output().context("start blobcr")?.into())
}

/// `blobcr ARGS` against `endpoint`, ready to start.
///
/// # Errors
/// When it was not built.
pub fn command<S: AsRef<OsStr>>(endpoint: &OsStr, args: &[S]) -> anyhow::Result<Command> {
    let mut command = Command::new(blobcr()?);
    command.args(args).env("BLOBCR_ENDPOINT", endpoint).stdin(Stdio::null());
    Ok(command)
}

/// The JSON that a verb prints.
///
/// # Errors
/// When it fails, or prints something else.
pub fn json<S: AsRef<OsStr>>(endpoint: &OsStr, args: &[S]) -> anyhow::Result<Value> {
    let shown: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let words = std::iter::once(OsStr::new("--json")).chain(shown.iter().copied());
    let ran = run(endpoint, &words.collect::<Vec<_>>())?;
    ensure!(ran.code == 0, "blobcr {shown:?} ended with {}: {}", ran.code, ran.stderr);
    serde_json::from_str(&ran.stdout).with_context(|| format!("{shown:?} printed {:?}", ran.stdout))
}

/// A repository with one mirror and one proxy in one process. Nothing of it is left when it is
/// dropped.
#[derive(Debug)]
pub struct Cluster {
    daemon: Option<Daemon>,
    args: Vec<String>,
    scratch: TempDir,
}

impl Cluster {
    /// Starts `blobcr up --dir DIR ARGS` in a new directory.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn start(args: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(tempfile::Builder::new().prefix("blobcr-test-").tempdir()?, args)
    }

    /// The same in a directory that the caller made, on a file system of its choice.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn start_in(scratch: TempDir, args: &[&str]) -> anyhow::Result<Self> {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let mut cluster = Self { daemon: None, args, scratch };
        cluster.restart()?;
        Ok(cluster)
    }

    /// Starts it again after [`Self::stop`] or [`Self::kill`].
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        ensure!(self.daemon.is_none(), "it runs already");
        let dir = self.dir();
        let mut args: Vec<&OsStr> = vec!["up".as_ref(), "--dir".as_ref(), dir.as_ref()];
        args.extend(self.args.iter().map(OsStr::new));
        self.daemon = Some(Daemon::start(&args, &self.log_path())?);
        Ok(())
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("up.log")
    }

    /// What the daemons said so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The directory of the `blobcr up`; also its endpoint.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.scratch.path().join("up")
    }

    /// Where images and disks show.
    #[must_use]
    pub fn mount(&self) -> PathBuf {
        self.dir().join("mnt")
    }

    /// A directory for files of the test, on the same file system.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The running daemon.
    ///
    /// # Errors
    /// When it was stopped.
    pub fn daemon(&self) -> anyhow::Result<&Daemon> {
        self.daemon.as_ref().context("it does not run")
    }

    /// Runs a verb.
    ///
    /// # Errors
    /// When it does not start.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<Ran> {
        run(self.dir().as_os_str(), args)
    }

    /// A verb, ready to start.
    ///
    /// # Errors
    /// When the binary was not built.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<Command> {
        command(self.dir().as_os_str(), args)
    }

    /// Runs a verb that must succeed, with `--json`.
    ///
    /// # Errors
    /// When it fails, or prints something else.
    pub fn json<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<Value> {
        json(self.dir().as_os_str(), args)
    }

    /// Imports a file as an image.
    ///
    /// # Errors
    /// When the verb fails.
    pub fn import(&self, file: &Path, image: &str) -> anyhow::Result<Value> {
        self.json::<&OsStr>(&["image".as_ref(), "import".as_ref(), file.as_ref(), image.as_ref()])
    }

    /// Attaches `source` as `disk` and returns the path of its raw file.
    ///
    /// # Errors
    /// When the verb fails.
    pub fn attach(&self, source: &str, disk: &str) -> anyhow::Result<PathBuf> {
        let attached = self.json(&["disk", "attach", source, disk])?;
        Ok(attached["path"].as_str().context("no path")?.into())
    }

    /// Stops it, and asserts that it left nothing mounted and nothing running.
    ///
    /// # Errors
    /// When it does not stop, or leaves something.
    pub fn stop(&mut self, signal: Signal) -> anyhow::Result<()> {
        self.daemon.take().context("it does not run")?.stop(signal)?;
        ensure!(!self.dir().join("endpoint").exists(), "the endpoint file is still there");
        self.check_nothing_left()
    }

    /// Kills it as a crash would. The mount stays, and is dead.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.daemon.take().context("it does not run")?.kill()
    }

    /// Asserts that nothing below the test's directory is mounted and that no process names it.
    ///
    /// # Errors
    /// What is left.
    pub fn check_nothing_left(&self) -> anyhow::Result<()> {
        let mounts = mounts_below(self.scratch())?;
        ensure!(mounts.is_empty(), "still mounted: {mounts:?}\n{}", self.log());
        let processes = processes_naming(self.scratch())?;
        ensure!(processes.is_empty(), "still running: {processes:?}");
        Ok(())
    }
}

impl Drop for Cluster {
    #[expect(clippy::print_stderr, reason = "a failing test shows what the daemon said")]
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            // A test that ends without a stop of its own may still have files open on the mount.
            let stopped = daemon.stop(Signal::TERM);
            if let (Err(e), false) = (stopped, std::thread::panicking()) {
                eprintln!("blobcr up did not stop: {e:#}");
            }
        }
        for mount in mounts_below(self.scratch.path()).unwrap_or_default() {
            // Detached: the directory below it can be removed whoever uses it.
            let _ = unmount(&mount, UnmountFlags::DETACH);
        }
        if std::thread::panicking() {
            eprintln!("--- what blobcr up said\n{}---", self.log());
        }
    }
}

/// Mount points below `dir`.
///
/// # Errors
/// When the system does not tell.
pub fn mounts_below(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// The command lines of processes that name `dir`, without this one.
///
/// # Errors
/// When the system does not tell.
pub fn processes_naming(dir: &Path) -> anyhow::Result<Vec<String>> {
    let name = dir.to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_string_lossy().parse::<u32>();
        if pid.is_err() || pid == Ok(std::process::id()) {
            continue;
        }
        // A process that ends meanwhile is none.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&*name) {
            found.push(line);
        }
    }
    Ok(found)
}
