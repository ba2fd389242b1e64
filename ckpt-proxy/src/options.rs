//! [`ProxyOptions`]: what a proxy is started with.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::limits::Limits;

/// The hypervisor's user and group may use a socket; the directory's group decides which that is.
const SOCKET_MODE: u32 = 0o660;

/// What a proxy is started with.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// The directory of the VMs' sockets and records; made when it is not there.
    pub sockets: PathBuf,
    /// The address of this host's mirror, `HOST:PORT`. It need not be up yet.
    pub mirror: String,
    /// The mode of the sockets. Whoever may connect to one speaks for its VM.
    pub socket_mode: u32,
    /// Where guests that reach this host by a network only are served; `None`: nowhere.
    pub guests: Option<SocketAddr>,
    /// The port at which guests are served over vsock; `None`: nowhere.
    pub vsock: Option<u32>,
    /// Times and numbers.
    pub limits: Limits,
}

impl ProxyOptions {
    /// Options with the usual limits.
    #[must_use]
    pub fn new(sockets: impl Into<PathBuf>, mirror: impl Into<String>) -> Self {
        Self {
            sockets: sockets.into(),
            mirror: mirror.into(),
            socket_mode: SOCKET_MODE,
            guests: None,
            vsock: None,
            limits: Limits::default(),
        }
    }
}
