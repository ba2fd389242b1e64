//! A pool over gRPC: whole copies, or shards of which some suffice.
//!
//! *Invariant:* an object is acknowledged when as many nodes hold it as the policy asks for, or when
//! fewer do and the metadata service has recorded what is owed.

mod combine;
mod debt;
mod encode;
mod gather;
mod race;
mod read;
mod read_many;
mod touch;
mod write;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::policy::{Compression, Policy};
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::ConnectOptions;
use super::link::{Links, NodeLink};
use debt::Debt;
use race::Pace;

use crate::compression::Compressor;
use crate::placement::Placement;
use crate::repository::PoolOpener;
use crate::stripe::Stripe;
use crate::{Catalog, CatalogError, Object, ObjectStore, StoreError, Stored};

/// The placement table is asked for at most so often when nodes fail.
const REFRESH_EVERY: Duration = Duration::from_millis(500);
/// For the metadata service to answer when a node has told of a newer table: the old one still does.
const HINT_DEADLINE: Duration = Duration::from_secs(1);

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
        let compression: Compression =
            pool.compression.parse().map_err(|e| invalid(format!("{e}")))?;
        let stripe = Stripe::of(policy).map(Arc::new);
        let compression = match compression {
            // All writers must cut the same shards: the codec may not go by what each measures.
            Compression::Adaptive if stripe.is_some() => Compression::Lz4,
            compression => compression,
        };
        Ok(Arc::new(RemotePool {
            catalog: Arc::clone(catalog),
            policy,
            stripe,
            compressor: Arc::new(Compressor::new(compression, Arc::clone(&self.options.clock))),
            links: Arc::clone(&self.links),
            table: RwLock::new(None),
            version: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            deaf: AtomicBool::new(false),
            refresh: tokio::sync::Mutex::new(None),
            chunk_pace: Pace::default(),
            node_pace: Pace::default(),
            pool,
        }))
    }

    fn apart(self: Arc<Self>) -> Arc<dyn PoolOpener> {
        Arc::new(Self::new(self.options.clone()))
    }
}

/// A node, and its place in the row of a partition: which shard it holds.
#[derive(Debug, Clone)]
struct Holder {
    link: Arc<NodeLink>,
    place: usize,
    /// Its index in the table.
    node: u32,
}

/// The table that is in use.
#[derive(Clone)]
struct Known {
    placement: Arc<Placement>,
    /// It was the newest when the lease of this generation had been given.
    generation: u64,
}

/// One pool.
pub struct RemotePool {
    pool: v1::Pool,
    policy: Policy,
    /// How chunks are cut; `None` when they are kept as whole copies.
    stripe: Option<Arc<Stripe>>,
    catalog: Arc<dyn Catalog>,
    compressor: Arc<Compressor>,
    links: Arc<Links>,
    table: RwLock<Option<Known>>,
    /// The version of the table in use, and the newest that a node has told of.
    version: AtomicU64,
    heard: AtomicU64,
    /// What nodes tell is not heard until the metadata service answers again.
    deaf: AtomicBool,
    /// When the table was last asked for. Held while it is.
    refresh: tokio::sync::Mutex<Option<Instant>>,
    /// How long nodes take to answer: for chunks and for tree nodes.
    chunk_pace: Pace,
    node_pace: Pace,
}

