//! The roles as processes of their own, each of which can be stopped, killed, cut off, and started
//! again.

mod plan;
mod role;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

pub use self::plan::Plan;
use self::role::Role;
use crate::cluster::{Ran, json, mounts_below, run};
use crate::daemon::wait_until;
use crate::etcd::Etcd;
use crate::network::{Host, Network};

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// A member of the etcd.
    Etcd(usize),
    /// A metadata server.
    Metadata(usize),
    /// A repository node.
    Node(usize),
    /// A mirror.
    Mirror(usize),
    /// The proxy of the mirror with that number.
    Proxy(usize),
}

/// How a process is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// It is there and does not answer.
    Paused,
    /// It is not there.
    Killed,
    /// It is there, and nothing that is sent to it or by it arrives.
    CutOff,
}

/// Metadata servers, nodes and mirrors. Nothing of them is left when they are dropped. Must be started
/// and kept by one thread, as [`Etcd`] must.
#[derive(Debug)]
pub struct Roles {
    // In the order in which they end: mirrors need the others to end at once.
    proxies: Vec<Role>,
    mirrors: Vec<Role>,
    steward: Option<Role>,
    nodes: Vec<Role>,
    metadata: Vec<Role>,
    etcd: Option<Etcd>,
    away: Vec<(Which, Outage)>,
    network: Network,
    log: Option<String>,
    dir: TempDir,
}

impl Roles {
    /// The arguments of a role that serves.
    fn arguments(&self, role: &str, host: &Host, more: &[(&str, &str)]) -> Vec<String> {
        let address = host.address(0).to_string();
        let log = self.log.iter().map(|filter| ("--log", &**filter));
        let options = [("--listen", &*address)].into_iter().chain(log).chain(more.iter().copied());
        let options = options.flat_map(|(option, value)| [option, value]);
        std::iter::once(role).chain(options).map(str::to_owned).collect()
    }

    /// Starts what is planned. `prepare` is called with the directory first, to mount something at
    /// `metadata1`, `repo-node1`, `mirror1` … in it; it is unmounted at the end.
    ///
    /// # Errors
    /// When one is not ready in time.
    pub fn start(plan: &Plan, prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("blobcr-roles-").tempdir()?;
        prepare(dir.path())?;
        let mut network = if plan.isolated { Network::isolated()? } else { Network::loopback() };
        let etcd = match plan.etcd {
            0 => None,
            members => {
                let hosts = (0..members).map(|_| network.host()).collect::<Result<_>>()?;
                Some(Etcd::start_on(hosts)?)
            }
        };
        let (proxies, mirrors) = (Vec::new(), Vec::new());
        let (nodes, metadata, away) = (Vec::new(), Vec::new(), Vec::new());
        // What was started ends with it when the next one does not start.
        let log = plan.log.clone();
        let mut roles = Self {
            proxies,
            mirrors,
            steward: None,
            nodes,
            metadata,
            etcd,
            away,
            network,
            log,
            dir,
        };
        for number in 0..plan.metadata {
            roles.start_metadata(plan, number)?;
        }
        for number in 0..plan.nodes {
            roles.start_node(number)?;
        }
        for number in 0..plan.mirrors {
            roles.start_mirror(number)?;
            if plan.proxies {
                roles.start_proxy(number)?;
            }
        }
        if plan.steward {
            let args = ["steward", "--metadata", &roles.servers(0)].map(str::to_owned).to_vec();
            let host = roles.network.host()?;
            roles.steward = Some(Role::start(roles.dir.path(), "steward", host, args)?);
        }
        Ok(roles)
    }

    fn path(&self, name: &str, number: usize) -> PathBuf {
        self.dir.path().join(format!("{name}{}", number + 1))
    }

    fn start_metadata(&mut self, plan: &Plan, number: usize) -> Result<()> {
        let host = self.network.host()?;
        let (down_after, own) = (plan.node_down_after.to_string(), self.path("metadata", number));
        let store = match &self.etcd {
            Some(etcd) => ("--store", etcd.target_from(number, "repo")),
            None => ("--dir", own.to_string_lossy().into_owned()),
        };
        let more = [("--pool", &*plan.pool), ("--node-down-after", &down_after)];
        let args = self.arguments("metadata", &host, &[&more[..], &[(store.0, &store.1)]].concat());
        let name = format!("metadata{}", number + 1);
        self.metadata.push(Role::start(self.dir.path(), &name, host, args)?);
        Ok(())
    }

