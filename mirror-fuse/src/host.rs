//! The mirror of one host: its disks, its cache, its mount.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blobcr_proto::name::NameError;
use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::{DiskName, v1};
use blobcr_repository::{CatalogError, Repository};
use futures::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinError, spawn_blocking};

use crate::base::{FetchLimits, Snapshots};
use crate::cache::{CacheLimits, CacheStatus, ChunkCache};
use crate::disk::{Budgets, Committed, Disk, DiskDeps, DiskError, DiskSpec, Source, Upstream};
use crate::fuse::{self, Front, FrontOptions, Mounted};
use crate::identity::{Directory, DirectoryError, make_durable};
use crate::images::Images;
use crate::inode;
use crate::mount::{self, MountError};
use crate::registry::{Access, Disks, Entry, Served, Taken};
use crate::view::View;

/// How often the cache is asked to make room for the disks.
const YIELD_INTERVAL: Duration = Duration::from_secs(5);

/// How a mirror is set up.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Where everything of the mirror is kept. One process at a time.
    pub dir: PathBuf,
    /// Where it is mounted: an empty directory.
    pub mount: PathBuf,
    /// Bytes of clean chunks kept on this host at most.
    pub cache_bytes: u64,
    /// Bytes of the host's file system that the cache leaves free for the disks.
    pub keep_free_bytes: u64,
    /// Memory for copies aside of all disks together.
    pub aside_bytes: u64,
    /// Spill files for copies aside of all disks together.
    pub spill_bytes: u64,
    /// How long a read waits for a repository that cannot be reached, before it fails.
    pub repository_wait: Duration,
    /// Threads that take requests from the kernel.
    pub threads: usize,
    /// Let other users than this one into the mount. Hypervisors commonly run as another one.
    pub allow_other: bool,
    /// Permissions of a disk's file; `None`: read and write for all who are let into the mount.
    pub disk_mode: Option<u32>,
    /// Owner of the disks' files; `None`: the user of this process.
    pub disk_uid: Option<u32>,
    /// Group of the disks' files; `None`: the group of this process.
    pub disk_gid: Option<u32>,
    /// How long a stop waits for snapshots that are being persisted. Those that are not ready go on
    /// at the next start, as far as they do not need what was in memory only.
    pub settle: Duration,
}

impl HostOptions {
    /// Sensible for a host of a few dozen virtual machines.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, mount: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            mount: mount.into(),
            cache_bytes: 32 << 30,
            keep_free_bytes: 1 << 30,
            aside_bytes: 256 << 20,
            spill_bytes: 4 << 30,
            repository_wait: FetchLimits::default().wait,
            // Measured: two are best at queue depth 1, four at 32.
            threads: std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4)),
            allow_other: true,
            disk_mode: None,
            disk_uid: None,
            disk_gid: None,
            settle: Duration::from_secs(5),
        }
    }

    fn access(&self) -> Access {
        let all = if self.allow_other { 0o666 } else { 0o600 };
        Access {
            mode: self.disk_mode.unwrap_or(all) & 0o777,
            uid: self.disk_uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()),
            gid: self.disk_gid.unwrap_or_else(|| rustix::process::getegid().as_raw()),
        }
    }
}

/// Why a mirror did not do what it was asked. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Nothing can be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A file of the mirror cannot be used.
    #[error("the mirror cannot use {path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No name for a disk.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is no such disk on this host.
    #[error("there is no disk {0} on this host; `blobcr disk list` shows those that there are")]
    NoDisk(String),
    /// The name is taken.
    #[error("there is a disk {0} on this host already; choose another name, or detach it first")]
    Exists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The state of the disk or snapshot forbids it.
    #[error("{0}")]
    Precondition(String),
    /// The mirror is stopping.
    #[error("the mirror is stopping; ask again when it has been started")]
    Stopping,
    /// A disk did not do its part.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The catalog did not do its part.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A task of the mirror ended by a fault of its own.
    #[error("internal fault: {0}; the log has more")]
    Fault(#[from] JoinError),
}

