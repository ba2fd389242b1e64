//! The byte stream to the host: a virtio-serial port, a connection over TCP or vsock, or a Unix
//! socket where there is no VM.
//!
//! The host end comes and goes. A port says so by a hang-up and an end of file, and is readable
//! again later through the same descriptor; a socket has to be connected anew.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::deadline::Deadline;
use crate::error::GuestError;
use crate::target::{Credentials, Target, VSOCK};

const PORTS: &str = "/sys/class/virtio-ports";
/// Between two looks at something that gives no notice when it changes.
const PAUSE: Duration = Duration::from_millis(10);
/// How long one attempt to connect may take, lest a lost packet costs the whole deadline.
const CONNECT: Duration = Duration::from_secs(3);
/// A TCP peer that acknowledges nothing for so long is taken for gone. The kernel's own answer to a
/// host that vanished comes after a quarter of an hour.
const UNACKNOWLEDGED_MS: u32 = 10_000;

impl Target {
    /// Opens the way to the host, waiting for other programs that use it.
    pub(crate) fn open(&self, deadline: Deadline) -> Result<Link, GuestError> {
        match self {
            Self::Socket(path) => Ok(Link::to(Peer::Unix(path.clone()), path, None)),
            Self::Tcp { address, credentials } => {
                Ok(Link::to(Peer::Tcp(*address), address.to_string(), credentials.clone()))
            }
            Self::Vsock { cid, port } => {
                let peer = Peer::Vsock { cid: *cid, port: *port };
                Ok(Link::to(peer, format!("{VSOCK}{cid}:{port}"), None))
            }
            Self::Port(name) => {
                let found = find_port(Path::new(PORTS), name)?;
                let lock = lock(&found, deadline)?;
                let path = device_of(&found)?;
                let fd = open_port(&path, deadline)?;
                Ok(Link { path, way: Way::Port { fd, _lock: lock } })
            }
        }
    }
}

fn find_port(ports: &Path, name: &str) -> Result<PathBuf, GuestError> {
    let missing = || GuestError::NoPort { name: name.to_owned() };
    let entries = fs::read_dir(ports).map_err(|_| missing())?;
    for entry in entries {
        let dir = entry.map_err(GuestError::io("list", ports))?.path();
        if fs::read_to_string(dir.join("name")).is_ok_and(|found| found.trim_end() == name) {
            return Ok(dir);
        }
    }
    Err(missing())
}

/// The port's own directory is what programs lock: it is there whatever is mounted writable.
fn lock(port: &Path, deadline: Deadline) -> Result<File, GuestError> {
    let dir = File::open(port).map_err(GuestError::io("open", port))?;
    loop {
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(dir),
            Err(Errno::WOULDBLOCK | Errno::INTR) if !deadline.is_over() => sleep(PAUSE),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {
                let state = "another program is using the port".to_owned();
                return Err(GuestError::NoAnswer { state });
            }
            Err(error) => return Err(GuestError::io("lock", port)(error.into())),
        }
    }
}

fn device_of(port: &Path) -> Result<PathBuf, GuestError> {
    let node = port.file_name().map(|name| Path::new("/dev").join(name));
    node.ok_or_else(|| GuestError::BadAnswer(format!("{} has no name", port.display())))
}

/// A port has one opener at a time; one that does not lock may be in the way for a while.
fn open_port(path: &Path, deadline: Deadline) -> Result<OwnedFd, GuestError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    loop {
        match open(path, flags, Mode::empty()) {
            Ok(fd) => return Ok(fd),
            Err(Errno::BUSY | Errno::INTR) if !deadline.is_over() => sleep(PAUSE),
            Err(error) => return Err(GuestError::io("open", path)(error.into())),
        }
    }
}

enum Way {
    Port {
        fd: OwnedFd,
        _lock: File,
    },
    Stream {
        peer: Peer,
        stream: Option<OwnedFd>,
        /// What each new connection begins with.
        credentials: Option<Credentials>,
        /// Whether this connection's host has accepted them.
        greeted: bool,
    },
}

/// What a stream is connected to.
enum Peer {
    Unix(PathBuf),
    Tcp(SocketAddr),
    Vsock { cid: u32, port: u32 },
}

