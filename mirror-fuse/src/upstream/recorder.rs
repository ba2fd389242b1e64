//! A pool that remembers under which lease everything of a snapshot was stored.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_repository::{CatalogError, Object, ObjectStore, StoreError, Stored};
use bytes::Bytes;

use super::Lease;
use crate::disk::UpstreamError;

/// Identities in one question: 32 bytes each, far below a message's limit.
const TOUCH_BATCH: usize = 4096;

/// Passes everything on to the pool under the lease that lives just then.
pub(super) struct Recorder {
    pool: Arc<dyn ObjectStore>,
    lease: Arc<Lease>,
    /// The generation under which each object is known to be there.
    generations: Mutex<HashMap<(RecordKind, Hash), u64>>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("lease", &self.lease).finish_non_exhaustive()
    }
}

impl Recorder {
    pub(super) fn new(pool: Arc<dyn ObjectStore>, lease: Arc<Lease>) -> Self {
        Self { pool, lease, generations: Mutex::default() }
    }

    fn generations(&self) -> MutexGuard<'_, HashMap<(RecordKind, Hash), u64>> {
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn live(&self) -> Result<v1::Lease, StoreError> {
        // For the pipeline, a lease that cannot be had is like a node that cannot be reached.
        let unavailable = |error: CatalogError| StoreError::Unavailable(error.to_string());
        self.lease.current().await.map_err(unavailable)
    }

    fn record(&self, kind: RecordKind, id: Hash, generation: u64) {
        let mut generations = self.generations();
        let known = generations.entry((kind, id)).or_insert(generation);
        *known = generation.max(*known);
    }

    /// Touches what was last seen under an older generation.
    ///
    /// # Errors
    /// When some of it is no longer there.
    pub(super) async fn touch_older_than(&self, generation: u64) -> Result<(), UpstreamError> {
        let mut older: HashMap<RecordKind, Vec<Hash>> = HashMap::new();
        for ((kind, id), seen) in self.generations().iter() {
            if *seen < generation {
                older.entry(*kind).or_default().push(*id);
            }
        }
        for (kind, ids) in older {
            for ids in ids.chunks(TOUCH_BATCH) {
                let touched = self.pool.touch(generation, kind, ids).await;
                let present = touched.map_err(|error| match error {
                    error if error.is_transient() => UpstreamError::Unavailable(error.to_string()),
                    error => UpstreamError::Refused(error.to_string()),
                })?;
                for (id, present) in ids.iter().zip(present) {
                    if !present {
                        return Err(UpstreamError::Refused(format!(
                            "{kind:?} {id} was collected while this host was cut off from the \
                             repository"
                        )));
                    }
                    self.record(kind, *id, generation);
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl ObjectStore for Recorder {
    async fn put(&self, _generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError> {
        let generation = self.live().await?.generation;
        let ids: Vec<_> = objects.iter().map(|object| (object.kind, object.id)).collect();
        let stored = self.pool.put(generation, objects).await?;
        ids.into_iter().for_each(|(kind, id)| self.record(kind, id, generation));
        Ok(stored)
    }

    async fn get(&self, kind: RecordKind, id: &Hash) -> Result<Bytes, StoreError> {
        self.pool.get(kind, id).await
    }

    async fn touch(
        &self,
        _generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        let generation = self.live().await?.generation;
        let present = self.pool.touch(generation, kind, ids).await?;
        for (id, present) in ids.iter().zip(&present) {
            if *present {
                self.record(kind, *id, generation);
            }
        }
        Ok(present)
    }
}
