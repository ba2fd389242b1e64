//! The stages of a persist. They are polled side by side, so that a slow network never keeps a
//! read of the source from finishing (until it has, the mirror copies what guests overwrite).

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::retry::Retry;
use super::{PersistError, PersistJob, Persisted, Progress};
use crate::tree::{self, Change, NewNode, NodeSource};
use crate::{Identified, Object, ObjectStore, StoreError, Stored};

/// Questions which chunks are missing under way at once: the next is on its way while one waits.
const TOUCHES_AT_ONCE: usize = 2;

/// A batch of chunks that waits to be asked about holds at most this part of the memory budget;
/// the rest keeps reads and puts going meanwhile.
const BATCH_PART: usize = 4;

/// Tree nodes asked about in one question: 32-byte identities, far below a message's limit.
const NODE_TOUCH_BATCH: usize = 4096;

/// A chunk in memory, and its part of the memory budget.
struct Loaded<'p> {
    id: Hash,
    plain: Bytes,
    _budget: SemaphorePermit<'p>,
}

/// What the stages have found out so far.
#[derive(Default)]
struct Found {
    changes: Vec<Change>,
    seen: HashSet<Hash>,
    stats: v1::SnapshotStats,
    done: u64,
    stalled: Option<String>,
}

struct Pipeline<'a> {
    pool: &'a dyn ObjectStore,
    nodes: &'a dyn NodeSource,
    job: &'a PersistJob<'a>,
    found: Mutex<Found>,
}

pub(super) async fn run(
    pool: &dyn ObjectStore,
    nodes: &dyn NodeSource,
    job: PersistJob<'_>,
) -> Result<Persisted, PersistError> {
    check(&job)?;
    let begin = Instant::now();
    let pipeline = Pipeline { pool, nodes, job: &job, found: Mutex::default() };
    pipeline.chunks().await?;
    let root = pipeline.tree().await?;
    let mut stats = pipeline.found().stats;
    stats.dirty_chunks = job.chunks.len() as u64;
    stats.dirty_bytes = dirty_bytes(&job);
    stats.persist_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(Persisted { root, stats })
}

fn check(job: &PersistJob<'_>) -> Result<(), PersistError> {
    let sorted = job.chunks.is_sorted_by(|a, b| a < b);
    let chunks = job.geometry.chunks();
    if !sorted || job.chunks.last().is_some_and(|last| *last >= chunks) {
        let text = format!("its chunks must be sorted, each once, and below {chunks}");
        return Err(PersistError::Invalid(text));
    }
    Ok(())
}

fn dirty_bytes(job: &PersistJob<'_>) -> u64 {
    let chunk = job.geometry.chunk_size.bytes();
    let beyond = job
        .chunks
        .last()
        .map_or(0, |last| ((last + 1) * chunk).saturating_sub(job.geometry.size_bytes));
    job.chunks.len() as u64 * chunk - beyond
}

