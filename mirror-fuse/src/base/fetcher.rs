//! Brings chunks to this host, each once, and waits where a guest must not see an error.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1::RecordKind;
use blobcr_proto::{ChunkSize, Hash};
use blobcr_repository::tree::{Root, TreeError, lookup};
use blobcr_repository::{CatalogError, Repository, StoreError};
use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::flights::{Flights, Progress, Reporter};
use super::nodes::LocalNodes;
use super::stall::Stall;
use super::turns::Turns;
use crate::cache::ChunkCache;

/// How long to wait before asking a repository again that could not be reached, at first and at
/// most: a short outage costs a guest little, a long one costs the network little.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(3);
/// Fetches under way are counted in these: the smallest chunk.
const MEMORY_UNIT: u64 = ChunkSize::MIN.bytes();

/// Why bytes could not be brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FetchError {
    /// Not within the limit, or the mirror is stopping.
    Unavailable(String),
    /// They are lost, damaged or refused: no waiting helps.
    Lost(String),
}

impl From<StoreError> for FetchError {
    fn from(error: StoreError) -> Self {
        match error.is_transient() {
            true => Self::Unavailable(error.to_string()),
            false => Self::Lost(error.to_string()),
        }
    }
}

impl From<CatalogError> for FetchError {
    fn from(error: CatalogError) -> Self {
        match error {
            CatalogError::Timeout(text) => Self::Unavailable(text),
            error if error.is_transient() => Self::Unavailable(error.to_string()),
            error => Self::Lost(error.to_string()),
        }
    }
}

impl From<TreeError> for FetchError {
    fn from(error: TreeError) -> Self {
        match error.is_transient() {
            true => Self::Unavailable(error.to_string()),
            false => Self::Lost(error.to_string()),
        }
    }
}

/// How patient and how greedy fetching is.
#[derive(Clone, Copy, Debug)]
pub struct FetchLimits {
    /// How long a read waits for a repository that cannot be reached.
    pub wait: Duration,
    /// Bytes of chunks being fetched, or on their way into the cache, at most.
    pub memory_bytes: u64,
}

impl Default for FetchLimits {
    /// An hour: a guest that sees an I/O error turns its file system read-only for good. 64 MiB:
    /// enough for the bandwidth-delay product of any network a host has.
    fn default() -> Self {
        Self { wait: Duration::from_secs(3600), memory_bytes: 64 << 20 }
    }
}

/// A chunk, and where it was.
#[derive(Clone, Debug)]
pub(crate) struct Brought {
    pub(crate) bytes: Bytes,
    /// It was on this host when it was asked for.
    pub(crate) was_here: bool,
}

type ChunkFlights = Flights<(u32, Hash), Result<Brought, FetchError>>;
/// Pool, top node of the tree, number of the run.
pub(super) type RunKey = (u32, Hash, u64);
type RunFlights = Flights<RunKey, Result<Arc<[Option<Hash>]>, FetchError>>;

/// What all snapshots of a host fetch through.
#[derive(Debug)]
pub(super) struct Fetcher {
    pub(super) repository: Repository,
    pub(super) cache: Arc<ChunkCache>,
    pub(super) turns: Turns,
    nodes: LocalNodes,
    limits: FetchLimits,
    memory: Arc<Semaphore>,
    stopping: watch::Sender<bool>,
    chunks: ChunkFlights,
    runs: RunFlights,
}

type Attempt<'a, T> = Pin<Box<dyn Future<Output = Result<T, FetchError>> + Send + 'a>>;

impl Fetcher {
    pub(super) fn new(
        repository: Repository,
        cache: Arc<ChunkCache>,
        nodes: LocalNodes,
        limits: FetchLimits,
    ) -> Self {
        // One chunk of the largest size must always fit.
        let units = (limits.memory_bytes / MEMORY_UNIT)
            .clamp(ChunkSize::MAX.bytes() / MEMORY_UNIT, u64::from(u32::MAX >> 4));
        Self {
            repository,
            cache,
            turns: Turns::default(),
            nodes,
            limits,
            memory: Arc::new(Semaphore::new(units as usize)),
            stopping: watch::channel(false).0,
            chunks: Flights::default(),
            runs: Flights::default(),
        }
    }

    /// Ends all waiting: whoever waits gets an error.
    pub(super) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// How long a guest's read waits for a repository that cannot be reached.
    pub(super) const fn patience(&self) -> Duration {
        self.limits.wait
    }

    /// The plain bytes of a chunk of `chunk_size`, from the cache or from the pool.
    pub(super) async fn chunk(
        self: &Arc<Self>,
        pool: u32,
        id: Hash,
        chunk_size: ChunkSize,
        (stall, patience): (&Stall, Duration),
    ) -> Result<Brought, FetchError> {
        let until = Instant::now() + patience;
        let mut had_landed = false;
        let brought = self.patiently(until, stall, || {
            let flight = self.chunks.join(&(pool, id), |reporter| {
                Arc::clone(self).bring_chunk(pool, id, chunk_size, until, reporter)
            });
            had_landed = matches!(&*flight.borrow(), Progress::Landed(_));
            flight
        });
        let brought = brought.await?;
        Ok(Brought { was_here: brought.was_here || had_landed, ..brought })
    }

    /// The identities of the chunks `first..first + count` of a tree.
    pub(super) async fn run(
        self: &Arc<Self>,
        pool: u32,
        root: Root,
        top: Hash,
        chunks: std::ops::Range<u64>,
        (stall, patience): (&Stall, Duration),
    ) -> Result<Arc<[Option<Hash>]>, FetchError> {
        let until = Instant::now() + patience;
        self.patiently(until, stall, || {
            self.runs.join(&(pool, top, chunks.start), |reporter| {
                Arc::clone(self).bring_run(pool, root, chunks.clone(), until, reporter)
            })
        })
        .await
    }

