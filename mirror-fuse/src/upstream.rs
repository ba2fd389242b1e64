//! The repository as the disks of a mirror see it.
//!
//! Every snapshot is persisted under a lease of its own, from its begin until it is stable or has
//! failed. Should the lease be lost meanwhile (this host was cut off for too long), a new one is
//! taken, and everything that was stored or found under the old one is touched again before the
//! snapshot is published: what the collector took in between is noticed, and fails the snapshot
//! instead of being missing from it.

mod recorder;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::v1::{self, SnapshotState};
use blobcr_repository::tree::{Geometry, NodeSource, Root};
use blobcr_repository::{
    CatalogError, ChunkSource, Identified, LeaseKeeper, ObjectStore, PersistJob, PersistLimits,
    Progress, Repository, SourceError, persist,
};
use tokio::time::timeout;

use crate::disk::{Persisted, SnapshotChunks, SnapshotKey, Upstream, UpstreamError, Work};
use recorder::Recorder;

/// The time to live of a snapshot's lease. Long: a mirror that is restarted, or cut off from the
/// repository, within this time loses no pending snapshot. All it costs is that the collector
/// spares what a dead host stored for so much longer.
const SNAPSHOT_LEASE_TTL: Duration = Duration::from_secs(600);

/// How long one call waits for a lease before it reports that the repository cannot be reached.
const LEASE_WAIT: Duration = Duration::from_secs(5);

/// Between two tries of what a persist needs before its first chunk.
const RETRY: Duration = Duration::from_secs(1);

/// For how long a persist tries one operation: for ever, in effect. A chunk is read once; while it
/// cannot be stored, it waits in memory.
const NEVER_GIVE_UP: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Snapshots in one page of a list.
const PAGE: u32 = 1000;

/// An [`Upstream`] over a repository. One serves all disks of a mirror.
#[derive(Debug)]
pub struct RepositoryUpstream {
    repository: Repository,
    /// The same, for what is stored: its connections are served by whoever persists.
    stores: Repository,
    limits: PersistLimits,
    lease_ttl: Duration,
    jobs: Mutex<HashMap<SnapshotKey, Arc<Job>>>,
}

/// A snapshot between its begin and its end.
#[derive(Debug)]
struct Job {
    lease: Arc<Lease>,
    /// The lease that the service knows it under.
    begun_under: Mutex<Option<u64>>,
    /// What was stored for it.
    recorder: Mutex<Option<Arc<Recorder>>>,
}