    fn start_node(&mut self, number: usize) -> Result<()> {
        let host = self.network.host()?;
        let own = self.path("repo-node", number);
        let more = [("--metadata", &*self.servers(number)), ("--dir", &own.to_string_lossy())];
        let args = self.arguments("repo-node", &host, &more);
        let name = format!("repo-node{}", number + 1);
        self.nodes.push(Role::start(self.dir.path(), &name, host, args)?);
        Ok(())
    }

    fn start_mirror(&mut self, number: usize) -> Result<()> {
        let host = self.network.host()?;
        let (own, mount) = (self.path("mirror", number), self.mount(number));
        let more = [
            ("--metadata", &*self.servers(number)),
            ("--dir", &own.to_string_lossy()),
            ("--mount", &mount.to_string_lossy()),
        ];
        let args = self.arguments("mirror", &host, &more);
        let name = format!("mirror{}", number + 1);
        self.mirrors.push(Role::start(self.dir.path(), &name, host, args)?);
        Ok(())
    }

    fn start_proxy(&mut self, number: usize) -> Result<()> {
        let host = self.network.host()?;
        let own = self.path("proxy", number);
        let (guests, mirror) = (host.address(1).to_string(), self.mirrors[number].address());
        let more =
            [("--mirror", &*mirror), ("--sockets", &own.to_string_lossy()), ("--guests", &guests)];
        let args = self.arguments("proxy", &host, &more);
        let name = format!("proxy{}", number + 1);
        self.proxies.push(Role::start(self.dir.path(), &name, host, args)?);
        Ok(())
    }

    /// The addresses of all metadata servers, another one first for each `number`.
    #[must_use]
    pub fn servers(&self, number: usize) -> String {
        let (before, after) = self.metadata.split_at(number % self.metadata.len());
        let all: Vec<_> = after.iter().chain(before).map(Role::address).collect();
        all.join(",")
    }

    fn role(&self, which: Which) -> Result<&Role> {
        let found = match which {
            Which::Etcd(_) => bail!("a member of the etcd is none of ours"),
            Which::Metadata(number) => self.metadata.get(number),
            Which::Node(number) => self.nodes.get(number),
            Which::Mirror(number) => self.mirrors.get(number),
            Which::Proxy(number) => self.proxies.get(number),
        };
        found.with_context(|| format!("there is no {which:?}"))
    }

    fn role_mut(&mut self, which: Which) -> Result<&mut Role> {
        let found = match which {
            Which::Etcd(_) => bail!("a member of the etcd is none of ours"),
            Which::Metadata(number) => self.metadata.get_mut(number),
            Which::Node(number) => self.nodes.get_mut(number),
            Which::Mirror(number) => self.mirrors.get_mut(number),
            Which::Proxy(number) => self.proxies.get_mut(number),
        };
        found.with_context(|| format!("there is no {which:?}"))
    }

    fn etcd(&mut self) -> Result<&mut Etcd> {
        self.etcd.as_mut().context("there is no etcd")
    }