impl std::fmt::Debug for RemotePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemotePool").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl RemotePool {
    fn known(&self) -> Option<Known> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The table to read under; to write, one that was asked for since the lease of `generation`
    /// was given. So once all leases from before a table have ended, nobody writes under an older
    /// one.
    async fn placement(&self, generation: u64) -> Result<Arc<Placement>, StoreError> {
        let good = |known: &Known| {
            known.generation >= generation
                && known.placement.version() >= self.heard.load(Ordering::Relaxed)
        };
        if let Some(known) = self.known().filter(good) {
            return Ok(known.placement);
        }
        let mut last = self.refresh.lock().await;
        match self.known() {
            Some(known) if good(&known) => Ok(known.placement),
            Some(known) if known.generation >= generation => {
                let fetch = self.fetch(&mut last, Some(&known), known.generation);
                let newest = timeout(HINT_DEADLINE, fetch).await;
                // A node may be wrong about a newer one, and an old one is good enough: without the
                // metadata service nobody waits for it twice.
                self.heard.store(0, Ordering::Relaxed);
                let Ok(Ok(newest)) = newest else {
                    self.deaf.store(true, Ordering::Relaxed);
                    return Ok(known.placement);
                };
                Ok(newest)
            }
            Some(known) => self.fetch(&mut last, Some(&known), generation).await,
            None => self.fetch(&mut last, None, generation).await,
        }
    }

    /// What a node is told: the table in use.
    fn table_version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    /// What a node tells: the newest table that it knows of.
    fn heard_of(&self, newest_table: u64) {
        if !self.deaf.load(Ordering::Relaxed) {
            self.heard.fetch_max(newest_table, Ordering::Relaxed);
        }
    }

    /// Asks for the table again, unless somebody else has done so since `seen` was in force, or
    /// only just now.
    async fn refreshed(&self, seen: &Arc<Placement>) -> Result<Arc<Placement>, StoreError> {
        let mut last = self.refresh.lock().await;
        let mut generation = 0;
        if let Some(known) = self.known() {
            let newer = !Arc::ptr_eq(seen, &known.placement);
            if newer || last.is_some_and(|at| at.elapsed() < REFRESH_EVERY) {
                return Ok(known.placement);
            }
            generation = known.generation;
        }
        // Whole, though its version be the same: nodes may be at other addresses.
        self.fetch(&mut last, None, generation).await
    }

    /// Asks for the newest table, or whether it is the one that is known.
    async fn fetch(
        &self,
        last: &mut Option<Instant>,
        known: Option<&Known>,
        generation: u64,
    ) -> Result<Arc<Placement>, StoreError> {
        let known_version = known.map_or(0, |known| known.placement.version());
        let request =
            v1::GetPlacementRequest { id: self.pool.id, name: String::new(), known_version };
        let unavailable = |detail: String| {
            StoreError::Unavailable(format!("placement of pool {}: {detail}", self.pool.name))
        };
        let table = self.catalog.get_placement(request).await;
        let table = table.map_err(|e| unavailable(e.to_string()))?;
        let placement = match known {
            Some(known) if table.version == known_version && table.partitions.is_empty() => {
                Arc::clone(&known.placement)
            }
            _ => {
                let placement = Placement::new(table, self.policy.nodes());
                *last = Some(Instant::now());
                Arc::new(placement.map_err(|e| unavailable(e.to_string()))?)
            }
        };
        self.version.store(placement.version(), Ordering::Relaxed);
        self.deaf.store(false, Ordering::Relaxed);
        let known = Known { placement: Arc::clone(&placement), generation };
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Some(known);
        Ok(placement)
    }

    /// Runs `operation`, a write under the lease of `generation` or a read (0), with the table that
    /// is right for it; when a node cannot be reached and the table has changed meanwhile, once more
    /// with the new one. What is owed after that is recorded.
    async fn under_placement<T, F>(
        &self,
        generation: u64,
        operation: impl Fn(Arc<Placement>) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<(T, Debt), StoreError>>,
    {
        let placement = self.placement(generation).await?;
        let first = operation(Arc::clone(&placement)).await;
        let missed = match &first {
            Ok((_, debt)) => !debt.is_empty(),
            Err(error) => !matches!(error, StoreError::Damaged { .. }),
        };
        let newer = if missed { self.refreshed(&placement).await.ok() } else { None };
        let (value, debt) = match newer {
            Some(newer) if !newer.same_nodes(&placement) => operation(newer).await,
            _ => first,
        }?;
        self.record(debt).await?;
        Ok(value)
    }

    /// How objects of `kind` are cut; `None` when each holder has a whole copy.
    fn stripe_of(&self, kind: RecordKind) -> Option<&Arc<Stripe>> {
        self.stripe.as_ref().filter(|_| kind != RecordKind::TreeNode)
    }

    fn pace_of(&self, kind: RecordKind) -> &Pace {
        if kind == RecordKind::TreeNode { &self.node_pace } else { &self.chunk_pace }
    }

    /// The key of the record that the holder at `place` has of an object.
    fn key_at(&self, kind: RecordKind, id: Hash, place: usize) -> RecordKey {
        // A row has far fewer than 255 nodes.
        let shard = self.stripe_of(kind).map_or(0, |_| place as u8 + 1);
        RecordKey { kind, id, shard }
    }

    /// Indices of the nodes of an object, by place.
    fn row<'p>(&self, placement: &'p Placement, kind: RecordKind, id: &Hash) -> &'p [u32] {
        // Every row has as many nodes as the policy needs: the table was checked.
        &placement.holders(id)[..self.policy.of(kind).nodes()]
    }

    /// The nodes of an object, by place.
    fn holders(
        &self,
        placement: &Placement,
        kind: RecordKind,
        id: &Hash,
    ) -> Result<Vec<Holder>, StoreError> {
        let row = self.row(placement, kind, id).iter().enumerate();
        row.map(|(place, node)| {
            let link = self.links.to(&placement.nodes()[*node as usize].address)?;
            Ok(Holder { link, place, node: *node })
        })
        .collect()
    }

    /// The nodes to read an object from, first choice first, but those last that did not answer
    /// lately: its holders, then those that held its partition before, at no place of its row.
    fn choices(
        &self,
        placement: &Placement,
        kind: RecordKind,
        id: &Hash,
    ) -> Result<Vec<Holder>, StoreError> {
        let mut holders = self.holders(placement, kind, id)?;
        let place = placement.holders(id).len();
        for node in &placement.readers(id)[place..] {
            let link = self.links.to(&placement.nodes()[*node as usize].address)?;
            holders.push(Holder { link, place, node: *node });
        }
        if holders.len() > 1 {
            holders.sort_by_key(|holder| self.links.is_asked_last(holder.link.address()));
        }
        Ok(holders)
    }
}

#[async_trait]
impl ObjectStore for RemotePool {
    async fn put(&self, generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError> {
        let encoded = self.encode(objects).await?;
        let encoded = &encoded;
        self.under_placement(generation, |placement| async move {
            self.put_under(&placement, generation, encoded).await
        })
        .await
    }

    async fn get(&self, kind: RecordKind, id: &Hash) -> Result<Bytes, StoreError> {
        self.under_placement(0, |placement| async move {
            Ok((self.get_under(&placement, kind, *id).await?, Debt::default()))
        })
        .await
    }

    async fn get_many(&self, kind: RecordKind, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        self.under_placement(0, |placement| async move {
            Ok((self.get_many_under(&placement, kind, ids).await?, Debt::default()))
        })
        .await
    }

    async fn touch(
        &self,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        self.under_placement(generation, |placement| async move {
            self.touch_under(&placement, generation, kind, ids).await
        })
        .await
    }
}

/// Of two failures, the one to tell: while a node could not be asked, nobody knows whether the
/// object is lost; a damaged copy says more than an absent one.
fn graver(a: StoreError, b: StoreError) -> StoreError {
    let rank = |error: &StoreError| match error {
        StoreError::Unavailable(_) | StoreError::Full { .. } => 3,
        StoreError::Refused { .. } => 2,
        StoreError::Damaged { .. } => 1,
        StoreError::Missing { .. } => 0,
    };
    if rank(&b) > rank(&a) { b } else { a }
}
