//! Where a VM's host is asked.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::error::GuestError;

/// The name of the virtio-serial port that is a VM's channel to its host.
pub const PORT_NAME: &str = "org.blobcr.checkpoint.0";
/// What an address over vsock begins with.
pub(crate) const VSOCK: &str = "vsock:";
/// A token is a line of some tens of bytes: what is longer is another file.
const TOKEN_BYTES_MAX: u64 = 4096;

/// What a VM says on a channel over TCP, where the channel itself does not tell whose it is.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The VM's name.
    pub vm: String,
    /// As `blobcr vm add` gave it, for this VM alone.
    pub token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A token in a log is everybody's.
        f.debug_struct("Credentials").field("vm", &self.vm).finish_non_exhaustive()
    }
}

/// Where the host is asked.
#[derive(Clone, Debug)]
pub enum Target {
    /// The virtio-serial port of this name.
    Port(String),
    /// A Unix socket, as the proxy makes it: for programs outside of a VM.
    Socket(PathBuf),
    /// A TCP address: one that the hypervisor forwards for this VM alone, or, with credentials, the
    /// proxy's own.
    Tcp {
        /// Where to connect to.
        address: SocketAddr,
        /// Said first on every connection.
        credentials: Option<Credentials>,
    },
    /// A port over vsock. The host knows whose a connection is by the CID of this VM.
    Vsock {
        /// Of the machine that is asked.
        cid: u32,
        /// At which it is served there.
        port: u32,
    },
}

impl Target {
    /// The port that every VM's channel has.
    #[must_use]
    pub fn port() -> Self {
        Self::Port(PORT_NAME.to_owned())
    }

    /// A TCP address.
    #[must_use]
    pub fn tcp(address: SocketAddr, credentials: Option<Credentials>) -> Self {
        Self::Tcp { address, credentials }
    }

    /// Whether the host is, for all that can be told, this very machine: its file systems are then
    /// the host's as well.
    #[must_use]
    pub fn is_this_machine(&self) -> bool {
        match self {
            Self::Port(_) => false,
            Self::Socket(_) => true,
            Self::Tcp { address, .. } => address.ip().is_loopback(),
            Self::Vsock { cid, .. } => *cid == libc::VMADDR_CID_LOCAL,
        }
    }
}

/// A target as people and configurations name it; what is `None` was not named.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The name of the virtio-serial port.
    pub port: Option<String>,
    /// A Unix socket instead of the port.
    pub socket: Option<PathBuf>,
    /// `ADDRESS:PORT` of TCP, or `vsock:PORT` of the host, instead of the port.
    pub connect: Option<String>,
    /// This VM's name, which goes with the token.
    pub vm: Option<String>,
    /// The file that holds the token for TCP.
    pub token_file: Option<PathBuf>,
}

impl Place {
    /// The target that this names.
    ///
    /// # Errors
    /// When the parts do not go together, or the token cannot be read.
    pub fn target(&self) -> Result<Target, GuestError> {
        let usage = |text: &str| Err(GuestError::Usage(text.to_owned()));
        let Some(connect) = &self.connect else {
            if self.token_file.is_some() {
                return usage("a token is for TCP only: name the host's address as well");
            }
            return Ok(match (&self.socket, &self.port) {
                (Some(path), _) => Target::Socket(path.clone()),
                (None, Some(name)) => Target::Port(name.clone()),
                (None, None) => Target::port(),
            });
        };
        if self.socket.is_some() {
            return usage("name a Unix socket or an address to connect to, not both");
        }
        if let Some(rest) = connect.strip_prefix(VSOCK) {
            if self.token_file.is_some() {
                return usage("a token is for TCP only: over vsock the host knows this VM");
            }
            return vsock(rest);
        }
        // Numbers only: looking a name up may take longer than any deadline allows.
        let Ok(address) = connect.parse() else {
            return Err(GuestError::Usage(format!(
                "{connect:?} is no address and port in numbers, such as 10.0.2.100:7000, \
                 [fd00::1]:7000 or vsock:7000"
            )));
        };
        let credentials = match (&self.vm, &self.token_file) {
            (Some(vm), Some(file)) => {
                Some(Credentials { vm: vm.clone(), token: read_token(file)? })
            }
            (None, Some(_)) => return usage("a token goes with the name of its VM: name it too"),
            (_, None) => None,
        };
        Ok(Target::tcp(address, credentials))
    }
}

