//! The mirror of one host: its disks, its cache, its mount.

mod attach;
mod disks;
mod error;
mod options;
mod pins;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blobcr_proto::DiskName;
use blobcr_repository::{PersistLimits, Repository};
use futures::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use crate::background::Background;
use crate::base::{DiskBases, FetchLimits, Snapshots};
use crate::cache::{CacheLimits, CacheStatus, ChunkCache};
use crate::disk::{BaseOpener, Budgets, Disk, DiskDeps, DiskError};
use crate::fuse::{self, Front, FrontOptions, Mounted};
use crate::identity::{Directory, make_durable};
use crate::images::Images;
use crate::mount;
use crate::prefetch::{Prefetch, Prefetcher};
use crate::registry::{Disks, Served};
use crate::upstream::RepositoryUpstream;
use crate::view::View;

pub use error::HostError;
pub use options::HostOptions;

/// How often the cache is asked to make room for the disks.
const YIELD_INTERVAL: Duration = Duration::from_secs(5);

/// Long enough that a guest has the answer to its CHECKPOINT, and short beside what persisting takes.
const PERSIST_AFTER: Duration = Duration::from_millis(2);

/// A running mirror. Clones are the same one; it unmounts when the last is dropped, but only
/// [`Host::stop`] leaves the disks ready for a quick start.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// First, so that it is dropped first.
    mounted: Mutex<Option<Mounted>>,
    options: HostOptions,
    /// Without symbolic links.
    mount_point: PathBuf,
    writer: String,
    repository: Repository,
    cache: Arc<ChunkCache>,
    snapshots: Arc<Snapshots>,
    prefetcher: Option<Arc<Prefetcher>>,
    deps: DiskDeps,
    /// Where the disks' persisters run.
    _background: Background,
    disks: Arc<Disks>,
    stopping: watch::Sender<bool>,
    directory: Directory,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Opens the mirror's directory and all its disks, and mounts. The repository need not be
    /// reachable. Must be called within a multi-threaded tokio runtime.
    ///
    /// # Errors
    /// When another mirror runs on the directory, or the mount point is not fit. A disk that cannot
    /// be opened is no error: it is listed with the reason, and left alone.
    pub async fn start(options: HostOptions, repository: Repository) -> Result<Self, HostError> {
        let host = spawn_blocking(move || Self::open(options, repository)).await??;
        host.open_disks().await?;
        let serving = host.clone();
        if let Err(error) = spawn_blocking(move || serving.mount()).await? {
            if let Err(error) = host.stop().await {
                tracing::warn!(%error, "not all of a mirror that could not be mounted was stopped");
            }
            return Err(error);
        }
        tokio::spawn(pins::settle(Arc::downgrade(&host.0), host.0.stopping.subscribe()));
        tokio::spawn(make_room(Arc::clone(&host.0.cache), host.0.stopping.subscribe()));
        Ok(host)
    }

    fn open(options: HostOptions, repository: Repository) -> Result<Self, HostError> {
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
        let upstream =
            Arc::new(RepositoryUpstream::new(repository.clone(), PersistLimits::default()));
        let budgets = Budgets::new(options.aside_bytes, options.spill_bytes);
        let prefetcher = match options.prefetch {
            Prefetch::Off => None,
            Prefetch::Trace => Some(Prefetcher::new(repository.clone(), options.prefetch_rate)),
        };
        let bases = DiskBases::new(Arc::clone(&snapshots), None);
        let deps = DiskDeps::new(bases, upstream, budgets).map_err(failed(&options.dir))?;
        let background = Background::start(options.persist_nice).map_err(failed(&options.dir))?;
        let deps = DiskDeps {
            strategy: options.strategy,
            background: background.handle().clone(),
            persist_after: PERSIST_AFTER,
            ..deps
        };
        let disks_dir = options.dir.join("disks");
        make_durable(&disks_dir).map_err(failed(&disks_dir))?;
        Ok(Self(Arc::new(Inner {
            mount_point,
            writer,
            repository,
            cache,
            snapshots,
            prefetcher,
            deps,
            _background: background,
            disks: Arc::default(),
            mounted: Mutex::default(),
            stopping: watch::channel(false).0,
            directory,
            options,
        })))
    }

    fn disk_dir(&self, name: &str) -> PathBuf {
        self.0.options.dir.join("disks").join(name)
    }

    /// What a disk works with: all the same for every disk, but for what lies below it.
    fn deps(&self) -> (Arc<DiskBases>, DiskDeps) {
        let bases = DiskBases::new(Arc::clone(&self.0.snapshots), self.0.prefetcher.clone());
        let opener: Arc<dyn BaseOpener> = Arc::<DiskBases>::clone(&bases);
        (bases, DiskDeps { bases: opener, ..self.0.deps.clone() })
    }

    fn serve(&self, disk: Arc<Disk>, bases: Arc<DiskBases>) -> Arc<Served> {
        Served::new(disk, bases, Arc::clone(&self.0.cache), self.0.options.access())
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
        let (bases, deps) = self.deps();
        match Disk::open(&dir, deps) {
            Ok(disk) => match self.0.disks.reserve(name) {
                Ok(place) => self.0.disks.serve([(place, self.serve(disk, bases))]),
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
        let options = FrontOptions {
            threads: inner.options.threads,
            halt_poll: inner.options.halt_poll,
            allow_other: inner.options.allow_other,
        };
        let front = Front::new(view, Handle::current(), host_dir, options);
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

    /// Unmounts, lets snapshots that are nearly ready finish, and leaves the disks ready for a quick
    /// start. Whoever still has files of the mount open gets errors. Does nothing the second time.
    ///
    /// # Errors
    /// The first thing that did not work; the rest is done nevertheless.
    pub async fn stop(&self) -> Result<(), HostError> {
        if self.0.stopping.send_replace(true) {
            return Ok(());
        }
        let (mounted, unmounted) = self.unmount().await?;
        let point = self.0.mount_point.clone();
        let mut result = unmounted.map_err(|source| HostError::Io { path: point, source });
        let disks = self.0.disks.all_served();
        let settled = join_all(disks.iter().map(|served| served.disk.settle()));
        if tokio::time::timeout(self.0.options.settle, settled).await.is_err() {
            tracing::info!("snapshots that are not persisted yet go on at the next start");
        }
        self.0.snapshots.stop();
        // With it the last reads end that waited for the repository.
        spawn_blocking(move || mounted.as_ref().map(Mounted::wait_ended)).await?;
        let stops = disks.iter().map(|served| served.disk.shutdown());
        for (served, stopped) in disks.iter().zip(join_all(stops).await) {
            if let Err(error) = stopped {
                tracing::error!(disk = served.disk.name(), %error, "stopping a disk failed");
                result = result.and(Err(error.into()));
            }
        }
        self.0.directory.unlock();
        result
    }

    /// What was mounted, and whether it could be taken from the tree.
    async fn unmount(&self) -> Result<(Option<Mounted>, io::Result<()>), HostError> {
        let inner = Arc::clone(&self.0);
        let unmount = move || {
            let mut mounted = lock(&inner.mounted).take();
            let unmounted = mounted.as_mut().map_or(Ok(()), Mounted::unmount);
            (mounted, unmounted)
        };
        Ok(spawn_blocking(unmount).await?)
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