    /// Where a process lives.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn host(&self, which: Which) -> Result<&Host> {
        match which {
            Which::Etcd(at) => Ok(self.etcd.as_ref().context("there is no etcd")?.host(at)),
            _ => Ok(&self.role(which)?.host),
        }
    }

    fn signal(&mut self, which: Which, signal: Signal) -> Result<()> {
        match which {
            Which::Etcd(at) => self.etcd()?.signal(at, signal),
            _ => self.role(which)?.signal(signal),
        }
    }

    /// Takes a process away.
    ///
    /// # Errors
    /// When it is away already.
    pub fn take_away(&mut self, which: Which, outage: Outage) -> Result<()> {
        ensure!(self.away.iter().all(|(away, _)| *away != which), "{which:?} is away already");
        match (outage, which) {
            (Outage::Paused, _) => self.signal(which, Signal::STOP),
            (Outage::Killed, Which::Etcd(at)) => self.etcd()?.kill(at),
            (Outage::Killed, _) => self.role_mut(which)?.kill(),
            (Outage::CutOff, _) => self.network.cut_off(self.host(which)?),
        }?;
        self.away.push((which, outage));
        Ok(())
    }

    /// Brings it back, at the address and with the directory that it had.
    ///
    /// # Errors
    /// When it is not away, or not ready in time.
    pub fn bring_back(&mut self, which: Which) -> Result<()> {
        let at = self.away.iter().position(|(away, _)| *away == which);
        let at = at.with_context(|| format!("{which:?} is not away"))?;
        match (self.away[at].1, which) {
            (Outage::Paused, _) => self.signal(which, Signal::CONT),
            (Outage::Killed, Which::Etcd(at)) => self.etcd()?.restart(at),
            (Outage::Killed, _) => self.role_mut(which)?.restart(),
            (Outage::CutOff, _) => self.network.join(self.host(which)?),
        }?;
        self.away.swap_remove(at);
        Ok(())
    }

    /// Removes all that a killed node has on its disk: it comes back as another one.
    ///
    /// # Errors
    /// When it was not killed.
    pub fn wipe(&self, node: usize) -> Result<()> {
        let killed = self.away.contains(&(Which::Node(node), Outage::Killed));
        ensure!(killed, "a node that runs cannot be wiped");
        Ok(fs::remove_dir_all(self.path("repo-node", node))?)
    }

    /// Which node this is, as the repository knows it.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn node_id(&self, node: usize) -> Result<String> {
        let address = self.role(Which::Node(node))?.address();
        let listed = self.json_from(Which::Metadata(0), &["node", "list"])?;
        let at_address = |one: &&Value| one["address"] == *address && one["state"] == "up";
        let found = listed.as_array().context("no list")?.iter().find(at_address);
        let id = found.and_then(|one| one["node"].as_str());
        Ok(id.with_context(|| format!("no node at {address} is up: {listed}"))?.to_owned())
    }

    /// From now on no more reaches a process than so many megabits a second.
    ///
    /// # Errors
    /// When the processes have no networks of their own.
    pub fn limit(&self, which: Which, megabits: u32) -> Result<()> {
        self.network.limit(self.host(which)?, megabits)
    }

    /// Runs a verb, asked of that process and from where it lives.
    ///
    /// # Errors
    /// When it does not start.
    pub fn run(&self, asked: Which, args: &[&str]) -> Result<Ran> {
        let role = self.role(asked)?;
        role.host.enter(|| run(role.address().as_ref(), args))?
    }

    /// The JSON that a verb prints, asked of that process.
    ///
    /// # Errors
    /// When it fails.
    pub fn json_from(&self, asked: Which, args: &[&str]) -> Result<Value> {
        let role = self.role(asked)?;
        role.host.enter(|| json(role.address().as_ref(), args))?
    }

    /// The same, asked of the first mirror.
    ///
    /// # Errors
    /// When it fails.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        self.json_from(Which::Mirror(0), args)
    }

    /// Attaches `source` as `disk` on a mirror and returns the path of its raw file.
    ///
    /// # Errors
    /// When the verb fails.
    pub fn attach(&self, mirror: usize, source: &str, disk: &str) -> Result<PathBuf> {
        let attached = self.json_from(Which::Mirror(mirror), &["disk", "attach", source, disk])?;
        Ok(attached["path"].as_str().context("no path")?.into())
    }

    /// Where a mirror shows images and disks.
    #[must_use]
    pub fn mount(&self, mirror: usize) -> PathBuf {
        self.path("mnt", mirror)
    }

    /// The directory that holds those of all roles.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Role> {
        let Self { proxies, mirrors, steward, nodes, metadata, .. } = self;
        let host = proxies.iter_mut().chain(mirrors);
        host.chain(steward).chain(nodes).chain(metadata)
    }

    /// Stops all of them, and asserts that they do so without complaint.
    ///
    /// # Errors
    /// When one does not end, or a mount is left.
    pub fn stop(mut self) -> Result<()> {
        for role in self.all_mut() {
            role.stop().with_context(|| format!("stop {}", role.log.display()))?;
        }
        let mounts = mounts_below(self.dir.path())?;
        let left: Vec<_> = (0..self.mirrors.len()).map(|at| self.mount(at)).collect();
        ensure!(!mounts.iter().any(|mount| left.contains(mount)), "a mount is left: {mounts:?}");
        Ok(())
    }

    /// What one of them said.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn log_of(&self, which: Which) -> Result<String> {
        Ok(fs::read_to_string(&self.role(which)?.log)?)
    }

    /// The process that it is now.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self, which: Which) -> Result<u32> {
        Ok(self.role(which)?.daemon.as_ref().context("it does not run")?.pid())
    }

    /// What all of them said.
    #[must_use]
    pub fn log(&self) -> String {
        let host = self.proxies.iter().chain(&self.mirrors);
        let all = host.chain(&self.steward).chain(&self.nodes).chain(&self.metadata);
        let read = |log: &PathBuf| fs::read_to_string(log).unwrap_or_default();
        let logs = all.map(|role| format!("--- {}\n{}", role.log.display(), read(&role.log)));
        logs.chain(self.etcd.as_ref().map(Etcd::log)).collect()
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
        for role in self.all_mut() {
            role.daemon = None;
        }
        for mount in mounts_below(self.dir.path()).unwrap_or_default() {
            // Detached: the directory below it can be removed whoever uses it.
            let _ = unmount(&mount, UnmountFlags::DETACH);
        }
    }
}
