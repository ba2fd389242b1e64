//! An etcd of one or several members on loopback. Nothing of it is left when it is dropped.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::statvfs;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::daemon::wait_until;
use crate::network::{Host, Network};

/// Where files cost no sync of a disk: an etcd on the disk of a busy machine is slow beyond measure.
const IN_MEMORY: &str = "/dev/shm";
/// Room that it needs there: etcd takes 64 MiB for each member's log at once, and keeps another.
const ROOM_BYTES: u64 = 1 << 30;
/// Of each member's host.
const CLIENT_PORT: u16 = 0;
const PEER_PORT: u16 = 1;
/// A member that answers does so within this.
const ANSWER: Duration = Duration::from_secs(2);

/// One process.
#[derive(Debug)]
struct Member {
    name: String,
    host: Host,
    child: Option<Child>,
}

impl Member {
    fn client(&self) -> SocketAddr {
        self.host.address(CLIENT_PORT)
    }

    fn peer(&self) -> SocketAddr {
        self.host.address(PEER_PORT)
    }
}

/// See the module. Must be started and kept by the thread of the test: the members end when the thread
/// that started them does, however the test ends.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    dir: TempDir,
}

/// Whether the member says that it can serve, which needs a leader.
fn is_healthy(at: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains(r#""health":"true""#))
}

impl Etcd {
    /// Starts it, and waits until every member serves.
    ///
    /// # Errors
    /// When etcd is not installed, or does not start.
    pub fn start(members: usize) -> Result<Self> {
        let mut network = Network::loopback();
        Self::start_on((0..members).map(|_| network.host()).collect::<Result<_>>()?)
    }

    /// The same, with a member on each of these hosts.
    ///
    /// # Errors
    /// When etcd is not installed, or does not start.
    pub fn start_on(hosts: Vec<Host>) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("blobcr-etcd-");
        let in_memory = Path::new(IN_MEMORY);
        let room = statvfs(in_memory).map_or(0, |there| there.f_bavail * there.f_frsize);
        let dir = match room {
            0..ROOM_BYTES => builder.tempdir(),
            _ => builder.tempdir_in(in_memory),
        }?;
        let member = |(number, host)| Member { name: format!("m{number}"), host, child: None };
        let members = (1..).zip(hosts).map(member).collect();
        let mut etcd = Self { members, dir };
        for at in 0..etcd.members.len() {
            etcd.spawn(at)?;
        }
        for at in 0..etcd.members.len() {
            etcd.wait_healthy(at)?;
        }
        Ok(etcd)
    }

    fn spawn(&mut self, at: usize) -> Result<()> {
        let url = |address: SocketAddr| format!("http://{address}");
        let cluster: Vec<String> =
            self.members.iter().map(|m| format!("{}={}", m.name, url(m.peer()))).collect();
        let log = File::options().create(true).append(true).open(self.log_of(at))?;
        let member = &mut self.members[at];
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "etcd", "--name", &member.name]);
        command.arg("--data-dir").arg(self.dir.path().join(&member.name));
        for (option, value) in [
            ("--listen-client-urls", url(member.client())),
            ("--advertise-client-urls", url(member.client())),
            ("--listen-peer-urls", url(member.peer())),
            ("--initial-advertise-peer-urls", url(member.peer())),
            ("--initial-cluster", cluster.join(",")),
        ] {
            command.args([option, &value]);
        }
        // Options in the environment would win over none, and refuse some.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = member.host.enter(|| command.spawn())?;
        member.child = Some(child.context("start etcd under setpriv")?);
        Ok(())
    }

    fn log_of(&self, at: usize) -> PathBuf {
        self.dir.path().join(format!("{}.log", self.members[at].name))
    }

    fn wait_healthy(&mut self, at: usize) -> Result<()> {
        let log = self.log_of(at);
        let member = &mut self.members[at];
        wait_until("an etcd member serves", || {
            let child = member.child.as_mut().context("it does not run")?;
            if let Some(status) = child.try_wait()? {
                let said = fs::read_to_string(&log).unwrap_or_default();
                bail!("etcd ended with {status}; tests/setup.sh installs it:\n{said}");
            }
            member.host.enter(|| is_healthy(member.client()))
        })
    }

    /// Where a member lives.
    #[must_use]
    pub fn host(&self, at: usize) -> &Host {
        &self.members[at].host
    }

    /// How many members it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// What `--store` takes, for the repository `name`.
    #[must_use]
    pub fn target(&self, name: &str) -> String {
        self.target_from(0, name)
    }

    /// The same, with the member `first` before the others.
    #[must_use]
    pub fn target_from(&self, first: usize, name: &str) -> String {
        let (before, after) = self.members.split_at(first % self.members.len());
        let members = after.iter().chain(before);
        let urls: Vec<String> = members.map(|m| format!("http://{}", m.client())).collect();
        format!("etcd:{}#{name}", urls.join(","))
    }

    /// Kills a member as a crash would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, at: usize) -> Result<()> {
        let mut child = self.members[at].child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts a member again that was killed, and waits until it serves.
    ///
    /// # Errors
    /// When it runs, or does not start.
    pub fn restart(&mut self, at: usize) -> Result<()> {
        ensure!(self.members[at].child.is_none(), "it runs already");
        self.spawn(at)?;
        self.wait_healthy(at)
    }

    /// Sends a member a signal.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, at: usize, signal: Signal) -> Result<()> {
        let child = self.members[at].child.as_ref().context("it does not run")?;
        match kill_process(Pid::from_child(child), signal).map_err(std::io::Error::from) {
            Err(e) if e.kind() == ErrorKind::NotFound => bail!("it has ended"),
            done => Ok(done?),
        }
    }

    /// The value of a key, asked past all of our own code.
    ///
    /// # Errors
    /// When it has none, or one that is no text.
    pub fn value(&self, key: &str) -> Result<String> {
        let printed = self.etcdctl(&["get", "--print-value-only", key])?;
        let value = printed.strip_suffix('\n').context("it has no value")?;
        Ok(value.to_owned())
    }

    /// Gives a key a value, past all of our own code.
    ///
    /// # Errors
    /// When etcd refuses it.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.etcdctl(&["put", key, value]).map(drop)
    }

    fn etcdctl(&self, args: &[&str]) -> Result<String> {
        let member = self.members.first().context("no member")?;
        let at = member.client().to_string();
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &at]).args(args);
        let ran = member.host.enter(|| command.output())?.context("start etcdctl")?;
        ensure!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        Ok(String::from_utf8(ran.stdout)?)
    }

    /// What the members said.
    #[must_use]
    pub fn log(&self) -> String {
        let read = |at| fs::read_to_string(self.log_of(at)).unwrap_or_default();
        (0..self.members.len())
            .map(|at| format!("--- {}\n{}", self.members[at].name, read(at)))
            .collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            // Ended already, or nothing more can be done.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
