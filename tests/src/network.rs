//! Where the processes of a test live: each at an address of its own, either of loopback or in a
//! network namespace that is joined to the others' by a bridge.
//!
//! The namespaces have no names, and the bridge is in one of them too. So the host's own network is
//! never touched, and all of it is gone when the last process that uses it is, however the test ends.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// The network of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";
/// What is between two networks of one process on loopback, whose ports must differ.
const PORTS: u16 = 20;
/// Below the ports that connections take by themselves.
const FIRST_PORT: u16 = 2000;
/// Of one network of namespaces, each of which knows all others.
const HOSTS_MAX: u8 = 40;
/// Of one network on loopback.
const ADDRESSES_MAX: u8 = 250;

/// A network namespace.
#[derive(Debug)]
struct Namespace(File);

impl Namespace {
    fn new() -> Result<Self> {
        // A thread of its own: the others stay where they are.
        let made = std::thread::spawn(|| -> Result<File> {
            // SAFETY: only the network is unshared, no table of files.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                .context("make a network namespace; the tests that cut processes off need root")?;
            Ok(File::open(OWN)?)
        });
        Ok(Self(made.join().expect("it does not panic")?))
    }

    /// Does something, or starts something, in this namespace.
    fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        struct Back(File);
        impl Drop for Back {
            fn drop(&mut self) {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(self.0.as_fd(), network)
                    .expect("a thread may go back to where it came from");
            }
        }
        let back = Back(File::open(OWN)?);
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
        let done = work();
        drop(back);
        Ok(done)
    }

    /// Lets `ip` do these commands here.
    fn ip(&self, commands: &str) -> Result<()> {
        self.enter(|| {
            let mut ip = Command::new("ip")
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("start ip (tests/setup.sh installs iproute2)")?;
            ip.stdin.take().context("no stdin")?.write_all(commands.as_bytes())?;
            let ended = ip.wait_with_output()?;
            let said = String::from_utf8_lossy(&ended.stderr);
            ensure!(ended.status.success(), "ip refused {commands:?}: {said}");
            Ok(())
        })?
    }

    /// As `ip` takes it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Where one process lives.
#[derive(Debug)]
pub struct Host {
    number: u8,
    ip: Ipv4Addr,
    first_port: u16,
    namespace: Option<Namespace>,
}

impl Host {
    /// One of its addresses; the same each time.
    #[must_use]
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.ip, self.first_port + port))
    }

    /// Bytes that have arrived from other hosts.
    ///
    /// # Errors
    /// When the host is on loopback.
    pub fn received_bytes(&self) -> Result<u64> {
        ensure!(self.namespace.is_some(), "what loopback carries is counted for all together");
        let devices = self.enter(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = devices.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
        let bytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        bytes.context("the host's network tells no bytes")
    }

    /// Does something, or starts something, where the host's network is seen.
    ///
    /// # Errors
    /// When it cannot be entered.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        match &self.namespace {
            Some(namespace) => namespace.enter(work),
            None => Ok(work()),
        }
    }
}

/// A network of two addresses: the host's, and that of the guest behind it.
#[derive(Debug)]
pub struct Tap {
    number: u8,
}

impl Host {
    /// Makes a tap for a guest. The guest reaches its host only, by all of the host's addresses.
    ///
    /// # Errors
    /// When the host is on loopback, or it cannot be made.
    pub fn tap(&self, number: u8) -> Result<Tap> {
        let namespace = self.namespace.as_ref().context("a tap is for a host of its own")?;
        namespace.ip(&format!(
            "tuntap add dev tap{number} mode tap\n\
             address add 10.78.{number}.1/30 dev tap{number}\n\
             link set tap{number} up\n"
        ))?;
        Ok(Tap { number })
    }
}

