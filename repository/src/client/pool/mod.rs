//! A replicated pool over gRPC.

mod read;
mod write;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;
use tokio::time::Instant;

use super::ConnectOptions;
use super::link::{Links, NodeLink};
use crate::compression::{Compression, Compressor};
use crate::placement::{Placement, Policy};
use crate::repository::PoolOpener;
use crate::{Catalog, CatalogError, Object, ObjectStore, StoreError, Stored};

/// The placement table is asked for at most so often when nodes fail.
const REFRESH_EVERY: Duration = Duration::from_millis(500);

/// Opens the pools of a repository. Pools share the connections to their nodes.
#[derive(Debug)]
pub struct RemotePools {
    links: Arc<Links>,
    options: ConnectOptions,
}

impl RemotePools {
    /// Connects to no node before it is needed.
    #[must_use]
    pub fn new(options: ConnectOptions) -> Self {
        Self { links: Arc::new(Links::new(options.clone())), options }
    }
}

#[async_trait]
impl PoolOpener for RemotePools {
    async fn open(
        &self,
        catalog: &Arc<dyn Catalog>,
        pool: v1::Pool,
    ) -> Result<Arc<dyn ObjectStore>, CatalogError> {
        let invalid = |error: String| {
            CatalogError::Invalid(format!("pool {} cannot be used: {error}", pool.name))
        };
        let policy: Policy = pool.policy.parse().map_err(|e| invalid(format!("{e}")))?;
        let Policy::Replica(replicas) = policy else {
            let text = format!("policy {} is not yet supported by this version", pool.policy);
            return Err(invalid(text));
        };
        let compression: Compression =
            pool.compression.parse().map_err(|e| invalid(format!("{e}")))?;
        Ok(Arc::new(RemotePool {
            catalog: Arc::clone(catalog),
            replicas: usize::from(replicas),
            compressor: Arc::new(Compressor::new(compression, Arc::clone(&self.options.clock))),
            links: Arc::clone(&self.links),
            placement: RwLock::new(None),
            refresh: tokio::sync::Mutex::new(None),
            pool,
        }))
    }
}

/// One pool of policy `replica:N`.
pub struct RemotePool {
    pool: v1::Pool,
    replicas: usize,
    catalog: Arc<dyn Catalog>,
    compressor: Arc<Compressor>,
    links: Arc<Links>,
    placement: RwLock<Option<Arc<Placement>>>,
    /// When the table was last asked for. Held while it is.
    refresh: tokio::sync::Mutex<Option<Instant>>,
}

impl std::fmt::Debug for RemotePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemotePool").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl RemotePool {
    async fn placement(&self) -> Result<Arc<Placement>, StoreError> {
        let known = self.placement.read().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some(placement) => Ok(placement),
            None => self.refreshed(None).await,
        }
    }

    /// Asks for the table again, unless somebody else has done so since `seen` was in force, or
    /// only just now.
    async fn refreshed(&self, seen: Option<&Arc<Placement>>) -> Result<Arc<Placement>, StoreError> {
        let mut last = self.refresh.lock().await;
        let known = self.placement.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(known) = known {
            let newer = seen.is_none_or(|seen| !Arc::ptr_eq(seen, &known));
            if newer || last.is_some_and(|at| at.elapsed() < REFRESH_EVERY) {
                return Ok(known);
            }
        }
        let of = v1::PoolRef { id: self.pool.id, name: String::new() };
        let unavailable = |detail: String| {
            StoreError::Unavailable(format!("placement of pool {}: {detail}", self.pool.name))
        };
        let table = self.catalog.get_placement(of).await.map_err(|e| unavailable(e.to_string()))?;
        let placement =
            Placement::new(table, self.replicas).map_err(|e| unavailable(e.to_string()))?;
        let placement = Arc::new(placement);
        *last = Some(Instant::now());
        *self.placement.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::clone(&placement));
        Ok(placement)
    }

    /// Runs `operation` under the table known; when a node cannot be reached and the table has
    /// changed meanwhile, once more under the new one.
    async fn under_placement<T, F>(
        &self,
        operation: impl Fn(Arc<Placement>) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let placement = self.placement().await?;
        let error = match operation(Arc::clone(&placement)).await {
            Err(error) if !matches!(error, StoreError::Damaged { .. }) => error,
            done => return done,
        };
        match self.refreshed(Some(&placement)).await {
            Ok(newer) if !newer.same_nodes(&placement) => operation(newer).await,
            _ => Err(error),
        }
    }

    /// The nodes of an object, first choice first, but those last that did not answer lately.
    fn holders(&self, placement: &Placement, id: &Hash) -> Result<Vec<Arc<NodeLink>>, StoreError> {
        let holders = placement.holders(id);
        self.links_to(placement, &holders[..self.replicas.min(holders.len())])
    }

    /// The nodes to read an object from, in the same order.
    fn readers(&self, placement: &Placement, id: &Hash) -> Result<Vec<Arc<NodeLink>>, StoreError> {
        self.links_to(placement, placement.readers(id))
    }

    fn links_to(
        &self,
        placement: &Placement,
        at: &[u32],
    ) -> Result<Vec<Arc<NodeLink>>, StoreError> {
        let mut holders = Vec::with_capacity(at.len());
        for node in at {
            holders.push(self.links.to(&placement.nodes()[*node as usize].address)?);
        }
        if holders.len() > 1 {
            holders.sort_by_key(|link| self.links.is_suspect(link.address()));
        }
        Ok(holders)
    }
}

#[async_trait]
impl ObjectStore for RemotePool {
    async fn put(&self, generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError> {
        let records = self.encode(objects).await;
        let records = &records;
        self.under_placement(|placement| async move {
            self.put_under(&placement, generation, records).await
        })
        .await
    }

    async fn get(&self, kind: RecordKind, id: &Hash) -> Result<Bytes, StoreError> {
        self.under_placement(|placement| async move { self.get_under(&placement, kind, *id).await })
            .await
    }

    async fn get_many(&self, kind: RecordKind, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        self.under_placement(
            |placement| async move { self.get_many_under(&placement, kind, ids).await },
        )
        .await
    }

    async fn touch(
        &self,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        self.under_placement(|placement| async move {
            self.touch_under(&placement, generation, kind, ids).await
        })
        .await
    }
}
