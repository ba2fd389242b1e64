//! Why a proxy did not start, or why a VM could not be added or removed.

use std::net::SocketAddr;
use std::path::PathBuf;

use blobcr_proto::name::NameError;

/// What failed, on which object, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another proxy serves the directory.
    #[error("another proxy serves {0}; stop it first, or give this one a directory of its own")]
    Locked(PathBuf),
    /// Somebody listens on the socket who is not this proxy.
    #[error("another process listens on {0}; stop it, then add the VM again")]
    SocketInUse(PathBuf),
    /// Something that is no socket is where the socket belongs.
    #[error("{0} is in the way: it is not a socket; move it away, then add the VM again")]
    InTheWay(PathBuf),
    /// The socket's path does not fit a socket address.
    #[error(
        "the socket path {path} has {len} bytes and a socket address holds {max}; \
         use a shorter directory or VM name"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
        /// What an address holds.
        max: usize,
    },
    /// The mirror's address is none.
    #[error("{address:?} is no address of a mirror ({detail}); write HOST:PORT")]
    BadAddress {
        /// What was given.
        address: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The address for guests cannot be had.
    #[error("cannot listen for guests on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel has no vsock.
    #[error(
        "this host's kernel has no vsock; load its module vhost_vsock, or start the proxy without \
         `--vsock`: every VM has a socket of its own as well"
    )]
    NoVsock,
    /// The port for guests over vsock cannot be had.
    #[error("cannot listen for guests on the vsock port {port}: {source}")]
    ListenVsock {
        /// The port.
        port: u32,
        /// Why not.
        source: std::io::Error,
    },
    /// A name that is not allowed.
    #[error(transparent)]
    BadName(#[from] NameError),
    /// A request that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The VM exists with other disks.
    #[error(
        "the VM {0} exists already with other disks, groups or CID, or without a token; remove it \
         first"
    )]
    VmExists(String),
    /// A disk can belong to one VM only.
    #[error("the disk {disk} belongs to the VM {vm}; remove that VM first")]
    DiskTaken {
        /// The disk.
        disk: String,
        /// Its VM.
        vm: String,
    },
    /// A CID is that of one VM only.
    #[error("the CID {cid} is that of the VM {vm}; give this one another, or remove that VM first")]
    CidTaken {
        /// The CID.
        cid: u32,
        /// Its VM.
        vm: String,
    },
    /// There is no such VM.
    #[error("there is no VM {0} here; `blobcr vm list` shows those that are")]
    NoSuchVm(String),
    /// No more VMs fit.
    #[error("this host has its limit of {0} VMs; remove one first")]
    TooManyVms(usize),
    /// The mirror refused or could not be reached.
    #[error("{}", .0.message())]
    Mirror(tonic::Status),
    /// The proxy is being stopped.
    #[error("the proxy is stopping; try again when it has been started anew")]
    Stopping,
}

impl ProxyError {
    pub(crate) fn vsock(port: u32, source: std::io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EAFNOSUPPORT) => Self::NoVsock,
            _ => Self::ListenVsock { port, source },
        }
    }
}

impl From<ProxyError> for tonic::Status {
    fn from(error: ProxyError) -> Self {
        let message = error.to_string();
        match error {
            ProxyError::Mirror(status) => status,
            ProxyError::BadName(_)
            | ProxyError::Invalid(_)
            | ProxyError::BadAddress { .. }
            | ProxyError::PathTooLong { .. } => Self::invalid_argument(message),
            ProxyError::VmExists(_) => Self::already_exists(message),
            ProxyError::DiskTaken { .. }
            | ProxyError::CidTaken { .. }
            | ProxyError::SocketInUse(_)
            | ProxyError::InTheWay(_)
            | ProxyError::Locked(_) => Self::failed_precondition(message),
            ProxyError::NoSuchVm(_) => Self::not_found(message),
            ProxyError::TooManyVms(_) => Self::resource_exhausted(message),
            ProxyError::Stopping => Self::unavailable(message),
            ProxyError::Io { .. }
            | ProxyError::Listen { .. }
            | ProxyError::NoVsock
            | ProxyError::ListenVsock { .. } => Self::internal(message),
        }
    }
}