/// A running mirror. Clones are the same one; it unmounts when the last is dropped, but only
/// [`Host::stop`] leaves the disks ready for a quick start.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: HostOptions,
    /// Without symbolic links.
    mount_point: PathBuf,
    writer: String,
    repository: Repository,
    cache: Arc<ChunkCache>,
    snapshots: Arc<Snapshots>,
    deps: DiskDeps,
    disks: Arc<Disks>,
    mounted: Mutex<Option<Mounted>>,
    stopping: watch::Sender<bool>,
    _directory: Directory,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Host {
    /// Opens the mirror's directory and all its disks, and mounts. The repository need not be
    /// reachable. Must be called within a multi-threaded tokio runtime.
    ///
    /// # Errors
    /// When another mirror runs on the directory, or the mount point is not fit. A disk that cannot
    /// be opened is no error: it is listed with the reason, and left alone.
    pub async fn start(
        options: HostOptions,
        repository: Repository,
        upstream: Arc<dyn Upstream>,
    ) -> Result<Self, HostError> {
        let host = spawn_blocking(move || Self::open(options, repository, upstream)).await??;
        host.open_disks().await?;
        let serving = host.clone();
        spawn_blocking(move || serving.mount()).await??;
        tokio::spawn(make_room(Arc::clone(&host.0.cache), host.0.stopping.subscribe()));
        Ok(host)
    }

    fn open(
        options: HostOptions,
        repository: Repository,
        upstream: Arc<dyn Upstream>,
    ) -> Result<Self, HostError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| HostError::Io { path, source }
        };
        let directory = Directory::open(&options.dir)?;
        let mount_point = mount::prepare(&options.mount, options.allow_other)?;
        let limits = CacheLimits {
            capacity_bytes: options.cache_bytes,
            keep_free_bytes: options.keep_free_bytes,
        };
        let cache_dir = options.dir.join("cache");
        let cache = ChunkCache::open(&cache_dir, limits).map_err(failed(&cache_dir))?;
        let cache = Arc::new(cache);
        let fetch = FetchLimits { wait: options.repository_wait, ..FetchLimits::default() };
        let snapshots = Snapshots::open(&cache_dir, repository.clone(), Arc::clone(&cache), fetch)
            .map_err(failed(&cache_dir))?;
        let writer = directory.writer();
        let budgets = Budgets::new(options.aside_bytes, options.spill_bytes);
        let deps = DiskDeps::new(Arc::new(Arc::clone(&snapshots)), upstream, budgets)
            .map_err(failed(&options.dir))?;
        let disks_dir = options.dir.join("disks");
        make_durable(&disks_dir).map_err(failed(&disks_dir))?;
        Ok(Self(Arc::new(Inner {
            mount_point,
            writer,
            repository,
            cache,
            snapshots,
            deps,
            disks: Arc::default(),
            mounted: Mutex::default(),
            stopping: watch::channel(false).0,
            _directory: directory,
            options,
        })))
    }

    fn disk_dir(&self, name: &str) -> PathBuf {
        self.0.options.dir.join("disks").join(name)
    }

    /// Takes over the disks of an earlier run: after a clean stop, a kill, or a crash of the host.
    async fn open_disks(&self) -> Result<(), HostError> {
        let dir = self.0.options.dir.join("disks");
        let failed = |source| HostError::Io { path: dir.clone(), source };
        let mut opening = Vec::new();
        for found in std::fs::read_dir(&dir).map_err(failed)? {
            let name = found.map_err(failed)?.file_name();
            let Some(name) = name.to_str().and_then(|name| DiskName::new(name).ok()) else {
                tracing::warn!(?name, "left alone: not the directory of a disk");
                continue;
            };
            let host = self.clone();
            opening.push(spawn_blocking(move || host.open_disk(&name)));
        }
        for opened in join_all(opening).await {
            opened?;
        }
        Ok(())
    }

    fn open_disk(&self, name: &DiskName) {
        let dir = self.disk_dir(name.as_str());
        match Disk::open(&dir, self.0.deps.clone()) {
            Ok(disk) => match self.0.disks.reserve(name) {
                Ok(place) => place.serve(Served::new(disk, self.0.options.access())),
                Err(taken) => tracing::error!(%name, ?taken, "two disks of one name or number"),
            },
            Err(DiskError::Absent(_)) => {
                // Its making was interrupted before anybody was told of it.
                if let Err(error) = std::fs::remove_dir_all(&dir) {
                    tracing::warn!(%name, %error, "a half-made disk cannot be removed");
                }
            }
            Err(error) => {
                tracing::error!(%name, %error, "a disk cannot be opened and is left alone");
                self.0.disks.insert_broken(name.as_str(), &error.to_string());
            }
        }
    }

    fn mount(&self) -> Result<(), HostError> {
        let inner = &self.0;
        let images = Images::new(inner.repository.clone(), Arc::clone(&inner.snapshots));
        let view = Arc::new(View::new(Arc::clone(&inner.disks), images));
        let host_dir = File::open(&inner.options.dir)
            .map_err(|source| HostError::Io { path: inner.options.dir.clone(), source })?;
        let front = Front::new(view, Handle::current(), host_dir);
        let options =
            FrontOptions { threads: inner.options.threads, allow_other: inner.options.allow_other };
        *lock(&inner.mounted) = Some(fuse::mount(front, &inner.mount_point, options)?);
        Ok(())
    }

    fn check_running(&self) -> Result<(), HostError> {
        if *self.0.stopping.borrow() { Err(HostError::Stopping) } else { Ok(()) }
    }

    /// Names this mirror towards the repository: it alone may add to the checkpoint images of its
    /// disks.
    #[must_use]
    pub fn writer(&self) -> &str {
        &self.0.writer
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        &self.0.mount_point
    }

    /// What the cache holds and did.
    #[must_use]
    pub fn cache_status(&self) -> CacheStatus {
        self.0.cache.status()
    }

    fn served(&self, name: &str) -> Result<Arc<Served>, HostError> {
        match self.0.disks.get(name) {
            Some(Entry::Served(served)) => Ok(served),
            Some(Entry::Broken(why)) => {
                Err(HostError::Precondition(format!("disk {name} could not be opened: {why}")))
            }
            Some(Entry::Reserved) | None => Err(HostError::NoDisk(name.to_owned())),
        }
    }

    fn disk_path(&self, name: &str) -> String {
        let file = self.0.mount_point.join("disks").join(format!("{name}.raw"));
        file.to_string_lossy().into_owned()
    }

    fn describe(&self, served: &Served) -> v1::Disk {
        let mut disk = served.disk.status();
        disk.path = self.disk_path(&disk.name);
        let source = &served.disk.spec().source;
        if disk.stalled.is_empty()
            && let Ok(root) = (&source.root).try_into()
        {
            disk.stalled = self.0.snapshots.stalled(source.pool, &root).unwrap_or_default();
        }
        disk
    }

    /// Makes a writable disk of a snapshot, and its file in the mount. Costs the same for every
    /// size: nothing is fetched.
    ///
    /// # Errors
    /// When the name is bad or taken, the snapshot is not there or not stable, or the size is less
    /// than the snapshot's.
    pub async fn attach(&self, request: v1::AttachDiskRequest) -> Result<v1::Disk, HostError> {
        self.check_running()?;
        let name = DiskName::new(request.disk)?;
        let place = self.0.disks.reserve(&name).map_err(|taken| match taken {
            Taken::Name => HostError::Exists(name.to_string()),
            Taken::Inode => HostError::Invalid(format!("choose another name than {name}")),
        })?;
        let wanted = request.source.ok_or_else(|| {
            HostError::Invalid("an attach request must name a snapshot".to_owned())
        })?;
        let (image, snapshot) = self.0.repository.snapshot(wanted).await?;
        let spec = self.spec(&name, &image, &snapshot, request.size_bytes)?;
        let (dir, deps) = (self.disk_dir(name.as_str()), self.0.deps.clone());
        let disk = spawn_blocking(move || Disk::create(&dir, spec, deps)).await??;
        let served = Served::new(disk, self.0.options.access());
        place.serve(Arc::clone(&served));
        tracing::info!(disk = %name, image = image.name, snapshot = snapshot.number, "attached");
        Ok(self.describe(&served))
    }

    fn spec(
        &self,
        name: &DiskName,
        image: &v1::Image,
        snapshot: &v1::Snapshot,
        size_bytes: u64,
    ) -> Result<DiskSpec, HostError> {
        let label = format!("{}@{}", image.name, snapshot.number);
        if snapshot.state() != v1::SnapshotState::Stable {
            let state = snapshot.state().as_str_name().to_lowercase();
            let state = state.trim_start_matches("snapshot_state_");
            return Err(HostError::Precondition(format!(
                "snapshot {label} is {state}; only a stable one can be attached \
                 (`blobcr snapshot list {}` shows them)",
                image.name
            )));
        }
        let root = snapshot.root.clone().ok_or_else(|| {
            HostError::Precondition(format!("snapshot {label} has no tree; verify it"))
        })?;
        let size_bytes = if size_bytes == 0 { root.size_bytes } else { size_bytes };
        if !(root.size_bytes..=IMAGE_SIZE_MAX).contains(&size_bytes) {
            return Err(HostError::Invalid(format!(
                "a disk of {label} has {} to {IMAGE_SIZE_MAX} bytes; {size_bytes} were asked for",
                root.size_bytes
            )));
        }
        Ok(DiskSpec {
            name: name.clone(),
            uid: rand::random(),
            source: Source {
                image: image.name.clone(),
                image_id: image.id,
                number: snapshot.number,
                pool: image.pool,
                root,
            },
            size_bytes,
            writer: self.0.writer.clone(),
            created_unix_ms: unix_ms(),
        })
    }

    /// Removes a disk and what is kept of it on this host. Its snapshots stay in the repository.
    ///
    /// # Errors
    /// When its file is open, or it has changes that are in no stable snapshot (unless they are to
    /// be thrown away).
    pub async fn detach(&self, name: &str, discard_changes: bool) -> Result<(), HostError> {
        self.check_running()?;
        if let Some(Entry::Broken(why)) = self.0.disks.get(name) {
            return self.detach_broken(name, &why, discard_changes).await;
        }
        let served = self.served(name)?;
        let closed = self.close(&served)?;
        let status = served.disk.status();
        if !discard_changes && (status.dirty_bytes > 0 || !status.pending.is_empty()) {
            return Err(HostError::Precondition(format!(
                "disk {name} has changes that are in no stable snapshot ({} bytes since the last \
                 checkpoint, {} snapshots being persisted); checkpoint it with --wait first, or \
                 throw them away with --discard",
                status.dirty_bytes,
                status.pending.len()
            )));
        }
        self.0.disks.remove(name);
        self.forget_name(name).await;
        let disk = Arc::clone(&served.disk);
        drop(served);
        disk.remove().await?;
        drop(closed);
        tracing::info!(disk = name, "detached");
        Ok(())
    }

    async fn detach_broken(
        &self,
        name: &str,
        why: &str,
        discard_changes: bool,
    ) -> Result<(), HostError> {
        if !discard_changes {
            return Err(HostError::Precondition(format!(
                "disk {name} could not be opened ({why}), so nobody knows what it holds; mend its \
                 files and restart the mirror, or throw it away with --discard"
            )));
        }
        let dir = self.disk_dir(name);
        let path = dir.clone();
        spawn_blocking(move || std::fs::remove_dir_all(dir))
            .await?
            .map_err(|source| HostError::Io { path, source })?;
        self.0.disks.remove(name);
        Ok(())
    }

    fn close(&self, served: &Arc<Served>) -> Result<crate::registry::Closed, HostError> {
        served.close().map_err(|open| {
            HostError::Precondition(match open {
                0 => format!("disk {} is just being changed; try again", served.disk.name()),
                open => format!(
                    "disk {} is in use: its file is open {open} times; stop the virtual machine \
                     first (`fuser {}` tells who has it)",
                    served.disk.name(),
                    self.disk_path(served.disk.name())
                ),
            })
        })
    }

    async fn forget_name(&self, name: &str) {
        let (inner, file) = (Arc::clone(&self.0), format!("{name}.raw"));
        let forgot = spawn_blocking(move || {
            if let Some(mounted) = &*lock(&inner.mounted) {
                mounted.forget(inode::DISKS, &file);
            }
        });
        if let Err(error) = forgot.await {
            tracing::warn!(%error, "the kernel was not told that a disk is gone");
        }
    }

    /// All disks, by name; those that could not be opened too.
    #[must_use]
    pub fn list(&self) -> Vec<v1::Disk> {
        let entries = self.0.disks.all().into_iter();
        let disks = entries.filter_map(|(name, entry)| match entry {
            Entry::Served(served) => Some(self.describe(&served)),
            Entry::Broken(why) => {
                let stalled = format!("could not be opened: {why}");
                Some(v1::Disk { name, stalled, ..v1::Disk::default() })
            }
            Entry::Reserved => None,
        });
        disks.collect()
    }

    /// One disk.
    ///
    /// # Errors
    /// When there is none of this name, or it could not be opened.
    pub fn get(&self, name: &str) -> Result<v1::Disk, HostError> {
        Ok(self.describe(&*self.served(name)?))
    }

    /// CLONE where it is the first, then COMMIT of all the disks behind one barrier. Returns as soon
    /// as their guests may go on. A repeated key returns the first answer.
    ///
    /// # Errors
    /// When there is no such disk, a disk is named twice or none is, or a disk does not do it.
    pub async fn checkpoint(
        &self,
        names: &[String],
        idempotency_key: &str,
    ) -> Result<Vec<v1::DiskSnapshot>, HostError> {
        self.check_running()?;
        let mut disks = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                return Err(HostError::Invalid(format!("disk {name} is named twice")));
            }
            disks.push(Arc::clone(&self.served(name)?.disk));
        }
        if disks.is_empty() {
            return Err(HostError::Invalid("a checkpoint needs at least one disk".to_owned()));
        }
        let committed = Disk::commit_all(&disks, idempotency_key).await?;
        Ok(committed
            .into_iter()
            .zip(names)
            .map(|(commit, name)| snapshot_of(name, commit))
            .collect())
    }

    /// Puts a disk back to a snapshot of its checkpoint image (0: the newest stable one).
    ///
    /// # Errors
    /// When its file is open, or there is no such stable snapshot.
    pub async fn rollback(&self, name: &str, number: u64) -> Result<v1::Disk, HostError> {
        self.check_running()?;
        let served = self.served(name)?;
        let _closed = self.close(&served)?;
        served.disk.rollback(number).await?;
        served.touch();
        Ok(self.describe(&served))
    }

    /// Unmounts, lets snapshots that are nearly ready finish, and leaves the disks ready for a quick
    /// start. Whoever still has files of the mount open gets errors. Does nothing the second time.
    ///
    /// # Errors
    /// The first thing that did not work; the rest is done nevertheless.
    pub async fn stop(&self) -> Result<(), HostError> {
        if self.0.stopping.send_replace(true) {
            return Ok(());
        }
        let inner = Arc::clone(&self.0);
        let unmounted = spawn_blocking(move || {
            let mounted = lock(&inner.mounted).take();
            mounted.map_or(Ok(()), |mut mounted| mounted.unmount())
        })
        .await?;
        let point = self.0.mount_point.clone();
        let mut result = unmounted.map_err(|source| HostError::Io { path: point, source });
        let disks = self.0.disks.all_served();
        let settled = join_all(disks.iter().map(|served| served.disk.settle()));
        if tokio::time::timeout(self.0.options.settle, settled).await.is_err() {
            tracing::info!("snapshots that are not persisted yet go on at the next start");
        }
        self.0.snapshots.stop();
        let stops = disks.iter().map(|served| served.disk.shutdown());
        for (served, stopped) in disks.iter().zip(join_all(stops).await) {
            if let Err(error) = stopped {
                tracing::error!(disk = served.disk.name(), %error, "stopping a disk failed");
                result = result.and(Err(error.into()));
            }
        }
        result
    }

    /// Returns when the mount is gone, because of [`Self::stop`] or because somebody unmounted it.
    pub async fn unmounted(&self) {
        let ended = lock(&self.0.mounted).as_ref().map(Mounted::ended);
        if let Some(mut ended) = ended {
            // An error means that its thread is gone: the same.
            let _ = ended.wait_for(|ended| *ended).await;
        }
    }
}

fn snapshot_of(disk: &str, commit: Committed) -> v1::DiskSnapshot {
    v1::DiskSnapshot {
        disk: disk.to_owned(),
        image: commit.image,
        image_id: commit.image_id,
        number: commit.number,
        dirty_bytes: commit.dirty_bytes,
        downtime_ns: u64::try_from(commit.downtime.as_nanos()).unwrap_or(u64::MAX),
    }
}

/// Gives space of the cache to the disks when the host's file system gets full.
async fn make_room(cache: Arc<ChunkCache>, mut stopping: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(YIELD_INTERVAL) => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let cache = Arc::clone(&cache);
        match spawn_blocking(move || cache.yield_space()).await {
            Ok(0) => {}
            Ok(bytes) => tracing::info!(bytes, "the cache made room on a full host"),
            Err(error) => tracing::warn!(%error, "the cache could not make room"),
        }
    }
}
