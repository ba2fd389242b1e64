//! The VMs that are served, their listeners and their connections.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use blobcr_proto::VmName;
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::channel::{self, Ending};
use crate::requests::{Backend, Vm};
use crate::vsock::Cid;

/// A VM that is served.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) vm: Arc<Vm>,
    /// Ends the VM's listener and its connections.
    pub(crate) stop: CancellationToken,
    /// Its connections, however they came.
    places: Arc<Semaphore>,
}

impl Served {
    pub(crate) fn new(vm: Arc<Vm>, stop: CancellationToken, connections: usize) -> Self {
        Self { vm, stop, places: Arc::new(Semaphore::new(connections)) }
    }

    /// A place for one more connection.
    pub(crate) fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok();
        if place.is_none() && self.vm.may_log() {
            tracing::warn!(vm = %self.vm.name(), "too many connections, closed the newest");
        }
        place
    }

    /// Serves a connection until it ends or the VM is taken away, if there is a place for it.
    pub(crate) fn spawn<S>(&self, backend: &Arc<Backend>, tasks: &TaskTracker, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some(place) = self.place() else { return };
        let (backend, vm) = (Arc::clone(backend), Arc::clone(&self.vm));
        let connection = connection(backend, vm, stream, BytesMut::new());
        let ended = self.stop.clone();
        tasks.spawn(async move {
            let _place = place;
            ended.run_until_cancelled(connection).await
        });
    }
}

/// The VMs of this host by name.
#[derive(Clone, Default)]
pub(crate) struct Vms(Arc<Mutex<BTreeMap<VmName, Served>>>);

impl Vms {
    pub(crate) fn lock(&self) -> MutexGuard<'_, BTreeMap<VmName, Served>> {
        self.0.lock().expect("nothing panics while it holds this")
    }

    pub(crate) fn get(&self, name: &VmName) -> Option<Served> {
        self.lock().get(name).cloned()
    }

    /// The VM whose CID this is.
    pub(crate) fn by_cid(&self, cid: Cid) -> Option<Served> {
        self.lock().values().find(|served| served.vm.record.cid == Some(cid)).cloned()
    }
}

/// The listener of one VM, and its connections.
pub(crate) struct Channel {
    pub(crate) backend: Arc<Backend>,
    pub(crate) served: Served,
    pub(crate) tasks: TaskTracker,
}

impl Channel {
    pub(crate) async fn accept(self, listener: UnixListener) {
        let Self { backend, served, tasks } = self;
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, usually: it may pass.
                    tracing::warn!(vm = %served.vm.name(), %error, "cannot accept a connection");
                    tokio::time::sleep(backend.limits.rest).await;
                    continue;
                }
            };
            served.spawn(&backend, &tasks, stream);
        }
    }
}

/// Serves a connection of which `buffer` has been read already.
pub(crate) async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    backend: Arc<Backend>,
    vm: Arc<Vm>,
    stream: S,
    buffer: BytesMut,
) {
    if vm.may_log() {
        tracing::info!(vm = %vm.name(), "connected");
    }
    let rest = backend.limits.rest;
    match channel::serve(backend, Arc::clone(&vm), stream, buffer).await {
        Ending::Closed if vm.may_log() => tracing::info!(vm = %vm.name(), "disconnected"),
        Ending::Closed => {}
        Ending::Misbehaved(why) => {
            if vm.may_log() {
                tracing::warn!(vm = %vm.name(), why, "connection closed");
            }
            // Its place stays taken meanwhile, which slows down one that keeps doing it.
            tokio::time::sleep(rest).await;
        }
    }
}
