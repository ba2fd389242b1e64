//! Tree nodes of a pool, through a bounded cache.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::RecordKind;
use bytes::Bytes;

use crate::tree::NodeSource;
use crate::{ObjectStore, StoreError};

/// Bytes of encodings that a pool's cache keeps at most: the tree of a terabyte of 256 KiB chunks
/// is about 130 MB, and a disk in use needs the paths to its hot ranges only.
const CACHE_BYTES: usize = 64 << 20;

/// Memory that an entry takes beside its encoding (keys, table, reference count), about.
const ENTRY_OVERHEAD: usize = 128;

/// Two generations of entries: a hit in the old one moves to the young one; when the young one has
/// half the budget, it becomes the old one and what was never asked for again is dropped.
#[derive(Debug, Default)]
struct Cache {
    young: HashMap<Hash, Bytes>,
    young_bytes: usize,
    old: HashMap<Hash, Bytes>,
}

impl Cache {
    fn get(&mut self, id: &Hash, budget: usize) -> Option<Bytes> {
        if let Some(encoding) = self.young.get(id) {
            return Some(encoding.clone());
        }
        let encoding = self.old.remove(id)?;
        self.insert(*id, encoding.clone(), budget);
        Some(encoding)
    }

    fn insert(&mut self, id: Hash, encoding: Bytes, budget: usize) {
        let bytes = encoding.len() + ENTRY_OVERHEAD;
        if self.young.insert(id, encoding).is_none() {
            self.young_bytes += bytes;
        }
        if self.young_bytes > budget / 2 {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
    }
}

/// [`NodeSource`] over an [`ObjectStore`]. Nodes never change, so what is cached stays right.
pub struct CachedNodes {
    store: Arc<dyn ObjectStore>,
    cache: Mutex<Cache>,
    budget: usize,
}

impl CachedNodes {
    /// A cache of 64 MiB over `store`.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self::with_budget(store, CACHE_BYTES)
    }

    /// A cache of about `budget` bytes over `store`.
    #[must_use]
    pub fn with_budget(store: Arc<dyn ObjectStore>, budget: usize) -> Self {
        Self { store, cache: Mutex::default(), budget }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl NodeSource for CachedNodes {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let mut found: Vec<Option<Bytes>> = {
            let mut cache = self.cache();
            ids.iter().map(|id| cache.get(id, self.budget)).collect()
        };
        let missing: Vec<Hash> =
            ids.iter().zip(&found).filter(|(_, node)| node.is_none()).map(|(id, _)| *id).collect();
        if !missing.is_empty() {
            let fetched = self.store.get_many(RecordKind::TreeNode, &missing).await?;
            let mut cache = self.cache();
            let gaps = found.iter_mut().filter(|node| node.is_none());
            for ((gap, id), encoding) in gaps.zip(&missing).zip(fetched) {
                // A copy of its own: a slice would keep the whole received frame in memory.
                let encoding = Bytes::copy_from_slice(&encoding);
                cache.insert(*id, encoding.clone(), self.budget);
                *gap = Some(encoding);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MemoryPool, PoolOperation};
    use crate::{Object, StoreError};

    async fn filled(count: u32) -> (MemoryPool, Vec<Hash>) {
        let pool = MemoryPool::default();
        let objects: Vec<Object> = (0..count)
            .map(|at| {
                let plain = Bytes::from(at.to_le_bytes().repeat(25));
                Object { kind: RecordKind::TreeNode, id: Hash::of(&plain), plain }
            })
            .collect();
        let ids = objects.iter().map(|object| object.id).collect();
        pool.put(1, objects).await.unwrap();
        (pool, ids)
    }

    #[tokio::test]
    async fn what_was_read_once_is_not_asked_for_again() {
        let (pool, ids) = filled(50).await;
        let nodes = CachedNodes::new(Arc::new(pool.clone()));
        let first = nodes.nodes(&ids[..30]).await.unwrap();
        assert_eq!(nodes.nodes(&ids).await.unwrap()[..30], first);
        assert_eq!(pool.faults().calls(PoolOperation::Get), 50);
        for (id, encoding) in ids.iter().zip(nodes.nodes(&ids).await.unwrap()) {
            assert_eq!(Hash::of(&encoding), *id, "in order");
        }
        assert_eq!(pool.faults().calls(PoolOperation::Get), 50);
    }

    #[tokio::test]
    async fn the_cache_keeps_to_its_budget_and_to_what_is_used() {
        let (pool, ids) = filled(1000).await;
        let budget = 100 * (100 + ENTRY_OVERHEAD);
        let nodes = CachedNodes::with_budget(Arc::new(pool.clone()), budget);
        for id in &ids[1..] {
            nodes.nodes(&[ids[0], *id]).await.unwrap();
            let cache = nodes.cache();
            assert!(cache.young.len() + cache.old.len() <= 101);
        }
        assert_eq!(pool.faults().calls(PoolOperation::Get), 1000, "the hot one stayed");
        nodes.nodes(&ids[1..2]).await.unwrap();
        assert_eq!(pool.faults().calls(PoolOperation::Get), 1001, "a cold one went");
    }

    #[tokio::test]
    async fn a_failure_is_not_cached() {
        let (pool, ids) = filled(2).await;
        let nodes = CachedNodes::new(Arc::new(pool.clone()));
        pool.faults().fail_next(PoolOperation::Get, 1, StoreError::Unavailable("away".into()));
        assert!(nodes.nodes(&ids).await.is_err());
        assert_eq!(nodes.nodes(&ids).await.unwrap().len(), 2);
    }
}