/// `PORT` of the host, or `CID:PORT`.
fn vsock(text: &str) -> Result<Target, GuestError> {
    let (cid, port) = match text.split_once(':') {
        Some((cid, port)) => (cid.parse().ok(), port),
        None => (Some(libc::VMADDR_CID_HOST), text),
    };
    match (cid, port.parse()) {
        (Some(cid), Ok(port)) => Ok(Target::Vsock { cid, port }),
        _ => Err(GuestError::Usage(format!(
            "{VSOCK}{text} is no port of vsock; write vsock:PORT for the host's, or vsock:CID:PORT"
        ))),
    }
}

fn read_token(file: &Path) -> Result<String, GuestError> {
    let mut text = String::new();
    File::open(file)
        .and_then(|f| f.take(TOKEN_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(GuestError::io("read the token in", file))?;
    let token = text.trim();
    let plain = |c: char| c.is_ascii_graphic();
    if token.is_empty() || text.len() as u64 > TOKEN_BYTES_MAX || !token.chars().all(plain) {
        return Err(GuestError::Usage(format!(
            "{} does not hold a token; put into it what `blobcr vm add --tcp` printed",
            file.display()
        )));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_names_one_target() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "s3cret\n").unwrap();
        let place = |connect: &str, vm: &str, token: Option<&Path>| Place {
            connect: Some(connect.to_owned()),
            vm: Some(vm.to_owned()).filter(|vm| !vm.is_empty()),
            token_file: token.map(Path::to_owned),
            ..Place::default()
        };
        assert!(matches!(Place::default().target(), Ok(Target::Port(name)) if name == PORT_NAME));
        let found = place("10.0.2.100:7000", "web", Some(&file)).target().unwrap();
        let Target::Tcp { address, credentials: Some(credentials) } = &found else {
            panic!("{found:?}");
        };
        assert_eq!(address.to_string(), "10.0.2.100:7000");
        assert_eq!((credentials.vm.as_str(), credentials.token.as_str()), ("web", "s3cret"));
        assert!(!format!("{found:?}").contains("s3cret"), "{found:?}");
        assert!(!found.is_this_machine());
        let found = place("[::1]:1", "web", None).target().unwrap();
        assert!(matches!(found, Target::Tcp { credentials: None, .. }), "{found:?}");
        assert!(found.is_this_machine());
        for (text, cid) in [("vsock:7000", 2), ("vsock:1:7000", 1)] {
            let found = place(text, "web", None).target().unwrap();
            assert!(matches!(found, Target::Vsock { cid: c, port: 7000 } if c == cid), "{found:?}");
            assert_eq!(found.is_this_machine(), cid == 1);
        }
        for bad in [
            place("vsock:", "", None),
            place("vsock:-1", "", None),
            place("vsock:2:x", "", None),
            place("vsock:4294967296", "", None),
            place("vsock:7000", "web", Some(&file)),
            place("host:1", "", None),
            place("10.0.0.1", "", None),
            place("10.0.0.1:1", "", Some(&file)),
            Place { socket: Some("/s".into()), ..place("10.0.0.1:1", "", None) },
            Place { token_file: Some(file.clone()), ..Place::default() },
        ] {
            let error = bad.target().unwrap_err();
            assert!(matches!(error, GuestError::Usage(_)), "{error}");
        }
        for bad in ["", " \n", "two words", "x\0", &"x".repeat(5000)] {
            std::fs::write(&file, bad).unwrap();
            let error = place("10.0.0.1:1", "web", Some(&file)).target().unwrap_err();
            assert!(matches!(error, GuestError::Usage(_)), "{error}");
        }
        std::fs::remove_file(&file).unwrap();
        let error = place("10.0.0.1:1", "web", Some(&file)).target().unwrap_err();
        assert!(error.to_string().contains("token"), "{error}");
    }
}
