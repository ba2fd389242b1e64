//! A pool in memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;

use super::Faults;
use crate::repository::PoolOpener;
use crate::tree::NodeSource;
use crate::{Catalog, CatalogError, Object, ObjectStore, StoreError, Stored};

/// The operations of a pool, for [`Faults`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolOperation {
    /// [`ObjectStore::put`].
    Put,
    /// [`ObjectStore::get`].
    Get,
    /// [`ObjectStore::touch`].
    Touch,
}

#[derive(Debug, Clone)]
struct Held {
    plain: Bytes,
    generation: u64,
    damaged: bool,
}

#[derive(Debug, Default)]
struct Inner {
    objects: Mutex<HashMap<(RecordKind, Hash), Held>>,
    faults: Faults<PoolOperation, StoreError>,
}

/// A pool in memory. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryPool(Arc<Inner>);

impl MemoryPool {
    fn objects(&self) -> MutexGuard<'_, HashMap<(RecordKind, Hash), Held>> {
        self.0.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes calls fail or wait, and counts them.
    #[must_use]
    pub fn faults(&self) -> &Faults<PoolOperation, StoreError> {
        &self.0.faults
    }

    /// How many objects of `kind` there are.
    #[must_use]
    pub fn count(&self, kind: RecordKind) -> usize {
        self.objects().keys().filter(|(k, _)| *k == kind).count()
    }

    /// Whether the object is there.
    #[must_use]
    pub fn contains(&self, kind: RecordKind, id: &Hash) -> bool {
        self.objects().contains_key(&(kind, *id))
    }

    /// The identities of all objects of `kind`, in no order.
    #[must_use]
    pub fn ids(&self, kind: RecordKind) -> Vec<Hash> {
        self.objects().keys().filter(|(k, _)| *k == kind).map(|(_, id)| *id).collect()
    }

    /// The generation that last touched the object.
    #[must_use]
    pub fn generation(&self, kind: RecordKind, id: &Hash) -> Option<u64> {
        self.objects().get(&(kind, *id)).map(|held| held.generation)
    }

    /// Loses the object; whether it was there.
    pub fn lose(&self, kind: RecordKind, id: &Hash) -> bool {
        self.objects().remove(&(kind, *id)).is_some()
    }

    /// Damages the object: reads of it fail until it is put again; whether it was there.
    pub fn damage(&self, kind: RecordKind, id: &Hash) -> bool {
        self.objects().get_mut(&(kind, *id)).is_some_and(|held| {
            held.damaged = true;
            true
        })
    }
}

#[async_trait]
impl ObjectStore for MemoryPool {
    async fn put(&self, generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError> {
        self.0.faults.enter(PoolOperation::Put).await?;
        let mut stored = Stored::default();
        let mut held = self.objects();
        for Object { kind, id, plain } in objects {
            let actual = Hash::of(&plain);
            if actual != id {
                return Err(StoreError::Refused {
                    node: "memory".into(),
                    detail: format!("record {id}: its bytes have the identity {actual}"),
                });
            }
            let before = held.get(&(kind, id)).filter(|held| !held.damaged);
            if before.is_none() {
                stored.objects += 1;
                stored.bytes += plain.len() as u64;
            }
            let generation = before.map_or(0, |held| held.generation).max(generation);
            held.insert((kind, id), Held { plain, generation, damaged: false });
        }
        Ok(stored)
    }

    async fn get(&self, kind: RecordKind, id: &Hash) -> Result<Bytes, StoreError> {
        self.0.faults.enter(PoolOperation::Get).await?;
        match self.objects().get(&(kind, *id)) {
            None => Err(StoreError::Missing { kind, id: *id }),
            Some(held) if held.damaged => {
                Err(StoreError::Damaged { kind, id: *id, detail: "damaged on purpose".into() })
            }
            Some(held) => Ok(held.plain.clone()),
        }
    }

    async fn touch(
        &self,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        self.0.faults.enter(PoolOperation::Touch).await?;
        let mut objects = self.objects();
        let mut touch = |id: &Hash| match objects.get_mut(&(kind, *id)) {
            Some(held) if !held.damaged => {
                held.generation = held.generation.max(generation);
                true
            }
            _ => false,
        };
        Ok(ids.iter().map(&mut touch).collect())
    }
}

#[async_trait]
impl NodeSource for MemoryPool {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let mut nodes = Vec::with_capacity(ids.len());
        for id in ids {
            nodes.push(self.get(RecordKind::TreeNode, id).await?);
        }
        Ok(nodes)
    }
}

#[async_trait]
impl PoolOpener for MemoryPool {
    async fn open(
        &self,
        _catalog: &Arc<dyn Catalog>,
        _pool: v1::Pool,
    ) -> Result<Arc<dyn ObjectStore>, CatalogError> {
        Ok(Arc::new(self.clone()))
    }

    fn apart(self: Arc<Self>) -> Arc<dyn PoolOpener> {
        self
    }
}
