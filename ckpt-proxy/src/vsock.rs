//! Channels over vsock: whose a connection is says the CID that the host's kernel reports of its peer.
//! A guest cannot choose it: its hypervisor gave it to the VM.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio_util::task::TaskTracker;

use crate::limits::BACKLOG;
use crate::lines::Lines;
use crate::requests::Backend;
use crate::served::Vms;

/// The address of a VM among those of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cid(u32);

impl Cid {
    /// `None` for those that are no VM's: the hypervisor (0), this machine itself (1), the host
    /// (2) and any.
    pub(crate) fn new(cid: u32) -> Option<Self> {
        (cid > libc::VMADDR_CID_HOST && cid != libc::VMADDR_CID_ANY).then_some(Self(cid))
    }

    pub(crate) fn get(self) -> u32 {
        self.0
    }
}

/// Listens on a port, for the guests of this host whatever their hypervisor.
pub(crate) fn bind(port: u32) -> io::Result<AsyncFd<Socket>> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::vsock(libc::VMADDR_CID_ANY, port))?;
    socket.listen(BACKLOG)?;
    // SAFETY: a socket keeps its descriptor open until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

async fn next(listener: &AsyncFd<Socket>) -> io::Result<(UnixStream, SockAddr)> {
    let (socket, peer) = listener.async_io(Interest::READABLE, Socket::accept).await?;
    socket.set_nonblocking(true)?;
    // Once it is connected, a stream is read and written alike in every family.
    let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(socket));
    Ok((UnixStream::from_std(stream)?, peer))
}

/// The listener for all VMs that have a CID.
pub(crate) struct Vsock {
    pub(crate) backend: Arc<Backend>,
    pub(crate) vms: Vms,
    pub(crate) tasks: TaskTracker,
    /// About those that are of no VM here.
    pub(crate) lines: Lines,
}

impl Vsock {
    pub(crate) async fn accept(self, listener: AsyncFd<Socket>) {
        loop {
            let (stream, peer) = match next(&listener).await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection over vsock");
                    tokio::time::sleep(self.backend.limits.rest).await;
                    continue;
                }
            };
            let cid = peer.as_vsock_address().map(|(cid, _)| cid);
            match cid.and_then(Cid::new).and_then(|cid| self.vms.by_cid(cid)) {
                Some(served) => served.spawn(&self.backend, &self.tasks, stream),
                None if self.lines.allow("connections over vsock") => {
                    tracing::warn!(cid, "connection over vsock refused: no VM has this CID");
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vms_cid_is_none() {
        for reserved in [0, 1, 2, u32::MAX] {
            assert_eq!(Cid::new(reserved), None);
        }
        for cid in [3, 42, u32::MAX - 1] {
            assert_eq!(Cid::new(cid).map(Cid::get), Some(cid));
        }
    }
}
