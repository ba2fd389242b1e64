//! The roles as processes of their own, each of which can be stopped, killed and started again.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::{json, mounts_below};
use crate::daemon::{Daemon, wait_until};

/// One process and how to start it again.
#[derive(Debug)]
struct Role {
    daemon: Option<Daemon>,
    args: Vec<String>,
    log: PathBuf,
}

impl Role {
    fn start(dir: &Path, name: &str, more: &[&str]) -> Result<Self> {
        let own = dir.join(name).to_string_lossy().into_owned();
        let mut args = vec![name.to_owned(), "--dir".to_owned(), own];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let log = dir.join(format!("{name}.log"));
        let listen = ["--listen".to_owned(), "127.0.0.1:0".to_owned()];
        let first: Vec<_> = args.iter().chain(&listen).collect();
        let daemon = Daemon::start(&first, &log)?;
        // Whoever knows its address must find it there again.
        args.extend(["--listen".to_owned(), daemon.address().to_owned()]);
        Ok(Self { daemon: Some(daemon), args, log })
    }

    fn running(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("it does not run")
    }
}

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The metadata server.
    Metadata,
    /// The one repository node.
    Node,
    /// The mirror.
    Mirror,
}

/// How a process is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// It is there and does not answer.
    Paused,
    /// It is not there.
    Killed,
}

/// A metadata server, a node and a mirror. Nothing of them is left when they are dropped.
#[derive(Debug)]
pub struct Roles {
    // In the order in which they end: the mirror needs the others to end at once.
    mirror: Role,
    node: Role,
    metadata: Role,
    dir: TempDir,
}

impl Roles {
    /// Starts them. `prepare` is called with the directory first, to mount something at
    /// `metadata`, `repo-node` or `mirror` in it; it is unmounted at the end.
    ///
    /// # Errors
    /// When one is not ready in time.
    pub fn start(prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("blobcr-roles-").tempdir()?;
        prepare(dir.path())?;
        let metadata = Role::start(dir.path(), "metadata", &[])?;
        let at = metadata.running()?.address().to_owned();
        let node = Role::start(dir.path(), "repo-node", &["--metadata", &at])?;
        let mount = dir.path().join("mnt").to_string_lossy().into_owned();
        let mirror = Role::start(dir.path(), "mirror", &["--metadata", &at, "--mount", &mount])?;
        Ok(Self { mirror, node, metadata, dir })
    }

    fn role(&mut self, which: Which) -> &mut Role {
        match which {
            Which::Metadata => &mut self.metadata,
            Which::Node => &mut self.node,
            Which::Mirror => &mut self.mirror,
        }
    }

    /// Takes a process away.
    ///
    /// # Errors
    /// When it is away already.
    pub fn take_away(&mut self, which: Which, outage: Outage) -> Result<()> {
        let role = self.role(which);
        match outage {
            Outage::Paused => role.running()?.signal(Signal::STOP),
            Outage::Killed => role.daemon.take().context("it does not run")?.kill(),
        }
    }

    /// Brings it back, at the address and with the directory that it had.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn bring_back(&mut self, which: Which) -> Result<()> {
        let role = self.role(which);
        match &role.daemon {
            Some(paused) => paused.signal(Signal::CONT),
            None => {
                role.daemon = Some(Daemon::start(&role.args, &role.log)?);
                Ok(())
            }
        }
    }

    /// The JSON that a verb prints, asked of the mirror.
    ///
    /// # Errors
    /// When it fails.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        json(self.mirror.running()?.address().as_ref(), args)
    }

    /// Attaches `source` as `disk` and returns the path of its raw file.
    ///
    /// # Errors
    /// When the verb fails.
    pub fn attach(&self, source: &str, disk: &str) -> Result<PathBuf> {
        let attached = self.json(&["disk", "attach", source, disk])?;
        Ok(attached["path"].as_str().context("no path")?.into())
    }

    /// Where images and disks show.
    #[must_use]
    pub fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// The directory that holds those of all roles.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Stops all of them, and asserts that they do so without complaint.
    ///
    /// # Errors
    /// When one does not end, or a mount is left.
    pub fn stop(mut self) -> Result<()> {
        for which in [Which::Mirror, Which::Node, Which::Metadata] {
            let daemon = self.role(which).daemon.take().context("it does not run")?;
            daemon.stop(Signal::TERM).with_context(|| format!("stop {which:?}"))?;
        }
        ensure!(!mounts_below(self.dir.path())?.contains(&self.mount()), "the mount is left");
        Ok(())
    }

    /// What all of them said.
    #[must_use]
    pub fn log(&self) -> String {
        let logs = [&self.metadata.log, &self.node.log, &self.mirror.log];
        let read = |log: &&PathBuf| std::fs::read_to_string(log).unwrap_or_default();
        logs.iter().map(|log| format!("--- {}\n{}", log.display(), read(log))).collect()
    }

    /// Waits until a snapshot is stable.
    ///
    /// # Errors
    /// When it fails, or is not stable within a minute.
    pub fn wait_stable(&self, snapshot: &str) -> Result<()> {
        let (image, number) = snapshot.split_once('@').context("not IMAGE@N")?;
        let number: u64 = number.parse()?;
        wait_until(&format!("{snapshot} is stable"), || {
            let list = self.json(&["snapshot", "list", image])?;
            let all = list.as_array().context("no list")?;
            // Its host may have yet to announce it.
            let found = all.iter().find(|one| one["snapshot"] == number);
            let Some(found) = found else { return Ok(false) };
            ensure!(found["state"] != "failed", "{found}");
            Ok(found["state"] == "stable")
        })
        .with_context(|| self.log())
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        for which in [Which::Mirror, Which::Node, Which::Metadata] {
            self.role(which).daemon = None;
        }
        for mount in mounts_below(self.dir.path()).unwrap_or_default() {
            // Detached: the directory below it can be removed whoever uses it.
            let _ = unmount(&mount, UnmountFlags::DETACH);
        }
    }
}