impl Pipeline<'_> {
    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, update: impl FnOnce(&mut Found)) {
        let progress = {
            let mut found = self.found();
            update(&mut found);
            Progress {
                chunks_total: self.job.chunks.len() as u64,
                chunks_done: found.done,
                stored_bytes: found.stats.stored_bytes,
                stalled: found.stalled.clone(),
            }
        };
        (self.job.progress)(progress);
    }

    /// Tries `operation` until it succeeds or the time is up, and reports stalls.
    async fn retry<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        spread: u64,
        operation: impl FnMut() -> F,
    ) -> Result<T, StoreError> {
        let retry = Retry { give_up_after: self.job.limits.give_up_after, spread };
        let stalled = |error: &StoreError| {
            tracing::debug!(%error, "persist stalled; trying again");
            self.report(|found| found.stalled = Some(error.to_string()));
        };
        let done = retry.run(operation, stalled).await?;
        self.found().stalled = None;
        Ok(done)
    }

    /// All chunks of the job become durable.
    async fn chunks(&self) -> Result<(), PersistError> {
        let chunk = self.job.geometry.chunk_size.len();
        let budget = self.job.limits.bytes_in_flight.clamp(chunk, Semaphore::MAX_PERMITS);
        let memory = Semaphore::new(budget);
        let (loaded_in, loaded) = unbounded();
        let (missing_in, missing) = unbounded();
        let batch = (budget / BATCH_PART / chunk).clamp(1, self.job.limits.touch_batch.max(1));
        futures::try_join!(
            self.read_all(&memory, loaded_in),
            self.touch_all(loaded, batch, missing_in),
            self.put_all(missing),
        )?;
        Ok(())
    }

    /// Reads and hashes every chunk; passes on the first of each content.
    async fn read_all<'p>(
        &self,
        memory: &'p Semaphore,
        loaded: UnboundedSender<Loaded<'p>>,
    ) -> Result<(), PersistError> {
        let loaded = &loaded;
        let chunk = self.job.geometry.chunk_size.len() as u32;
        stream::iter(self.job.chunks.iter().copied())
            .then(|index| async move {
                let budget = memory.acquire_many(chunk).await;
                Ok((index, budget.expect("the semaphore is never closed")))
            })
            .try_for_each_concurrent(self.job.limits.reads.max(1), |(index, budget)| async move {
                if let Some((id, plain)) = self.read(index).await? {
                    // The receiver is gone only when its stage failed, which ends the job.
                    let _ = loaded.unbounded_send(Loaded { id, plain, _budget: budget });
                }
                Ok(())
            })
            .await
    }

    /// `None` when nothing is left to do: zeros, or content that this job has met before.
    async fn read(&self, index: u64) -> Result<Option<(Hash, Bytes)>, PersistError> {
        let Some(Identified { id, plain }) = self.job.source.chunk(index).await? else {
            self.report(|found| {
                found.changes.push((index, None));
                found.stats.zero_chunks += 1;
                found.done += 1;
            });
            return Ok(None);
        };
        let chunk = self.job.geometry.chunk_size.len();
        if plain.len() != chunk {
            let text = format!("chunk {index} has {} bytes instead of {chunk}", plain.len());
            return Err(PersistError::Invalid(text));
        }
        let first = {
            let mut found = self.found();
            found.changes.push((index, Some(id)));
            found.seen.insert(id)
        };
        if !first {
            self.report(|found| found.done += 1);
        }
        Ok(first.then_some((id, plain)))
    }

    /// Asks which chunks are missing and passes those on, in groups for one put each.
    async fn touch_all<'p>(
        &self,
        loaded: UnboundedReceiver<Loaded<'p>>,
        batch: usize,
        missing: UnboundedSender<Vec<Loaded<'p>>>,
    ) -> Result<(), PersistError> {
        let missing = &missing;
        let limit = self.job.limits.put_bytes;
        loaded
            .chunks(batch)
            .map(Ok)
            .try_for_each_concurrent(TOUCHES_AT_ONCE, |batch| async move {
                let ids: Vec<Hash> = batch.iter().map(|loaded| loaded.id).collect();
                let present = self.touch(RecordKind::Chunk, &ids).await?;
                let there = present.iter().filter(|present| **present).count() as u64;
                let absent = batch.into_iter().zip(present).filter(|(_, present)| !present);
                for group in grouped(absent.map(|(loaded, _)| loaded), limit, |l| l.plain.len()) {
                    // As in the stage before.
                    let _ = missing.unbounded_send(group);
                }
                self.report(|found| found.done += there);
                Ok(())
            })
            .await
    }

    async fn put_all(
        &self,
        missing: UnboundedReceiver<Vec<Loaded<'_>>>,
    ) -> Result<(), PersistError> {
        missing
            .map(Ok)
            .try_for_each_concurrent(self.job.limits.puts.max(1), |group| async move {
                let object = |Loaded { id, plain, .. }: &Loaded<'_>| Object {
                    kind: RecordKind::Chunk,
                    id: *id,
                    plain: plain.clone(),
                };
                let stored = self.put(group.iter().map(object).collect()).await?;
                self.report(|found| {
                    found.done += group.len() as u64;
                    found.stats.stored_chunks += stored.objects;
                    found.stats.stored_bytes += stored.bytes;
                });
                Ok(())
            })
            .await
    }

    async fn touch(&self, kind: RecordKind, ids: &[Hash]) -> Result<Vec<bool>, StoreError> {
        let spread = ids.first().map_or(0, Hash::prefix);
        let generation = self.job.generation;
        self.retry(spread, || self.pool.touch(generation, kind, ids)).await
    }

    async fn put(&self, objects: Vec<Object>) -> Result<Stored, StoreError> {
        let bytes = objects.iter().map(|object| object.plain.len() as u64).sum();
        let spread = objects.first().map_or(0, |object| object.id.prefix());
        let generation = self.job.generation;
        let bandwidth = self.job.limits.bandwidth.as_deref();
        if let Some(bandwidth) = bandwidth {
            bandwidth.take(bytes).await;
        }
        let stored = self.retry(spread, || self.pool.put(generation, objects.clone())).await?;
        if let Some(bandwidth) = bandwidth {
            bandwidth.give_back(bytes.saturating_sub(stored.bytes));
        }
        Ok(stored)
    }

    /// The tree over the chunks becomes durable.
    async fn tree(&self) -> Result<tree::Root, PersistError> {
        let mut changes = std::mem::take(&mut self.found().changes);
        changes.sort_unstable_by_key(|(index, _)| *index);
        let updated = tree::update(self, &self.job.base, self.job.geometry, &changes).await?;
        self.found().stats.tree_nodes = updated.new_nodes.len() as u64;
        let ids: Vec<Hash> = updated.new_nodes.iter().map(|node| node.id).collect();
        let mut present = Vec::with_capacity(ids.len());
        for batch in ids.chunks(NODE_TOUCH_BATCH) {
            present.extend(self.touch(RecordKind::TreeNode, batch).await?);
        }
        let absent = updated.new_nodes.into_iter().zip(present).filter(|(_, present)| !present);
        let object = |(NewNode { id, encoding }, _)| Object {
            kind: RecordKind::TreeNode,
            id,
            plain: encoding,
        };
        let groups =
            grouped(absent.map(object), self.job.limits.put_bytes, |object| object.plain.len());
        let puts = stream::iter(groups).map(Ok).try_for_each_concurrent(
            self.job.limits.puts.max(1),
            |group| async move {
                let stored = self.put(group).await?;
                self.report(|found| found.stats.stored_bytes += stored.bytes);
                Ok::<(), PersistError>(())
            },
        );
        #[cfg(feature = "planted-bugs")]
        if blobcr_proto::planted::has(blobcr_proto::planted::Bug::PublishEarly) {
            let soon = std::time::Duration::from_millis(20);
            return match tokio::time::timeout(soon, puts).await {
                Ok(Err(error)) => Err(error),
                Ok(Ok(())) | Err(_) => Ok(updated.root),
            };
        }
        puts.await?;
        Ok(updated.root)
    }
}

/// The base's nodes, tried again like everything else of the job.
#[async_trait]
impl NodeSource for Pipeline<'_> {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let spread = ids.first().map_or(0, Hash::prefix);
        self.retry(spread, || self.nodes.nodes(ids)).await
    }
}

/// Splits items into groups of at most `limit` bytes (or one item).
fn grouped<T>(
    items: impl Iterator<Item = T>,
    limit: usize,
    bytes_of: impl Fn(&T) -> usize,
) -> Vec<Vec<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let more = bytes_of(&item);
        match groups.last_mut() {
            Some(group) if bytes + more <= limit => {
                group.push(item);
                bytes += more;
            }
            _ => {
                groups.push(vec![item]);
                bytes = more;
            }
        }
    }
    groups
}
