//! [`Proxy`]: the VMs of this host.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use blobcr_proto::v1;
use blobcr_proto::v1::checkpoint_server::CheckpointServer;
use blobcr_proto::{DiskName, VmName};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::channel::{self, Ending};
use crate::error::ProxyError;
use crate::limits::{DISKS_PER_VM_MAX, Limits, VMS_MAX};
use crate::records::{self, VmRecord};
use crate::requests::{Backend, Vm};
use crate::service::CheckpointService;
use crate::sockets;
use crate::upstream::Upstream;

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
            limits: Limits::default(),
        }
    }
}

struct Served {
    vm: Arc<Vm>,
    /// Ends the VM's listener and its connections.
    stop: CancellationToken,
}

pub(crate) struct Inner {
    dir: PathBuf,
    socket_mode: u32,
    backend: Arc<Backend>,
    vms: Mutex<BTreeMap<VmName, Served>>,
    /// Ends listeners and connections, before what they wait for ends: a guest that hears nothing
    /// asks the next proxy again, and one that hears of a failure does not.
    closing: CancellationToken,
    channels: TaskTracker,
    /// Adding and removing VMs is done one at a time: they write to the same directory.
    changing: tokio::sync::Mutex<()>,
    /// Held for as long as the directory is served.
    lock: Mutex<Option<File>>,
}

/// The VMs of one host, their channels and the service on them.
///
/// A clone is another handle of the same proxy. [`Proxy::stop`] ends it; when the last handle is
/// dropped without that, its tasks end as well.
#[derive(Clone)]
pub struct Proxy {
    inner: Arc<Inner>,
}

impl Proxy {
    /// Takes the directory, reads the records of its VMs and listens on their sockets.
    ///
    /// A record that cannot be read is logged and left where it is; the other VMs are served. To
    /// be called in a tokio runtime.
    ///
    /// # Errors
    /// When another proxy serves the directory, the directory cannot be used, or the mirror's
    /// address is none.
    pub fn start(options: ProxyOptions) -> Result<Self, ProxyError> {
        let ProxyOptions { sockets: dir, mirror, socket_mode, limits } = options;
        let backend = Arc::new(Backend {
            upstream: Upstream::new(&mirror, limits.clone())?,
            limits,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        let lock = sockets::lock_dir(&dir)?;
        let inner = Arc::new(Inner {
            dir,
            socket_mode,
            backend,
            vms: Mutex::default(),
            closing: CancellationToken::new(),
            channels: TaskTracker::new(),
            changing: tokio::sync::Mutex::default(),
            lock: Mutex::new(Some(lock)),
        });
        inner.serve_recorded()?;
        tracing::info!(dir = %inner.dir.display(), mirror, "checkpoint proxy is ready");
        Ok(Self { inner })
    }

    /// The gRPC service for the host's own tools.
    #[must_use]
    pub fn service(&self) -> CheckpointServer<CheckpointService> {
        CheckpointServer::new(CheckpointService::new(self.clone()))
    }

    /// Gives a VM its channel. Adding it again with the same disks changes nothing.
    ///
    /// # Errors
    /// When a name is not allowed, a disk is unknown to the mirror or belongs to another VM, the
    /// VM exists with other disks, or its socket or record cannot be made.
    pub async fn add_vm(&self, name: &str, disks: &[String]) -> Result<v1::Vm, ProxyError> {
        let inner = &self.inner;
        let _one_at_a_time = inner.changing.lock().await;
        let record = VmRecord { name: VmName::new(name)?, disks: check_disks(disks)? };
        if inner.check_new(&record)? {
            return Ok(inner.describe(&record));
        }
        for disk in &record.disks {
            inner.backend.upstream.disk(disk).await.map_err(ProxyError::Mirror)?;
        }
        let listener = sockets::bind(&inner.dir, &record.name, inner.socket_mode)?;
        if let Err(error) = records::save(&inner.dir, &record) {
            drop(listener);
            sockets::remove(&sockets::path(&inner.dir, &record.name))?;
            return Err(error);
        }
        let described = inner.describe(&record);
        tracing::info!(vm = %record.name, disks = ?described.disks, "VM added");
        inner.serve(record, listener);
        Ok(described)
    }

    /// Takes a VM's channel away: its socket, its connections, its record.
    ///
    /// # Errors
    /// When there is no such VM, or its files cannot be removed.
    pub async fn remove_vm(&self, name: &str) -> Result<(), ProxyError> {
        let inner = &self.inner;
        let name = VmName::new(name)?;
        let _one_at_a_time = inner.changing.lock().await;
        if !inner.vms().contains_key(&name) {
            return Err(ProxyError::NoSuchVm(name.to_string()));
        }
        // The record first: what is gone from there stays gone.
        records::remove(&inner.dir, &name)?;
        if let Some(served) = inner.vms().remove(&name) {
            served.stop.cancel();
        }
        sockets::remove(&sockets::path(&inner.dir, &name))?;
        tracing::info!(vm = %name, "VM removed");
        Ok(())
    }

    /// The directory of the sockets.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The VMs of this host, in order of name.
    #[must_use]
    pub fn vms(&self) -> Vec<v1::Vm> {
        self.inner.vms().values().map(|served| self.inner.describe(&served.vm.record)).collect()
    }

    /// Closes all channels, removes their sockets, waits for the tasks and leaves the directory to
    /// the next proxy. The records stay.
    pub async fn stop(&self) {
        let inner = &self.inner;
        let _one_at_a_time = inner.changing.lock().await;
        inner.closing.cancel();
        inner.channels.close();
        inner.channels.wait().await;
        inner.backend.stopping.cancel();
        let names: Vec<VmName> = {
            let mut vms = inner.vms();
            let names = vms.keys().cloned().collect();
            vms.clear();
            names
        };
        inner.backend.tasks.close();
        inner.backend.tasks.wait().await;
        for name in names {
            if let Err(error) = sockets::remove(&sockets::path(&inner.dir, &name)) {
                tracing::warn!(vm = %name, %error, "left a socket behind");
            }
        }
        drop(inner.lock.lock().expect("nothing panics while it holds this").take());
        tracing::info!(dir = %inner.dir.display(), "checkpoint proxy has stopped");
    }

    pub(crate) fn vm(&self, name: &str) -> Result<Arc<Vm>, ProxyError> {
        let name = VmName::new(name)?;
        let vms = self.inner.vms();
        vms.get(&name)
            .map(|served| Arc::clone(&served.vm))
            .ok_or_else(|| ProxyError::NoSuchVm(name.to_string()))
    }

    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.inner.backend
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.closing.cancel();
        self.backend.stopping.cancel();
    }
}

fn check_disks(disks: &[String]) -> Result<Vec<DiskName>, ProxyError> {
    let names = disks.iter().map(|d| DiskName::new(d.as_str())).collect::<Result<Vec<_>, _>>()?;
    if names.is_empty() {
        return Err(ProxyError::Invalid("a VM has at least one disk".to_owned()));
    }
    if names.len() > DISKS_PER_VM_MAX {
        return Err(ProxyError::Invalid(format!(
            "a VM has at most {DISKS_PER_VM_MAX} disks; this one would have {}",
            names.len()
        )));
    }
    if let Some(twice) = names.iter().enumerate().find(|(i, d)| names[..*i].contains(d)) {
        return Err(ProxyError::Invalid(format!("the disk {} is named twice", twice.1)));
    }
    Ok(names)
}

impl Inner {
    fn vms(&self) -> MutexGuard<'_, BTreeMap<VmName, Served>> {
        self.vms.lock().expect("nothing panics while it holds this")
    }