/// What became of an attempt to read or write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing until the deadline.
    Nothing,
    /// The host end is gone; what was sent before may be lost.
    Gone,
}

/// An open way to the host.
pub(crate) struct Link {
    path: PathBuf,
    way: Way,
}

impl Link {
    fn to(peer: Peer, path: impl Into<PathBuf>, credentials: Option<Credentials>) -> Self {
        let way = Way::Stream { peer, stream: None, credentials, greeted: false };
        Self { path: path.into(), way }
    }

    /// Waits until the host end is there. `false` when it is not by the deadline.
    pub(crate) fn ready(&mut self, deadline: Deadline) -> Result<bool, GuestError> {
        loop {
            if self.try_ready(deadline)? {
                return Ok(true);
            }
            if deadline.is_over() {
                return Ok(false);
            }
            sleep(PAUSE);
        }
    }

    /// What the host has still to be told on this connection before it answers anything.
    pub(crate) fn greeting(&self) -> Option<&Credentials> {
        match &self.way {
            Way::Stream { credentials: Some(credentials), greeted: false, .. } => Some(credentials),
            _ => None,
        }
    }

    /// The host has accepted the greeting.
    pub(crate) fn greeted(&mut self) {
        if let Way::Stream { greeted, .. } = &mut self.way {
            *greeted = true;
        }
    }

    fn try_ready(&mut self, deadline: Deadline) -> Result<bool, GuestError> {
        match &mut self.way {
            Way::Port { fd, .. } => {
                let seen = wait(fd.as_fd(), PollFlags::OUT, Duration::ZERO)
                    .map_err(GuestError::io("poll", &self.path))?;
                Ok(!seen.contains(PollFlags::HUP))
            }
            Way::Stream { stream: Some(_), .. } => Ok(true),
            Way::Stream { peer, stream, greeted, .. } => match peer.connect(deadline) {
                Ok(connected) => {
                    *stream = Some(connected);
                    *greeted = false;
                    Ok(true)
                }
                Err(error) if comes_back(&error) => Ok(false),
                Err(error) if peer.is_missing(&error) => Err(GuestError::NoVsock),
                Err(error) => Err(GuestError::io("connect to", &self.path)(error)),
            },
        }
    }

    /// What the way looks like now, for an error message.
    pub(crate) fn state(&mut self) -> String {
        let there = matches!(self.try_ready(Deadline::after(PAUSE)), Ok(true));
        let path = self.path.display();
        match (&self.way, there) {
            (Way::Port { .. }, true) => format!("the host end of {path} is open"),
            (Way::Port { .. }, false) => format!("nobody is at the host end of {path}"),
            (Way::Stream { credentials: Some(_), greeted: false, .. }, true) => {
                format!("{path} is connected and has not accepted this VM")
            }
            (Way::Stream { .. }, true) => format!("{path} is connected"),
            (Way::Stream { .. }, false) => format!("nobody listens on {path}"),
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8], deadline: Deadline) -> Result<Moved, GuestError> {
        let port = matches!(self.way, Way::Port { .. });
        self.exchange("write to", PollFlags::OUT, deadline, |fd| match port {
            true => rustix::io::write(fd, bytes),
            // The signal of a broken pipe would end the program that this library is part of.
            false => send(fd, bytes, SendFlags::NOSIGNAL),
        })
    }

    pub(crate) fn read(
        &mut self,
        into: &mut [u8],
        deadline: Deadline,
    ) -> Result<Moved, GuestError> {
        self.exchange("read from", PollFlags::IN, deadline, |fd| rustix::io::read(fd, &mut *into))
    }