    /// Waits for a flight. One that somebody else started may give up before this caller's time is
    /// over: then another one is started.
    async fn patiently<V: Clone>(
        &self,
        until: Instant,
        stall: &Stall,
        mut join: impl FnMut() -> watch::Receiver<Progress<Result<V, FetchError>>>,
    ) -> Result<V, FetchError> {
        loop {
            let result = land(join(), stall).await;
            match result {
                Err(FetchError::Unavailable(_))
                    if Instant::now() < until && !*self.stopping.borrow() => {}
                result => return result,
            }
        }
    }

    async fn bring_chunk(
        self: Arc<Self>,
        pool: u32,
        id: Hash,
        chunk_size: ChunkSize,
        until: Instant,
        reporter: Reporter<Result<Brought, FetchError>>,
    ) {
        if let Some(bytes) = self.cached(id, chunk_size).await {
            reporter.landed(Ok(Brought { bytes, was_here: true }));
            return;
        }
        let units = (chunk_size.bytes() / MEMORY_UNIT) as u32;
        let permit = tokio::select! {
            permit = Arc::clone(&self.memory).acquire_many_owned(units) => permit,
            // Everybody ahead waits for the repository: so would this one.
            () = tokio::time::sleep_until(until) => {
                let why = "too many reads wait for the repository".to_owned();
                return reporter.landed(Err(FetchError::Unavailable(why)));
            }
            () = self.stopped() => return reporter.landed(Err(stopping())),
        };
        let fetched = self
            .retry(until, &reporter, || {
                Box::pin(async {
                    let store = self.repository.pool(pool).await?;
                    Ok(store.get(RecordKind::Chunk, &id).await?)
                })
            })
            .await
            .and_then(|bytes| match bytes.len() == chunk_size.len() {
                true => Ok(bytes),
                false => Err(FetchError::Lost(format!(
                    "chunk {id} has {} bytes instead of {}",
                    bytes.len(),
                    chunk_size.bytes()
                ))),
            });
        let bytes = fetched.as_ref().ok().cloned();
        reporter.landed(fetched.map(|bytes| Brought { bytes, was_here: false }));
        if let Some(bytes) = bytes {
            // The flight stays listed until the cache has the chunk: nobody fetches it twice.
            let cache = Arc::clone(&self.cache);
            let inserted = tokio::task::spawn_blocking(move || cache.insert(id, &bytes)).await;
            if let Err(error) = inserted {
                tracing::warn!(%error, chunk = %id, "caching a chunk failed");
            }
        }
        drop(permit);
    }

    async fn cached(&self, id: Hash, chunk_size: ChunkSize) -> Option<Bytes> {
        if !self.cache.holds(&id, chunk_size) {
            return None;
        }
        let cache = Arc::clone(&self.cache);
        let read = tokio::task::spawn_blocking(move || cache.read_verified(&id, chunk_size));
        read.await.ok().flatten()
    }

    async fn bring_run(
        self: Arc<Self>,
        pool: u32,
        root: Root,
        chunks: std::ops::Range<u64>,
        until: Instant,
        reporter: Reporter<Result<Arc<[Option<Hash>]>, FetchError>>,
    ) {
        let count = (chunks.end - chunks.start) as usize;
        let source = self.nodes.of_pool(pool, self.repository.clone());
        let found = self
            .retry(until, &reporter, || {
                Box::pin(async { Ok(lookup(&source, &root, chunks.start, count).await?) })
            })
            .await;
        reporter.landed(found.map(Arc::from));
    }

    /// Tries until it works, fails for good, or the time is over; the last try is at its very end.
    async fn retry<'a, T, V>(
        &self,
        until: Instant,
        reporter: &Reporter<V>,
        attempt: impl Fn() -> Attempt<'a, T> + Sync,
    ) -> Result<T, FetchError> {
        let (mut pause, began) = (RETRY_FIRST, Instant::now());
        loop {
            let result = tokio::select! {
                result = attempt() => result,
                () = self.stopped() => return Err(stopping()),
            };
            let reason = match result {
                Err(FetchError::Unavailable(reason)) => reason,
                result => return result,
            };
            reporter.waiting(&reason);
            let now = Instant::now();
            if now >= until {
                let why = format!("{reason} (given up after {} s)", began.elapsed().as_secs());
                return Err(FetchError::Unavailable(why));
            }
            tokio::select! {
                () = tokio::time::sleep_until((now + pause).min(until)) => {}
                () = self.stopped() => return Err(stopping()),
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn stopped(&self) {
        // An error would mean that `self` is gone.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.chunks.under_way() + self.runs.under_way()
    }
}

fn stopping() -> FetchError {
    FetchError::Unavailable("the mirror is stopping".to_owned())
}

/// Waits for the result of a flight, and counts among the stalled while it says that it waits.
async fn land<V: Clone>(
    mut flight: watch::Receiver<Progress<Result<V, FetchError>>>,
    stall: &Stall,
) -> Result<V, FetchError> {
    let mut waiting = None;
    loop {
        match &*flight.borrow_and_update() {
            Progress::Busy => {}
            Progress::Waiting(reason) => {
                let reason = Arc::clone(reason);
                waiting.get_or_insert_with(|| stall.waiter()).says(reason);
            }
            Progress::Landed(result) => return result.clone(),
        }
        if flight.changed().await.is_err() {
            return Err(FetchError::Lost("fetching ended without a result".to_owned()));
        }
    }
}