    fn describe(&self, record: &VmRecord) -> v1::Vm {
        v1::Vm {
            name: record.name.to_string(),
            disks: record.disks.iter().map(ToString::to_string).collect(),
            socket: sockets::path(&self.dir, &record.name).display().to_string(),
        }
    }

    /// Whether the VM is there already, just like this.
    fn check_new(&self, record: &VmRecord) -> Result<bool, ProxyError> {
        if self.closing.is_cancelled() {
            return Err(ProxyError::Stopping);
        }
        let vms = self.vms();
        if let Some(served) = vms.get(&record.name) {
            if served.vm.record == *record {
                return Ok(true);
            }
            return Err(ProxyError::VmExists(record.name.to_string()));
        }
        if vms.len() >= VMS_MAX {
            return Err(ProxyError::TooManyVms(VMS_MAX));
        }
        let taken = vms.values().find_map(|served| {
            let disk = record.disks.iter().find(|d| served.vm.record.disks.contains(d))?;
            Some(ProxyError::DiskTaken { disk: disk.to_string(), vm: served.vm.name().to_string() })
        });
        taken.map_or(Ok(false), Err)
    }

    fn serve_recorded(&self) -> Result<(), ProxyError> {
        for (path, record) in records::load_all(&self.dir)? {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(
                        path = %path.display(), %error,
                        "a VM's record cannot be used; add the VM again to replace it"
                    );
                    continue;
                }
            };
            match sockets::bind(&self.dir, &record.name, self.socket_mode) {
                Ok(listener) => {
                    tracing::info!(vm = %record.name, "VM is known from before");
                    self.serve(record, listener);
                }
                Err(error) => tracing::error!(
                    vm = %record.name, %error, "a VM has no channel; remove it and add it again"
                ),
            }
        }
        Ok(())
    }

    fn serve(&self, record: VmRecord, listener: UnixListener) {
        let vm = Arc::new(Vm::new(record));
        let stop = self.closing.child_token();
        let channel = Channel {
            backend: Arc::clone(&self.backend),
            vm: Arc::clone(&vm),
            stop: stop.clone(),
            tasks: self.channels.clone(),
        };
        let ended = stop.clone();
        self.channels
            .spawn(async move { ended.run_until_cancelled(channel.accept(listener)).await });
        self.vms().insert(vm.name().clone(), Served { vm, stop });
    }
}

/// The listener of one VM, and its connections.
struct Channel {
    backend: Arc<Backend>,
    vm: Arc<Vm>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Channel {
    async fn accept(self, listener: UnixListener) {
        let limits = &self.backend.limits;
        let places = Arc::new(Semaphore::new(limits.connections));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, usually: it may pass.
                    tracing::warn!(vm = %self.vm.name(), %error, "cannot accept a connection");
                    tokio::time::sleep(limits.rest).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                tracing::warn!(
                    vm = %self.vm.name(), limit = limits.connections,
                    "too many connections, closed the newest"
                );
                continue;
            };
            let connection = connection(Arc::clone(&self.backend), Arc::clone(&self.vm), stream);
            let ended = self.stop.clone();
            self.tasks.spawn(async move {
                let _place = place;
                ended.run_until_cancelled(connection).await
            });
        }
    }
}

async fn connection(backend: Arc<Backend>, vm: Arc<Vm>, stream: UnixStream) {
    tracing::info!(vm = %vm.name(), "connected");
    let rest = backend.limits.rest;
    match channel::serve(backend, Arc::clone(&vm), stream).await {
        Ending::Closed => tracing::info!(vm = %vm.name(), "disconnected"),
        Ending::Misbehaved(why) => {
            tracing::warn!(vm = %vm.name(), why, "connection closed");
            // Its place stays taken meanwhile, which slows down one that keeps doing it.
            tokio::time::sleep(rest).await;
        }
    }
}
