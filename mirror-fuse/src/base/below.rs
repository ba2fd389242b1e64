//! The snapshot below a disk, as the disk reads it: how long it waits for chunks, and which.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use async_trait::async_trait;
use blobcr_proto::v1;
use blobcr_repository::tree::Root;
use bytes::Bytes;

use super::{SnapshotBase, Snapshots};
use crate::disk::{Base, BaseError, BaseOpener, Source};
use crate::prefetch::{Prefetcher, ReadAhead};

/// What one disk waited for.
#[derive(Debug, Default)]
struct Waited {
    bytes: AtomicU64,
    ns: AtomicU64,
}

/// Opens the snapshots below one disk, and knows which one that is now.
#[derive(Debug)]
pub struct DiskBases {
    snapshots: Arc<Snapshots>,
    prefetcher: Option<Arc<Prefetcher>>,
    newest: Mutex<Weak<Below>>,
    waited: Arc<Waited>,
}

impl DiskBases {
    /// For a disk that is about to be made or opened. Without a `prefetcher` nothing is fetched ahead
    /// of its reads, and nobody learns what they are.
    #[must_use]
    pub fn new(snapshots: Arc<Snapshots>, prefetcher: Option<Arc<Prefetcher>>) -> Arc<Self> {
        let (newest, waited) = (Mutex::default(), Arc::default());
        Arc::new(Self { snapshots, prefetcher, newest, waited })
    }

    fn newest(&self) -> Option<Arc<Below>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    #[cfg(test)]
    pub(crate) fn is_open(&self, pool: u32, root: Root) -> bool {
        let open = self.snapshots.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(&(pool, root)).is_some_and(|base| base.strong_count() > 0)
    }

    /// Why reads of the snapshot below the disk wait just now; `None` when none does.
    #[must_use]
    pub fn stalled(&self) -> Option<String> {
        self.newest()?.base.stall.reason()
    }

    /// Adds what reads have waited for, and what was fetched ahead of them.
    pub fn describe(&self, disk: &mut v1::Disk) {
        disk.waited_bytes = self.waited.bytes.load(Ordering::Relaxed);
        disk.waited_ms = self.waited.ns.load(Ordering::Relaxed) / 1_000_000;
        if let Some(ahead) = self.newest().as_ref().and_then(|below| below.ahead.as_ref()) {
            (disk.prefetched_bytes, disk.prefetched_used_bytes) = ahead.fetched_and_used();
        }
    }
}

impl BaseOpener for DiskBases {
    fn open(&self, source: &Source) -> Result<Arc<dyn Base>, BaseError> {
        let root = Root::try_from(&source.root).map_err(|error| {
            BaseError::Open(format!("{}@{}: {error}", source.image, source.number))
        })?;
        let base = self.snapshots.base(source.pool, root);
        let snapshot = (source.image_id, source.number);
        let ahead = self.prefetcher.as_ref().map(|prefetcher| prefetcher.of(snapshot, &base));
        let below = Arc::new(Below { base, ahead, waited: Arc::clone(&self.waited) });
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&below);
        Ok(below)
    }
}

/// See the module.
#[derive(Debug)]
struct Below {
    base: Arc<SnapshotBase>,
    ahead: Option<Arc<ReadAhead>>,
    waited: Arc<Waited>,
}

#[async_trait]
impl Base for Below {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn read_local(&self, chunk: u64, within: u64, out: &mut [u8]) -> Result<bool, BaseError> {
        let here = self.base.read_local(chunk, within, out)?;
        if here && let Some(ahead) = &self.ahead {
            ahead.was_read(chunk);
        }
        Ok(here)
    }

    async fn fetch(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        let began = Instant::now();
        let patience = self.base.patience();
        let Some(id) = self.base.look_up(chunk, patience).await? else { return Ok(None) };
        if let Some(ahead) = &self.ahead {
            ahead.awaited(chunk);
        }
        let brought = self.base.bring(chunk, id).await?;
        if !brought.was_here {
            let ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.waited.ns.fetch_add(ns, Ordering::Relaxed);
            self.waited.bytes.fetch_add(self.base.chunk_size().bytes(), Ordering::Relaxed);
        }
        Ok(Some(brought.bytes))
    }

    async fn fetch_unawaited(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        self.base.fetch(chunk).await
    }

    fn may_have_data(&self, chunk: u64) -> Option<bool> {
        self.base.may_have_data(chunk)
    }
}