impl Tap {
    /// The guest's address.
    #[must_use]
    pub fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, self.number, 2)
    }

    /// What the guest's shell has to run.
    #[must_use]
    pub fn guest_setup(&self) -> String {
        let number = self.number;
        format!(
            "ip link set eth0 up; ip addr add 10.78.{number}.2/30 dev eth0; \
             ip route add default via 10.78.{number}.1; "
        )
    }

    /// What QEMU is to be started with, where the host's network is seen.
    #[must_use]
    pub fn qemu_args(&self) -> Vec<String> {
        let number = self.number;
        let netdev = format!("tap,id=net,ifname=tap{number},script=no,downscript=no");
        let device = format!("virtio-net-pci,netdev=net,mac=52:54:00:7a:00:{number:02x}");
        ["-netdev", &netdev, "-device", &device].map(str::to_owned).to_vec()
    }
}

/// A network of one test.
#[derive(Debug)]
pub struct Network {
    hosts: u8,
    /// Without the last byte.
    prefix: [u8; 3],
    first_port: u16,
    /// Where the bridge is.
    hub: Option<Namespace>,
}

fn hardware_address(number: u8) -> String {
    format!("02:00:00:00:00:{number:02x}")
}

impl Network {
    /// Addresses of loopback that no other test has.
    #[must_use]
    pub fn loopback() -> Self {
        static MADE: AtomicU16 = AtomicU16::new(0);
        let made = MADE.fetch_add(1, Ordering::Relaxed) % 15;
        let pid = std::process::id();
        let byte = |value: u32| (value % 250) as u8 + 1;
        Self {
            hosts: 0,
            prefix: [127, byte(pid), byte(pid / 250)],
            first_port: FIRST_PORT + made * PORTS + (pid / 62_500 % 67) as u16 * 15 * PORTS,
            hub: None,
        }
    }

    /// Namespaces joined by a bridge.
    ///
    /// # Errors
    /// When this machine or this user cannot make them.
    pub fn isolated() -> Result<Self> {
        let hub = Namespace::new()?;
        hub.ip("link add bridge type bridge\nlink set bridge up\n")?;
        Ok(Self { hosts: 0, prefix: [10, 77, 0], first_port: FIRST_PORT, hub: Some(hub) })
    }

    /// One more host.
    ///
    /// # Errors
    /// When it cannot be joined to the others.
    pub fn host(&mut self) -> Result<Host> {
        self.hosts += 1;
        let number = self.hosts;
        let most = if self.hub.is_some() { HOSTS_MAX } else { ADDRESSES_MAX };
        ensure!(number <= most, "more than {most} hosts");
        let [a, b, c] = self.prefix;
        let ip = Ipv4Addr::new(a, b, c, number);
        let namespace = match &self.hub {
            Some(hub) => Some(self.joined(hub, number)?),
            None => None,
        };
        Ok(Host { number, ip, first_port: self.first_port, namespace })
    }

    fn joined(&self, hub: &Namespace, number: u8) -> Result<Namespace> {
        let namespace = Namespace::new()?;
        let (path, hardware) = (namespace.path(), hardware_address(number));
        hub.ip(&format!(
            "link add host{number} type veth peer name eth0 address {hardware} netns {path}\n\
             link set host{number} master bridge up\n"
        ))?;
        let [a, b, c] = self.prefix;
        let own = format!(
            "link set lo up\nlink set eth0 up\naddress add {a}.{b}.{c}.{number}/24 dev eth0\n"
        );
        // Known for ever: who is cut off must be silent, not unreachable for want of an address.
        let others = (1..=HOSTS_MAX).filter(|other| *other != number).map(|other| {
            let hardware = hardware_address(other);
            format!("neigh add {a}.{b}.{c}.{other} lladdr {hardware} dev eth0 nud permanent\n")
        });
        namespace.ip(&others.fold(own, |all, line| all + &line))?;
        Ok(namespace)
    }

    /// From now on what the host sends, and what is sent to it, vanishes.
    ///
    /// # Errors
    /// When the network is loopback.
    pub fn cut_off(&self, host: &Host) -> Result<()> {
        self.hub()?.ip(&format!("link set host{} nomaster\n", host.number))
    }

    /// Takes that back.
    ///
    /// # Errors
    /// When the network is loopback.
    pub fn join(&self, host: &Host) -> Result<()> {
        self.hub()?.ip(&format!("link set host{} master bridge\n", host.number))
    }

