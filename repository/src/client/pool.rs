//! A replicated pool over gRPC.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::record::{self, RecordKey};
use blobcr_proto::v1::{self, Codec, RecordKind};
use blobcr_proto::{Hash, PoolName};
use bytes::Bytes;
use futures::future::{join_all, try_join_all};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use super::ConnectOptions;
use super::link::NodeLink;
use super::status::NodeError;
use crate::compression::{Compression, Compressor};
use crate::placement::{Placement, Policy};
use crate::repository::PoolOpener;
use crate::{Catalog, CatalogError, Object, ObjectStore, StoreError, Stored, cpu};

/// Payload bytes of one put request at most: half of what a message may have.
const PUT_REQUEST_BYTES: usize = blobcr_proto::MESSAGE_BYTES_MAX / 2;
/// Put requests of one call under way at once, each to all its replicas.
const PUTS_AT_ONCE: usize = 8;
/// Identities of one touch request at most: 48 bytes each, and the node looks each one up.
const TOUCH_REQUEST_REFS: usize = 4096;
/// Tree nodes of one get request at most: each is at most 32 KiB, so half a message holds them.
const GET_REQUEST_REFS: usize = 256;
/// Get requests of one call under way at once.
const GETS_AT_ONCE: usize = 8;
/// A node that did not answer is asked last for so long, so that reads do not wait for it again
/// and again.
const SUSPECT_FOR: Duration = Duration::from_secs(2);
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
        PoolName::new(pool.name.as_str()).map_err(|e| invalid(format!("{e}")))?;
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

/// The nodes that were ever needed, by address, and which of them did not answer lately.
#[derive(Debug)]
struct Links {
    options: ConnectOptions,
    by_address: Mutex<HashMap<String, Arc<NodeLink>>>,
    suspects: Mutex<HashMap<String, Instant>>,
}

impl Links {
    fn new(options: ConnectOptions) -> Self {
        Self { options, by_address: Mutex::default(), suspects: Mutex::default() }
    }

    fn to(&self, address: &str) -> Result<Arc<NodeLink>, StoreError> {
        let mut links = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(address) {
            return Ok(Arc::clone(link));
        }
        let link = NodeLink::new(address, &self.options)
            .map_err(|error| StoreError::Unavailable(error.to_string()))?;
        let link = Arc::new(link);
        links.insert(address.to_owned(), Arc::clone(&link));
        Ok(link)
    }

    fn is_suspect(&self, address: &str) -> bool {
        let suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        suspects.get(address).is_some_and(|until| Instant::now() < *until)
    }

