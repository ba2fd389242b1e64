//! One process, and how to start it again.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::daemon::Daemon;
use crate::network::Host;

#[derive(Debug)]
pub(super) struct Role {
    /// `None` while it is killed.
    pub(super) daemon: Option<Daemon>,
    pub(super) host: Host,
    pub(super) log: PathBuf,
    args: Vec<String>,
}

impl Role {
    /// Starts `blobcr ARGS`, with its log at `NAME.log` in `dir`.
    pub(super) fn start(dir: &Path, name: &str, host: Host, args: Vec<String>) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let mut role = Self { daemon: None, host, log, args };
        role.restart()?;
        Ok(role)
    }

    pub(super) fn restart(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "it runs already");
        self.daemon = Some(self.host.enter(|| Daemon::start(&self.args, &self.log))??);
        Ok(())
    }

    pub(super) fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("it does not run")?.kill()
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        self.daemon.as_ref().context("it does not run")?.signal(signal)
    }

    pub(super) fn stop(&mut self) -> Result<()> {
        self.daemon.take().context("it does not run")?.stop(Signal::TERM)
    }

    /// Where it serves, whether it runs or not.
    pub(super) fn address(&self) -> String {
        self.host.address(0).to_string()
    }
}