    fn exchange(
        &mut self,
        what: &'static str,
        wanted: PollFlags,
        deadline: Deadline,
        mut attempt: impl FnMut(rustix::fd::BorrowedFd<'_>) -> Result<usize, Errno>,
    ) -> Result<Moved, GuestError> {
        loop {
            let fd = match &self.way {
                Way::Port { fd, .. } => fd.as_fd(),
                Way::Stream { stream: Some(stream), .. } => stream.as_fd(),
                Way::Stream { stream: None, .. } => return Ok(Moved::Gone),
            };
            // The attempt comes first: what is there can be read although the other end is gone.
            match attempt(fd) {
                Ok(0) => return Ok(self.gone()),
                Ok(bytes) => return Ok(Moved::Bytes(bytes)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(
                    Errno::PIPE
                    | Errno::CONNRESET
                    | Errno::NOTCONN
                    | Errno::NODEV
                    | Errno::IO
                    | Errno::TIMEDOUT
                    | Errno::HOSTUNREACH
                    | Errno::NETUNREACH,
                ) => return Ok(self.gone()),
                Err(error) => return Err(GuestError::io(what, &self.path)(error.into())),
            }
            if deadline.is_over() {
                return Ok(Moved::Nothing);
            }
            let seen =
                wait(fd, wanted, deadline.left()).map_err(GuestError::io("poll", &self.path))?;
            if seen.contains(PollFlags::HUP) && !seen.contains(wanted) {
                return Ok(self.gone());
            }
        }
    }

    /// Gives a connection up, so that the next one is made anew. A port stays open.
    pub(crate) fn gone(&mut self) -> Moved {
        match &mut self.way {
            Way::Stream { stream, .. } => *stream = None,
            Way::Port { .. } => {}
        }
        Moved::Gone
    }
}

impl Peer {
    fn connect(&self, deadline: Deadline) -> io::Result<OwnedFd> {
        // No time at all would be an error.
        let time = deadline.left().clamp(PAUSE, CONNECT);
        match self {
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_nonblocking(true)?;
                Ok(stream.into())
            }
            Self::Tcp(address) => connect_tcp(*address, time),
            Self::Vsock { cid, port } => {
                let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
                socket.connect_timeout(&SockAddr::vsock(*cid, *port), time)?;
                socket.set_nonblocking(true)?;
                Ok(socket.into())
            }
        }
    }

    /// Whether this machine has nothing by which the peer could be reached.
    fn is_missing(&self, error: &io::Error) -> bool {
        let missing = [libc::EAFNOSUPPORT, libc::ESOCKTNOSUPPORT, libc::ENODEV];
        matches!(self, Self::Vsock { .. })
            && error.raw_os_error().is_some_and(|errno| missing.contains(&errno))
    }
}

fn connect_tcp(address: SocketAddr, time: Duration) -> io::Result<OwnedFd> {
    let stream = TcpStream::connect_timeout(&address, time)?;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(&stream, UNACKNOWLEDGED_MS)?;
    Ok(stream.into())
}

/// What a socket gives whose listener, or whose network, is being started anew.
fn comes_back(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound
            | Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::WouldBlock
            | Kind::TimedOut
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::NetworkDown
    )
}

fn wait(
    fd: rustix::fd::BorrowedFd<'_>,
    wanted: PollFlags,
    time: Duration,
) -> io::Result<PollFlags> {
    let timeout = Timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    };
    let mut fds = [PollFd::from_borrowed_fd(fd, wanted)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) => Ok(fds[0].revents()),
        Err(Errno::INTR) => Ok(PollFlags::empty()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::PORT_NAME;

    #[test]
    fn a_port_is_found_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        for (node, name) in [("vport0p1", "org.other\n"), ("vport1p2", "org.blobcr.checkpoint.0\n")]
        {
            fs::create_dir(dir.path().join(node)).unwrap();
            fs::write(dir.path().join(node).join("name"), name).unwrap();
        }
        // A port without a name has no such file.
        fs::create_dir(dir.path().join("vport0p0")).unwrap();
        let found = find_port(dir.path(), PORT_NAME).unwrap();
        assert_eq!(device_of(&found).unwrap(), Path::new("/dev/vport1p2"));
        assert!(matches!(find_port(dir.path(), "org.none"), Err(GuestError::NoPort { .. })));
        let nowhere = dir.path().join("nowhere");
        assert!(matches!(find_port(&nowhere, PORT_NAME), Err(GuestError::NoPort { .. })));
    }

    #[test]
    fn a_port_is_used_by_one_program_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path(), Deadline::after(Duration::ZERO)).unwrap();
        let late = lock(dir.path(), Deadline::after(Duration::from_millis(20)));
        assert!(matches!(late, Err(GuestError::NoAnswer { .. })));
        let path = dir.path().to_owned();
        let waiting =
            std::thread::spawn(move || lock(&path, Deadline::after(Duration::from_secs(30))));
        drop(held);
        waiting.join().unwrap().unwrap();
    }
}