    /// Remembers whether the node answered.
    fn noted<T>(&self, link: &NodeLink, answer: &Result<T, NodeError>) {
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Err(NodeError::Unreachable(_)) => {
                suspects.insert(link.address().to_owned(), Instant::now() + SUSPECT_FOR);
            }
            _ if suspects.is_empty() => {}
            _ => {
                suspects.remove(link.address());
            }
        }
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

/// What a node said to a question about one object.
type Answer<T> = Result<T, NodeError>;

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
        let mut holders = Vec::with_capacity(self.replicas);
        for node in placement.holders(id).iter().take(self.replicas) {
            holders.push(self.links.to(&placement.nodes()[*node as usize].address)?);
        }
        if holders.len() > 1 {
            holders.sort_by_key(|link| self.links.is_suspect(link.address()));
        }
        Ok(holders)
    }

    /// One object from one node.
    async fn get_from(&self, link: &NodeLink, kind: RecordKind, id: Hash) -> Answer<Bytes> {
        let refs = vec![RecordKey::whole(kind, id).to_ref()];
        let answer = link.get(v1::GetRequest { pool: self.pool.id, refs }).await;
        self.links.noted(link, &answer);
        let found = answer?.found.into_iter().next().ok_or(NodeError::Absent)?;
        opened(found, kind, id).await
    }

    async fn get_under(
        &self,
        placement: &Placement,
        kind: RecordKind,
        id: Hash,
    ) -> Result<Bytes, StoreError> {
        let mut worst = None;
        for link in self.holders(placement, &id)? {
            match self.get_from(&link, kind, id).await {
                Ok(plain) => return Ok(plain),
                Err(error) => {
                    tracing::debug!(node = link.address(), %id, ?error, "trying the next replica");
                    let error = error.into_store_error(link.address(), kind, id);
                    worst = Some(worst.map_or(error.clone(), |old| graver(old, error)));
                }
            }
        }
        Err(worst.unwrap_or(StoreError::Missing { kind, id }))
    }

    /// Several small objects that have one first choice, in one request to it; an object that it
    /// cannot give comes from the others.
    async fn get_batch(
        &self,
        placement: &Placement,
        link: &NodeLink,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<Bytes>, StoreError> {
        let refs = ids.iter().map(|id| RecordKey::whole(kind, *id).to_ref()).collect();
        let answer = link.get(v1::GetRequest { pool: self.pool.id, refs }).await;
        self.links.noted(link, &answer);
        let mut found = answer.map_or_else(|_| Vec::new(), |answer| answer.found).into_iter();
        let mut plains = Vec::with_capacity(ids.len());
        for id in ids {
            let first = match found.next() {
                Some(found) => opened(found, kind, *id).await,
                None => Err(NodeError::Absent),
            };
            plains.push(match first {
                Ok(plain) => plain,
                Err(_) => self.get_under(placement, kind, *id).await?,
            });
        }
        Ok(plains)
    }

    async fn get_many_under(
        &self,
        placement: &Placement,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<Bytes>, StoreError> {
        let mut by_node: HashMap<String, (Arc<NodeLink>, Vec<usize>)> = HashMap::new();
        for (at, id) in ids.iter().enumerate() {
            let holders = self.holders(placement, id)?;
            let Some(first) = holders.into_iter().next() else {
                return Err(StoreError::Missing { kind, id: *id });
            };
            let entry = by_node.entry(first.address().to_owned());
            entry.or_insert_with(|| (first, Vec::new())).1.push(at);
        }
        let batches: Vec<(Arc<NodeLink>, Vec<usize>)> = by_node
            .into_values()
            .flat_map(|(link, places)| {
                let split = places.chunks(GET_REQUEST_REFS).map(<[usize]>::to_vec);
                split.map(|places| (Arc::clone(&link), places)).collect::<Vec<_>>()
            })
            .collect();
        let fetched: Vec<(Vec<usize>, Vec<Bytes>)> = stream::iter(batches)
            .map(|(link, places)| async move {
                let wanted: Vec<Hash> = places.iter().map(|at| ids[*at]).collect();
                let plains = self.get_batch(placement, &link, kind, &wanted).await?;
                Ok::<_, StoreError>((places, plains))
            })
            .buffer_unordered(GETS_AT_ONCE)
            .try_collect()
            .await?;
        let mut plains = vec![Bytes::new(); ids.len()];
        for (places, of_batch) in fetched {
            for (at, plain) in places.into_iter().zip(of_batch) {
                plains[at] = plain;
            }
        }
        Ok(plains)
    }

    /// Compresses an object as the pool's policy has it.
    async fn encoded(&self, object: Object) -> v1::Record {
        let Object { kind, id, plain } = object;
        let compressor = Arc::clone(&self.compressor);
        cpu::run(plain.len(), move || {
            let plain_len = plain.len();
            let (codec, payload) = match kind {
                // Hashes do not compress.
                RecordKind::TreeNode => (Codec::Plain, plain),
                _ => compressor.encode(plain),
            };
            record::whole(kind, id, codec, plain_len, payload)
        })
        .await
    }

    /// One request to all the replicas of its records.
    async fn put_batch(
        &self,
        generation: u64,
        holders: &[Arc<NodeLink>],
        batch: Vec<(RecordKey, v1::Record)>,
    ) -> Result<Stored, StoreError> {
        let Some((first, _)) = batch.first() else { return Ok(Stored::default()) };
        let first = *first;
        let records: Vec<v1::Record> = batch.into_iter().map(|(_, record)| record).collect();
        let payload = records.iter().map(|record| record.payload.len() as u64).sum::<u64>();
        let count = records.len() as u64;
        let answers = join_all(holders.iter().map(|link| {
            let records = records.clone();
            async move {
                let sending = self.compressor.sending();
                let request = v1::PutRequest { pool: self.pool.id, generation, records };
                let answer = link.put(request).await;
                if answer.is_ok() {
                    sending.done(payload);
                }
                self.links.noted(link, &answer);
                answer.map_err(|e| e.into_store_error(link.address(), first.kind, first.id))
            }
        }))
        .await;
        let mut least: Option<v1::PutResponse> = None;
        for answer in answers {
            let answer = answer?;
            least = Some(match least {
                Some(least) if least.stored <= answer.stored => least,
                _ => answer,
            });
        }
        // An object is new to the repository when it was new to every one of its nodes.
        let least = least.unwrap_or_default();
        let bytes = if u64::from(least.stored) >= count {
            payload
        } else {
            least.stored_bytes.min(payload)
        };
        Ok(Stored { objects: u64::from(least.stored), bytes })
    }

    async fn put_under(
        &self,
        placement: &Placement,
        generation: u64,
        records: &[(RecordKey, v1::Record)],
    ) -> Result<Stored, StoreError> {
        let mut groups: HashMap<&[u32], Vec<Vec<(RecordKey, v1::Record)>>> = HashMap::new();
        for (key, record) in records {
            let batches = groups.entry(placement.holders(&key.id)).or_default();
            let bytes = |batch: &Vec<(RecordKey, v1::Record)>| {
                batch.iter().map(|(_, record)| record.payload.len()).sum::<usize>()
            };
            match batches.last_mut() {
                Some(batch) if bytes(batch) + record.payload.len() <= PUT_REQUEST_BYTES => {
                    batch.push((*key, record.clone()));
                }
                _ => batches.push(vec![(*key, record.clone())]),
            }
        }
        let mut requests = Vec::new();
        for batches in groups.into_values() {
            for batch in batches {
                let Some((key, _)) = batch.first() else { continue };
                requests.push((self.holders(placement, &key.id)?, batch));
            }
        }
        stream::iter(requests)
            .map(
                |(holders, batch)| async move { self.put_batch(generation, &holders, batch).await },
            )
            .buffer_unordered(PUTS_AT_ONCE)
            .try_fold(Stored::default(), |sum, stored| async move {
                Ok(Stored {
                    objects: sum.objects + stored.objects,
                    bytes: sum.bytes + stored.bytes,
                })
            })
            .await
    }

    async fn touch_under(
        &self,
        placement: &Placement,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        let mut by_node: HashMap<u32, Vec<usize>> = HashMap::new();
        for (at, id) in ids.iter().enumerate() {
            for node in placement.holders(id).iter().take(self.replicas) {
                by_node.entry(*node).or_default().push(at);
            }
        }
        let mut requests = Vec::new();
        for (node, places) in &by_node {
            let link = self.links.to(&placement.nodes()[*node as usize].address)?;
            requests.extend(places.chunks(TOUCH_REQUEST_REFS).map(|some| (link.clone(), some)));
        }
        let answers = try_join_all(requests.into_iter().map(|(link, places)| async move {
            let refs = places.iter().map(|at| RecordKey::whole(kind, ids[*at]).to_ref()).collect();
            let request = v1::TouchRequest { pool: self.pool.id, generation, refs };
            let answer = link.touch(request).await;
            self.links.noted(&link, &answer);
            let of = ids[places[0]];
            let answer = answer.map_err(|e| e.into_store_error(link.address(), kind, of))?;
            Ok::<_, StoreError>((places, answer.present))
        }))
        .await?;
        let mut present = vec![true; ids.len()];
        for (places, of_node) in answers {
            // What a node does not answer about, it does not hold.
            let of_node = of_node.into_iter().chain(std::iter::repeat(false));
            for (at, held) in places.iter().zip(of_node) {
                present[*at] &= held;
            }
        }
        Ok(present)
    }
}

/// Takes an object out of a node's answer, checked down to its identity.
async fn opened(found: v1::Found, kind: RecordKind, id: Hash) -> Answer<Bytes> {
    let Some(record) = found.record else {
        return Err(if found.damaged {
            NodeError::Damaged("the node could not read it whole".into())
        } else {
            NodeError::Absent
        });
    };
    let bytes = record.plain_len as usize;
    match cpu::run(bytes, move || record::open(&record)).await {
        Ok((key, plain)) if key == RecordKey::whole(kind, id) => Ok(plain),
        Ok((key, _)) => Err(NodeError::Damaged(format!("the node gave {} instead", key.id))),
        Err(error) => Err(NodeError::Damaged(error.to_string())),
    }
}

/// Of two failures to read an object, the one to tell: while a replica could not be asked, nobody
/// knows whether the object is lost; a damaged copy says more than an absent one.
fn graver(a: StoreError, b: StoreError) -> StoreError {
    let rank = |error: &StoreError| match error {
        StoreError::Unavailable(_) | StoreError::Full { .. } => 3,
        StoreError::Refused { .. } => 2,
        StoreError::Damaged { .. } => 1,
        StoreError::Missing { .. } => 0,
    };
    if rank(&b) > rank(&a) { b } else { a }
}

#[async_trait]
impl ObjectStore for RemotePool {
    async fn put(&self, generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError> {
        let records: Vec<(RecordKey, v1::Record)> = stream::iter(objects)
            .map(|object| async move {
                (RecordKey::whole(object.kind, object.id), self.encoded(object).await)
            })
            .buffered(PUTS_AT_ONCE)
            .collect()
            .await;
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
