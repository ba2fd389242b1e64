//! [`Proxy`]: the VMs of this host.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use blobcr_proto::VmName;
use blobcr_proto::v1;
use blobcr_proto::v1::checkpoint_server::CheckpointServer;
use socket2::Socket;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::ProxyError;
use crate::limits::VMS_MAX;
use crate::lines::Lines;
use crate::new_vm::{NewVm, check_cid, check_disks, check_groups};
use crate::options::ProxyOptions;
use crate::records::{self, VmRecord};
use crate::requests::{Backend, Vm};
use crate::served::{Channel, Served, Vms};
use crate::service::CheckpointService;
use crate::sockets;
use crate::tcp::{self, Guests};
use crate::upstream::Upstream;
use crate::vsock::{self, Cid, Vsock};

pub(crate) struct Inner {
    dir: PathBuf,
    socket_mode: u32,
    backend: Arc<Backend>,
    vms: Vms,
    /// Where VMs that have a token are served over TCP.
    guests: Option<SocketAddr>,
    /// The port at which VMs that have a CID are served over vsock.
    vsock: Option<u32>,
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
        let ProxyOptions { sockets: dir, mirror, socket_mode, guests, vsock, limits } = options;
        let backend = Arc::new(Backend {
            upstream: Upstream::new(&mirror, limits.clone())?,
            limits,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        let lock = sockets::lock_dir(&dir)?;
        let guests = match guests {
            Some(address) => {
                let fail = |source| ProxyError::Listen { address, source };
                let listener = tcp::bind(address).map_err(fail)?;
                Some((listener.local_addr().map_err(fail)?, listener))
            }
            None => None,
        };
        let over_vsock = match vsock {
            Some(port) => Some(vsock::bind(port).map_err(|e| ProxyError::vsock(port, e))?),
            None => None,
        };
        let inner = Arc::new(Inner {
            dir,
            socket_mode,
            backend,
            vms: Vms::default(),
            guests: guests.as_ref().map(|(address, _)| *address),
            vsock,
            closing: CancellationToken::new(),
            channels: TaskTracker::new(),
            changing: tokio::sync::Mutex::default(),
            lock: Mutex::new(Some(lock)),
        });
        inner.serve_recorded()?;
        if let Some((address, listener)) = guests {
            inner.serve_guests(listener);
            tracing::info!(%address, "guests are served over TCP");
        }
        if let Some(listener) = over_vsock {
            inner.serve_vsock(listener);
            tracing::info!(port = vsock, "guests are served over vsock");
        }
        tracing::info!(dir = %inner.dir.display(), mirror, "checkpoint proxy is ready");
        Ok(Self { inner })
    }

    /// The gRPC service for the host's own tools.
    #[must_use]
    pub fn service(&self) -> CheckpointServer<CheckpointService> {
        CheckpointServer::new(CheckpointService::new(self.clone()))
    }

    /// Gives a VM its channel. Adding it again just like this changes nothing; its token is told the
    /// first time only.
    ///
    /// # Errors
    /// When a name is not allowed, a disk is unknown to the mirror or belongs to another VM, the
    /// VM exists otherwise, or its socket or record cannot be made.
    pub async fn add_vm(&self, vm: NewVm) -> Result<v1::Vm, ProxyError> {
        let inner = &self.inner;
        let _one_at_a_time = inner.changing.lock().await;
        if vm.tcp && inner.guests.is_none() {
            let problem = "this proxy serves no guests over TCP; start it with `--guests ADDR`";
            return Err(ProxyError::Invalid(problem.to_owned()));
        }
        if vm.vsock_cid != 0 && inner.vsock.is_none() {
            let problem = "this proxy serves no guests over vsock; start it with `--vsock PORT`";
            return Err(ProxyError::Invalid(problem.to_owned()));
        }
        let name = VmName::new(vm.name)?;
        let before = inner.vms.get(&name).filter(|_| vm.replace);
        let known = before.as_ref().map(|before| &before.vm.record);
        let (token, kept) = match known.and_then(|known| known.token) {
            None if vm.tcp => {
                let (token, kept) = tcp::new_token();
                (token, Some(kept))
            }
            kept => (String::new(), kept),
        };
        let record = VmRecord {
            name,
            disks: check_disks(&vm.disks)?,
            groups: check_groups(&vm.groups, known.map_or(&[], |known| &known.groups))?,
            token: kept,
            cid: check_cid(vm.vsock_cid)?.or(known.and_then(|known| known.cid)),
        };
        if let Some(known) = inner.check_new(&record, vm.replace)? {
            return Ok(inner.describe(&known.record));
        }
        for disk in &record.disks {
            inner.backend.upstream.disk(disk).await.map_err(ProxyError::Mirror)?;
        }
        if let Some(before) = before {
            before.stop.cancel();
            inner.vms.lock().remove(&record.name);
            sockets::remove(&sockets::path(&inner.dir, &record.name))?;
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
        Ok(v1::Vm { token, ..described })
    }

    /// Takes a VM's channel away: its socket, its connections, its record.
    ///
    /// # Errors
    /// When there is no such VM, or its files cannot be removed.
    pub async fn remove_vm(&self, name: &str) -> Result<(), ProxyError> {
        let inner = &self.inner;
        let name = VmName::new(name)?;
        let _one_at_a_time = inner.changing.lock().await;
        if !inner.vms.lock().contains_key(&name) {
            return Err(ProxyError::NoSuchVm(name.to_string()));
        }
        // The record first: what is gone from there stays gone.
        records::remove(&inner.dir, &name)?;
        if let Some(served) = inner.vms.lock().remove(&name) {
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
        self.inner
            .vms
            .lock()
            .values()
            .map(|served| self.inner.describe(&served.vm.record))
            .collect()
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
            let mut vms = inner.vms.lock();
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
        let vms = self.inner.vms.lock();
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

impl Inner {
    fn describe(&self, record: &VmRecord) -> v1::Vm {
        v1::Vm {
            name: record.name.to_string(),
            disks: record.disks.iter().map(ToString::to_string).collect(),
            socket: sockets::path(&self.dir, &record.name).display().to_string(),
            groups: record.groups.iter().map(ToString::to_string).collect(),
            address: match (&record.token, self.guests) {
                (Some(_), Some(address)) => address.to_string(),
                _ => String::new(),
            },
            token: String::new(),
            vsock_cid: record.cid.filter(|_| self.vsock.is_some()).map_or(0, Cid::get),
            vsock_port: record.cid.and(self.vsock).unwrap_or(0),
        }
    }

    /// The VM, when it is there already, just like this.
    fn check_new(&self, record: &VmRecord, replace: bool) -> Result<Option<Arc<Vm>>, ProxyError> {
        if self.closing.is_cancelled() {
            return Err(ProxyError::Stopping);
        }
        let vms = self.vms.lock();
        if let Some(served) = vms.get(&record.name) {
            // A token is never the same twice.
            let same = VmRecord { token: served.vm.record.token, ..record.clone() };
            if served.vm.record == same && same.token.is_some() == record.token.is_some() {
                return Ok(Some(Arc::clone(&served.vm)));
            }
            if !replace {
                return Err(ProxyError::VmExists(record.name.to_string()));
            }
        } else if vms.len() >= VMS_MAX {
            return Err(ProxyError::TooManyVms(VMS_MAX));
        }
        let mut others = vms.values().filter(|served| served.vm.name() != &record.name);
        let taken = others.find_map(|served| {
            let (other, vm) = (&served.vm.record, || served.vm.name().to_string());
            if let Some(cid) = record.cid.filter(|_| record.cid == other.cid) {
                return Some(ProxyError::CidTaken { cid: cid.get(), vm: vm() });
            }
            let disk = record.disks.iter().find(|d| other.disks.contains(d))?;
            Some(ProxyError::DiskTaken { disk: disk.to_string(), vm: vm() })
        });
        taken.map_or(Ok(None), Err)
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
        let stop = self.closing.child_token();
        let connections = self.backend.limits.connections;
        let served = Served::new(Arc::new(Vm::new(record)), stop.clone(), connections);
        let channel = Channel {
            backend: Arc::clone(&self.backend),
            served: served.clone(),
            tasks: self.channels.clone(),
        };
        self.channels
            .spawn(async move { stop.run_until_cancelled(channel.accept(listener)).await });
        self.vms.lock().insert(served.vm.name().clone(), served);
    }

    fn serve_guests(&self, listener: TcpListener) {
        let guests = Guests {
            backend: Arc::clone(&self.backend),
            vms: self.vms.clone(),
            tasks: self.channels.clone(),
            closing: self.closing.clone(),
            lines: Lines::default(),
        };
        let ended = self.closing.clone();
        self.channels
            .spawn(async move { ended.run_until_cancelled(guests.accept(listener)).await });
    }

    fn serve_vsock(&self, listener: AsyncFd<Socket>) {
        let vsock = Vsock {
            backend: Arc::clone(&self.backend),
            vms: self.vms.clone(),
            tasks: self.channels.clone(),
            lines: Lines::default(),
        };
        let ended = self.closing.clone();
        self.channels.spawn(async move { ended.run_until_cancelled(vsock.accept(listener)).await });
    }
}
