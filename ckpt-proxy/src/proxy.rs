//! [`Proxy`]: the VMs of this host.

use std::fmt::Display;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use blobcr_proto::name::GroupName;
use blobcr_proto::v1;
use blobcr_proto::v1::checkpoint_server::CheckpointServer;
use blobcr_proto::{DiskName, VmName};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::ProxyError;
use crate::limits::{DISKS_PER_VM_MAX, GROUPS_PER_VM_MAX, Limits, VMS_MAX};
use crate::lines::Lines;
use crate::records::{self, VmRecord};
use crate::requests::{Backend, Vm};
use crate::served::{Channel, Served, Vms};
use crate::service::CheckpointService;
use crate::sockets;
use crate::tcp::{self, Guests};
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
    /// Where guests that reach this host by a network only are served; `None`: nowhere.
    pub guests: Option<SocketAddr>,
    /// Times and numbers.
    pub limits: Limits,
}

/// A VM to add.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewVm {
    /// Its name.
    pub name: String,
    /// Its disks, which are checkpointed behind one barrier.
    pub disks: Vec<String>,
    /// The groups of whose sets it may be a member.
    pub groups: Vec<String>,
    /// Whether it gets a token for a channel over TCP.
    pub tcp: bool,
    /// A VM that is there gets these disks in place of its own, and these groups besides its own.
    /// It keeps its token; its connections end.
    pub replace: bool,
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
            limits: Limits::default(),
        }
    }
}

pub(crate) struct Inner {
    dir: PathBuf,
    socket_mode: u32,
    backend: Arc<Backend>,
    vms: Vms,
    /// Where VMs that have a token are served over TCP.
    guests: Option<SocketAddr>,
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
        let ProxyOptions { sockets: dir, mirror, socket_mode, guests, limits } = options;
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
        let inner = Arc::new(Inner {
            dir,
            socket_mode,
            backend,
            vms: Vms::default(),
            guests: guests.as_ref().map(|(address, _)| *address),
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

/// The groups that are named, and those that the VM is in already.
fn check_groups(named: &[String], known: &[GroupName]) -> Result<Vec<GroupName>, ProxyError> {
    let names = named.iter().map(|g| GroupName::new(g.as_str())).collect::<Result<Vec<_>, _>>()?;
    check_distinct("group", &names)?;
    let more = known.iter().filter(|group| !names.contains(group)).cloned();
    let all: Vec<GroupName> = names.iter().cloned().chain(more).collect();
    if all.len() > GROUPS_PER_VM_MAX {
        let problem = format!("a VM is in at most {GROUPS_PER_VM_MAX} groups, not {}", all.len());
        return Err(ProxyError::Invalid(problem));
    }
    Ok(all)
}

fn check_distinct<N: PartialEq + Display>(what: &str, names: &[N]) -> Result<(), ProxyError> {
    match names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        Some((_, twice)) => Err(ProxyError::Invalid(format!("the {what} {twice} is named twice"))),
        None => Ok(()),
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
    check_distinct("disk", &names)?;
    Ok(names)
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
            let disk = record.disks.iter().find(|d| served.vm.record.disks.contains(d))?;
            Some(ProxyError::DiskTaken { disk: disk.to_string(), vm: served.vm.name().to_string() })
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
}
