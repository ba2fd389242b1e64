//! A `blobcr` process that serves until it is told to stop.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How long a role may take to be ready, or to stop: far more than it needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The `blobcr` that was built beside the test's own executable.
///
/// # Errors
/// When it was not built.
pub fn blobcr() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("BLOBCR_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    // target/PROFILE/blobcr-demo, or target/PROFILE/deps/cli_image-0123456789abcdef
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("blobcr")).find(|p| p.is_file());
    found.context(
        "there is no blobcr beside the tests: run them by `./do test`, or `cargo build -p blobcr-cli`",
    )
}

/// Waits until `condition` holds.
///
/// # Errors
/// When it does not within a minute, or cannot be told.
pub fn wait_until(
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while !condition()? {
        ensure!(start.elapsed() < PATIENCE, "still not so after {PATIENCE:?}: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// A running role. Killed on drop.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
    address: String,
}

impl Daemon {
    /// Starts `blobcr ARGS` and waits until it says that it is ready. Its stderr is appended to
    /// `log`.
    ///
    /// # Errors
    /// When it ends, or is not ready within a minute; with what it said.
    pub fn start<S: AsRef<OsStr>>(args: &[S], log: &Path) -> anyhow::Result<Self> {
        let appended = File::options().create(true).append(true).open(log)?;
        let seen = appended.metadata()?.len();
        let child = Command::new(blobcr()?)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(appended)
            .spawn()
            .context("start blobcr")?;
        let mut daemon = Self { child, log: log.to_owned(), address: String::new() };
        let start = Instant::now();
        loop {
            let said = fs::read(log)?;
            let said = String::from_utf8_lossy(said.get(seen as usize..).unwrap_or_default());
            if let Some(address) = ready_address(&said) {
                daemon.address = address.to_owned();
                return Ok(daemon);
            }
            let ended = daemon.child.try_wait()?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
                bail!("blobcr {args:?} is not ready ({ended:?}):\n{said}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Where it serves; empty for a role that serves nobody.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said so far, with what its predecessors on the same log said.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When it does not within a minute; it is killed then.
    pub fn wait(mut self) -> anyhow::Result<ExitStatus> {
        let mut status = None;
        wait_until("the daemon ended", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })
        .with_context(|| self.log())?;
        status.context("no status")
    }

    /// Tells it to stop, and asserts that it does so without complaint.
    ///
    /// # Errors
    /// When it does not end, or ends with another code than 0.
    pub fn stop(self, signal: Signal) -> anyhow::Result<()> {
        self.signal(signal)?;
        let log = self.log.clone();
        let status = self.wait()?;
        ensure!(status.success(), "ended with {status}:\n{}", fs::read_to_string(log)?);
        Ok(())
    }

    /// Kills it as a crash would.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// Empty for a role that serves at none.
fn ready_address(said: &str) -> Option<&str> {
    // The line must be whole, and what a role says itself: parts of it log that they are ready, too.
    let lines = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let mut ready = lines.filter_map(|line| line.strip_prefix("blobcr: ")?.split_once(" is ready"));
    let (_, behind) = ready.next()?;
    behind.trim_end().strip_prefix(" at ").unwrap_or_default().split([',', ' ']).next()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already, or nothing more can be done.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_a_whole_line() {
        // Parts of a role log that they are ready, too.
        assert_eq!(ready_address("INFO proxy: checkpoint proxy is ready dir=/x\n"), None);
        assert_eq!(ready_address("x\nblobcr: up is ready at 1.2.3.4:5, mo"), None);
        let line = "x\nblobcr: up is ready at 1.2.3.4:5, mount /m\n";
        assert_eq!(ready_address(line), Some("1.2.3.4:5"));
        assert_eq!(ready_address("blobcr: steward is ready\n"), Some(""));
    }
}