/// Keeps a lease. Dropped, it lets the lease run out instead of releasing it, which would fail the
/// snapshot: whoever drops it without finishing may come back.
#[derive(Debug)]
struct Lease {
    repository: Repository,
    holder: String,
    ttl: Duration,
    keeper: Mutex<Option<Arc<LeaseKeeper>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lease {
    fn new(repository: &Repository, holder: &str, ttl: Duration) -> Self {
        let holder = holder.to_owned();
        Self { repository: repository.clone(), holder, ttl, keeper: Mutex::default() }
    }

    fn start(&self) -> Arc<LeaseKeeper> {
        let catalog = Arc::clone(self.repository.catalog());
        Arc::new(LeaseKeeper::start(catalog, self.holder.clone(), self.ttl))
    }

    /// A lease that lives, as far as is known here; waits for one.
    async fn current(&self) -> Result<v1::Lease, CatalogError> {
        let keeper = Arc::clone(lock(&self.keeper).get_or_insert_with(|| self.start()));
        keeper.current().await
    }

    async fn soon(&self) -> Result<v1::Lease, UpstreamError> {
        match timeout(LEASE_WAIT, self.current()).await {
            // A refusal says nothing about the snapshot, and the keeper asks again.
            Ok(lease) => lease.map_err(|error| UpstreamError::Unavailable(error.to_string())),
            Err(_) => Err(UpstreamError::Unavailable("there is no lease yet".into())),
        }
    }

    /// The service no longer knows it: the next call takes another.
    fn lost(&self, id: u64) {
        tracing::warn!(lease = id, "the lease of a snapshot is lost; taking another");
        self.abandon();
    }

    fn abandon(&self) {
        // Who still waits on it holds another reference, and drops it soon.
        if let Some(keeper) = lock(&self.keeper).take().and_then(Arc::into_inner) {
            keeper.abandon();
        }
    }

    /// Releases it: nothing is pending under it any more.
    async fn release(&self) {
        let keeper = lock(&self.keeper).take().and_then(Arc::into_inner);
        if let Some(keeper) = keeper {
            keeper.shutdown().await;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn error(error: CatalogError) -> UpstreamError {
    match error {
        CatalogError::NotFound(text) => UpstreamError::NotFound(text),
        CatalogError::AlreadyExists(text) => UpstreamError::AlreadyExists(text),
        CatalogError::Invalid(text) | CatalogError::Precondition(text) => {
            UpstreamError::Refused(text)
        }
        CatalogError::Conflict(text)
        | CatalogError::Unavailable(text)
        | CatalogError::Timeout(text) => UpstreamError::Unavailable(text),
    }
}

fn refused(error: impl ToString) -> UpstreamError {
    UpstreamError::Refused(error.to_string())
}

fn image(id: u64) -> v1::ImageRef {
    v1::ImageRef { id, name: String::new() }
}

impl RepositoryUpstream {
    /// Over `repository`. Of `limits`, the time after which a persist gives up does not count: a
    /// disk's snapshots wait for the repository as long as it takes.
    #[must_use]
    pub fn new(repository: Repository, limits: PersistLimits) -> Self {
        let limits = PersistLimits { give_up_after: NEVER_GIVE_UP, ..limits };
        Self {
            stores: repository.apart(),
            repository,
            limits,
            lease_ttl: SNAPSHOT_LEASE_TTL,
            jobs: Mutex::default(),
        }
    }

    /// The same, with another time to live of each snapshot's lease.
    #[must_use]
    pub fn with_lease_ttl(self, lease_ttl: Duration) -> Self {
        Self { lease_ttl, ..self }
    }

    fn job(&self, key: &SnapshotKey) -> Arc<Job> {
        let mut jobs = lock(&self.jobs);
        let make = || {
            Arc::new(Job {
                lease: Arc::new(Lease::new(&self.repository, &key.writer, self.lease_ttl)),
                begun_under: Mutex::default(),
                recorder: Mutex::default(),
            })
        };
        Arc::clone(jobs.entry(key.clone()).or_insert_with(make))
    }

    /// The snapshot is settled: its lease is released, in the background.
    fn end(&self, key: &SnapshotKey) {
        if let Some(job) = lock(&self.jobs).remove(key) {
            tokio::spawn(async move { job.lease.release().await });
        }
    }

    /// Begins the snapshot under a lease that lives, or takes it up under a new one.
    async fn begin_under(&self, key: &SnapshotKey, job: &Job) -> Result<v1::Lease, UpstreamError> {
        let lease = job.lease.soon().await?;
        if *lock(&job.begun_under) == Some(lease.id) {
            return Ok(lease);
        }
        let request = v1::BeginSnapshotRequest {
            image_id: key.image_id,
            number: key.number,
            lease_id: lease.id,
            writer: key.writer.clone(),
        };
        match self.repository.catalog().begin_snapshot(request).await {
            Ok(_) => {
                *lock(&job.begun_under) = Some(lease.id);
                Ok(lease)
            }
            Err(refusal @ CatalogError::Precondition(_)) => {
                // The snapshot has failed under its old lease, or this lease is gone.
                match self.snapshot(key.image_id, key.number).await {
                    Ok(found) if found.state() != SnapshotState::Pending => {
                        Err(refused(settled(&found)))
                    }
                    Ok(_) | Err(UpstreamError::NotFound(_)) if !self.lives(&lease).await => {
                        job.lease.lost(lease.id);
                        Err(UpstreamError::Unavailable(refusal.to_string()))
                    }
                    Ok(_) | Err(UpstreamError::NotFound(_)) => Err(error(refusal)),
                    Err(other) => Err(other),
                }
            }
            Err(other) => Err(error(other)),
        }
    }

    async fn record_failure(&self, key: &SnapshotKey, reason: &str) -> Result<(), UpstreamError> {
        let catalog = self.repository.catalog();
        let request = || v1::FailSnapshotRequest {
            image_id: key.image_id,
            number: key.number,
            writer: key.writer.clone(),
            reason: reason.to_owned(),
        };
        let failed = match catalog.fail_snapshot(request()).await {
            Err(CatalogError::NotFound(_)) => {
                // It was never begun: its number is taken now, so that whoever was told of it can
                // see what became of it.
                let job = self.job(key);
                self.begin_under(key, &job).await?;
                catalog.fail_snapshot(request()).await
            }
            done => done,
        };
        failed.map_err(error).map(|_| ())
    }

    async fn lives(&self, lease: &v1::Lease) -> bool {
        let renewed =
            self.repository.catalog().renew_lease(v1::RenewLeaseRequest { lease_id: lease.id });
        !matches!(renewed.await, Err(CatalogError::Precondition(_) | CatalogError::NotFound(_)))
    }

    async fn try_pool(
        &self,
        id: u32,
    ) -> Result<(Arc<dyn ObjectStore>, Arc<dyn NodeSource>), CatalogError> {
        Ok((self.stores.pool(id).await?, self.repository.nodes(id).await?))
    }

    /// Opens the pool; waits for the repository.
    async fn pool(
        &self,
        id: u32,
        stalled: &(dyn Fn(Option<String>) + Send + Sync),
    ) -> Result<(Arc<dyn ObjectStore>, Arc<dyn NodeSource>), UpstreamError> {
        loop {
            match self.try_pool(id).await.map_err(error) {
                Err(error) if error.is_transient() => stalled(Some(error.to_string())),
                done => return done,
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Why a snapshot that is no longer pending cannot be published.
fn settled(snapshot: &v1::Snapshot) -> String {
    let state = snapshot.state().as_str_name().trim_start_matches("SNAPSHOT_STATE_").to_lowercase();
    let name = format!("{}@{}", snapshot.image, snapshot.number);
    if snapshot.reason.is_empty() {
        return format!("{name} is {state} in the repository");
    }
    format!("{name} is {state} in the repository: {}", snapshot.reason)
}

/// A snapshot's chunks as the persist pipeline wants them.
struct Chunks<'a>(&'a dyn SnapshotChunks);

#[async_trait]
impl ChunkSource for Chunks<'_> {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError> {
        self.0.chunk(index).await.map_err(|error| SourceError::new(index, error))
    }
}

#[async_trait]
impl Upstream for RepositoryUpstream {
    async fn clone_image(
        &self,
        name: &str,
        source: &v1::SnapshotRef,
        writer: &str,
    ) -> Result<v1::CloneImageResponse, UpstreamError> {
        let catalog = self.repository.catalog();
        let request = v1::CloneImageRequest {
            source: Some(source.clone()),
            name: name.to_owned(),
            writer: writer.to_owned(),
        };
        let taken = match catalog.clone_image(request).await {
            Err(taken @ CatalogError::AlreadyExists(_)) => taken,
            done => return done.map_err(error),
        };
        // Perhaps by an earlier try of ours, whose answer was lost.
        let by_name = v1::ImageRef { name: name.to_owned(), id: 0 };
        let found = catalog.get_image(by_name).await.map_err(error)?;
        let parent = source.image.as_ref().map_or(0, |image| image.id);
        let ours = found.writer == writer
            && found.parent_image == parent
            && found.parent_snapshot == source.number;
        if !ours {
            return Err(error(taken));
        }
        let first = v1::SnapshotRef { image: Some(image(found.id)), number: 1 };
        let snapshot = catalog.get_snapshot(first).await.map_err(error)?;
        Ok(v1::CloneImageResponse { image: Some(found), snapshot: Some(snapshot) })
    }

    async fn begin(&self, key: &SnapshotKey) -> Result<(), UpstreamError> {
        let job = self.job(key);
        self.begin_under(key, &job).await.map(|_| ())
    }

    async fn persist(&self, key: &SnapshotKey, work: Work<'_>) -> Result<Persisted, UpstreamError> {
        let base = Root::try_from(&work.base).map_err(refused)?;
        let geometry =
            Geometry::new(work.size_bytes, base.geometry.chunk_size, base.geometry.fan_out)
                .map_err(refused)?;
        let (pool, nodes) = self.pool(work.pool, work.stalled).await?;
        let job = self.job(key);
        let recorder = Arc::new(Recorder::new(pool, Arc::clone(&job.lease)));
        *lock(&job.recorder) = Some(Arc::clone(&recorder));
        let stalled = work.stalled;
        let progress = move |progress: Progress| stalled(progress.stalled);
        let persist_job = PersistJob {
            base,
            geometry,
            chunks: work.chunks,
            // The recorder knows the lease that lives.
            generation: 0,
            source: &Chunks(work.source),
            progress: &progress,
            limits: self.limits.clone(),
        };
        let persisted = persist(&*recorder, &*nodes, persist_job).await.map_err(refused)?;
        Ok(Persisted { root: persisted.root.to_wire(), stats: persisted.stats })
    }

    async fn publish(
        &self,
        key: &SnapshotKey,
        persisted: &Persisted,
    ) -> Result<v1::Snapshot, UpstreamError> {
        let job = self.job(key);
        let lease = self.begin_under(key, &job).await?;
        let recorder = lock(&job.recorder).clone();
        if let Some(recorder) = recorder {
            recorder.touch_older_than(lease.generation).await?;
        }
        let request = v1::PublishSnapshotRequest {
            image_id: key.image_id,
            number: key.number,
            lease_id: lease.id,
            writer: key.writer.clone(),
            root: Some(persisted.root.clone()),
            stats: Some(persisted.stats),
        };
        match self.repository.catalog().publish_snapshot(request).await {
            Ok(snapshot) => {
                self.end(key);
                Ok(snapshot)
            }
            Err(refusal @ CatalogError::Precondition(_)) => {
                let found = self.snapshot(key.image_id, key.number).await?;
                if found.state() != SnapshotState::Pending {
                    return Err(refused(settled(&found)));
                }
                if self.lives(&lease).await {
                    return Err(error(refusal));
                }
                job.lease.lost(lease.id);
                Err(UpstreamError::Unavailable(refusal.to_string()))
            }
            Err(other) => Err(error(other)),
        }
    }

    async fn fail(&self, key: &SnapshotKey, reason: &str) -> Result<(), UpstreamError> {
        // Nothing more is stored for it. If the repository cannot be told, the lease runs out, and
        // the service draws the conclusion by itself.
        if let Some(job) = lock(&self.jobs).get(key) {
            job.lease.abandon();
        }
        let failed = self.record_failure(key, reason).await;
        if !matches!(&failed, Err(error) if error.is_transient()) {
            self.end(key);
        }
        failed
    }

    async fn snapshot(&self, image_id: u64, number: u64) -> Result<v1::Snapshot, UpstreamError> {
        let reference = v1::SnapshotRef { image: Some(image(image_id)), number };
        self.repository.catalog().get_snapshot(reference).await.map_err(error)
    }

    async fn pin(&self, image_id: u64, number: u64, holder: &str) -> Result<(), UpstreamError> {
        let snapshot = Some(v1::SnapshotRef { image: Some(image(image_id)), number });
        let request = v1::PinSnapshotRequest { snapshot, holder: holder.to_owned() };
        self.repository.catalog().pin_snapshot(request).await.map_err(error).map(|_| ())
    }

    async fn unpin(&self, image_id: u64, number: u64, holder: &str) -> Result<(), UpstreamError> {
        let request = v1::UnpinSnapshotRequest { image_id, number, holder: holder.to_owned() };
        self.repository.catalog().unpin_snapshot(request).await.map_err(error).map(|_| ())
    }

    async fn pending(&self, image_id: u64) -> Result<Vec<u64>, UpstreamError> {
        let mut pending = Vec::new();
        let mut after_number = 0;
        loop {
            let request = v1::ListSnapshotsRequest {
                image: Some(image(image_id)),
                after_number,
                limit: PAGE,
            };
            let page = self.repository.catalog().list_snapshots(request).await.map_err(error)?;
            let found = page.snapshots.iter().filter(|s| s.state() == SnapshotState::Pending);
            pending.extend(found.map(|snapshot| snapshot.number));
            match page.snapshots.last() {
                Some(last) if page.more => after_number = last.number,
                _ => return Ok(pending),
            }
        }
    }
}