    /// From now on no more reaches the host than so many megabits a second.
    ///
    /// # Errors
    /// When the network is loopback, or `tc` refuses.
    pub fn limit(&self, host: &Host, megabits: u32) -> Result<()> {
        let port = format!("host{}", host.number);
        let rate = format!("{megabits}mbit");
        let mut tc = Command::new("tc");
        tc.args(["qdisc", "replace", "dev", &port, "root", "tbf", "rate", &rate]);
        // What a tick of the kernel lets through at 10 Gbit/s.
        tc.args(["burst", "4mb", "latency", "100ms"]);
        let ended = self.hub()?.enter(|| tc.output())?.context("start tc (Debian: iproute2)")?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success(), "tc refused: {said}");
        Ok(())
    }

    fn hub(&self) -> Result<&Namespace> {
        self.hub.as_ref().context("only a host in a namespace of its own can be cut off")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// A bridge may take a second to pass on what a new port sends: a first SYN may be lost.
    const PATIENCE: Duration = Duration::from_secs(10);
    const SILENCE: Duration = Duration::from_secs(1);

    fn exchange(a: &Host, b: &Host, patience: Duration) -> Result<()> {
        let listener = b.enter(|| TcpListener::bind(b.address(0)))??;
        let mut stream =
            a.enter(|| TcpStream::connect_timeout(&b.address(0), patience))?.context("connect")?;
        stream.write_all(b"x")?;
        let mut got = [0];
        listener.accept()?.0.read_exact(&mut got)?;
        ensure!(&got == b"x");
        Ok(())
    }

    #[test]
    fn hosts_on_loopback_reach_each_other() -> Result<()> {
        let (mut network, mut other) = (Network::loopback(), Network::loopback());
        let (a, b) = (network.host()?, network.host()?);
        exchange(&a, &b, PATIENCE)?;
        assert_ne!(other.host()?.address(0), a.address(0));
        assert!(network.cut_off(&a).is_err());
        Ok(())
    }

    #[test]
    fn what_reaches_a_host_is_counted_and_limited() -> Result<()> {
        const BYTES: usize = 8 << 20;
        let mut network = Network::isolated()?;
        let (a, b) = (network.host()?, network.host()?);
        exchange(&a, &b, PATIENCE)?;
        network.limit(&b, 200)?;
        let before = b.received_bytes()?;
        let listener = b.enter(|| TcpListener::bind(b.address(1)))??;
        let mut stream = a.enter(|| TcpStream::connect(b.address(1)))??;
        let began = std::time::Instant::now();
        let sender = std::thread::spawn(move || stream.write_all(&vec![1; BYTES]));
        let mut got = Vec::new();
        listener.accept()?.0.read_to_end(&mut got)?;
        sender.join().expect("no panic")?;
        let (took, moved) = (began.elapsed(), b.received_bytes()? - before);
        assert!(moved as usize > BYTES && moved < 2 * BYTES as u64, "{moved}");
        // Half of it may pass at once.
        assert!(took > Duration::from_millis(100), "{took:?}");
        assert!(Network::loopback().host()?.received_bytes().is_err());
        Ok(())
    }

    #[test]
    fn a_host_that_is_cut_off_is_silent_and_seen_by_nobody_else() -> Result<()> {
        // Others may come and go there.
        let ours = |name: &str| name == "bridge" || name.starts_with("host");
        let mut network = Network::isolated()?;
        let (a, b) = (network.host()?, network.host()?);
        exchange(&a, &b, PATIENCE)?;
        network.cut_off(&b)?;
        let silent = exchange(&a, &b, SILENCE).err().context("it was reached")?;
        let kind = silent.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        assert_eq!(kind, Some(std::io::ErrorKind::TimedOut), "{silent:#}");
        network.join(&b)?;
        exchange(&a, &b, PATIENCE)?;
        let interfaces = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let mut names = interfaces.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
        assert!(!names.any(ours), "they are seen in the host's own network: {interfaces}");
        Ok(())
    }
}
