//! A version manager in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use blobcr_proto::v1::{self, SnapshotState};
use blobcr_proto::{ChunkSize, ImageName};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::Faults;
use crate::placement::Policy;
use crate::{Catalog, CatalogError};

type Answer<T> = Result<T, CatalogError>;

#[derive(Debug)]
struct ImageRecord {
    image: v1::Image,
    snapshots: BTreeMap<u64, v1::Snapshot>,
    removed: bool,
}

#[derive(Debug, Default)]
struct State {
    images: BTreeMap<u64, ImageRecord>,
    leases: BTreeMap<u64, (v1::Lease, Instant)>,
    last_lease: u64,
    pools: BTreeMap<u32, v1::Pool>,
    nodes: BTreeMap<String, v1::Node>,
    /// Node ids of each pool's table, fixed once made.
    placements: BTreeMap<u32, Vec<String>>,
    sets: BTreeMap<(String, u64), v1::CheckpointSet>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    faults: Faults<&'static str, CatalogError>,
}

/// A [`Catalog`] in memory; clones share it. It starts with pool `default` (id 1, `replica:1`).
/// Leases run on tokio's clock, so a paused clock drives them.
#[derive(Debug, Clone)]
pub struct MemoryCatalog(Arc<Inner>);

impl Default for MemoryCatalog {
    fn default() -> Self {
        let pool = v1::Pool {
            id: 1,
            name: "default".into(),
            policy: "replica:1".into(),
            partitions: PARTITIONS,
            compression: "adaptive".into(),
        };
        let state = State { pools: BTreeMap::from([(1, pool)]), ..State::default() };
        Self(Arc::new(Inner {
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            faults: Faults::default(),
        }))
    }
}

/// Partitions of a pool, as the real service has them.
const PARTITIONS: u32 = 1024;
/// Entries of a list's page when the request names no limit.
const PAGE: usize = 1000;

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn precondition<T>(text: impl Into<String>) -> Answer<T> {
    Err(CatalogError::Precondition(text.into()))
}

fn invalid(error: impl ToString) -> CatalogError {
    CatalogError::Invalid(error.to_string())
}

fn page_limit(limit: u32) -> usize {
    match limit {
        0 => PAGE,
        limit => limit as usize,
    }
}

impl State {
    fn image_id(&self, of: &v1::ImageRef) -> Answer<u64> {
        let found = if of.name.is_empty() {
            self.images.get(&of.id).filter(|record| !record.removed).map(|record| record.image.id)
        } else {
            self.images
                .values()
                .find(|record| !record.removed && record.image.name == of.name)
                .map(|record| record.image.id)
        };
        found.ok_or_else(|| {
            let name = if of.name.is_empty() { of.id.to_string() } else { of.name.clone() };
            CatalogError::NotFound(format!("there is no image {name}"))
        })
    }

    fn image(&self, of: &v1::ImageRef) -> Answer<&ImageRecord> {
        let id = self.image_id(of)?;
        Ok(&self.images[&id])
    }

    fn snapshot(&self, of: &v1::SnapshotRef) -> Answer<&v1::Snapshot> {
        let record = self.image(&of.image.clone().unwrap_or_default())?;
        let number = if of.number == 0 { record.image.latest } else { of.number };
        record.snapshots.get(&number).ok_or_else(|| {
            let name = &record.image.name;
            CatalogError::NotFound(if of.number == 0 {
                format!("{name} has no stable snapshot yet")
            } else {
                format!("there is no snapshot {name}@{number}")
            })
        })
    }

    fn writable(&mut self, image_id: u64, writer: &str) -> Answer<&mut ImageRecord> {
        let record = self
            .images
            .get_mut(&image_id)
            .filter(|record| !record.removed)
            .ok_or_else(|| CatalogError::NotFound(format!("there is no image {image_id}")))?;
        let owner = &record.image.writer;
        if !owner.is_empty() && owner != writer {
            return precondition(format!(
                "{} belongs to the writer {owner:?}, not to {writer:?}",
                record.image.name
            ));
        }
        Ok(record)
    }

    fn live_lease(&self, id: u64) -> Answer<()> {
        match self.leases.get(&id) {
            Some((_, until)) if Instant::now() < *until => Ok(()),
            _ => precondition(format!("lease {id} has run out")),
        }
    }

    fn pool(&self, of: &v1::PoolRef) -> Answer<&v1::Pool> {
        let wanted = if of.name.is_empty() && of.id == 0 { "default" } else { &of.name };
        self.pools
            .values()
            .find(|pool| if wanted.is_empty() { pool.id == of.id } else { pool.name == wanted })
            .ok_or_else(|| {
                let name = if wanted.is_empty() { of.id.to_string() } else { wanted.to_owned() };
                CatalogError::NotFound(format!("there is no pool {name}"))
            })
    }

    fn add_image(&mut self, mut image: v1::Image) -> Answer<&mut ImageRecord> {
        ImageName::new(image.name.as_str()).map_err(invalid)?;
        if self.images.values().any(|r| !r.removed && r.image.name == image.name) {
            return Err(CatalogError::AlreadyExists(format!(
                "there is an image {} already",
                image.name
            )));
        }
        let id = self.images.keys().next_back().copied().unwrap_or(0) + 1;
        image.id = id;
        image.created_unix_ms = unix_ms();
        let record = ImageRecord { image, snapshots: BTreeMap::new(), removed: false };
        Ok(self.images.entry(id).or_insert(record))
    }

    fn derived(&self, set: &v1::CheckpointSet) -> v1::CheckpointSet {
        let vms: std::collections::BTreeSet<_> = set.members.iter().map(|m| &m.vm).collect();
        let complete = vms.len() as u64 >= u64::from(set.expected_vms);
        let stable = |member: &v1::SetMember| {
            let image = Some(v1::ImageRef { name: member.image.clone(), id: 0 });
            let found = self.snapshot(&v1::SnapshotRef { image, number: member.number });
            found.is_ok_and(|snapshot| snapshot.state() == SnapshotState::Stable)
        };
        let stable = complete && set.members.iter().all(stable);
        v1::CheckpointSet { complete, stable, ..set.clone() }
    }
}

impl MemoryCatalog {
    /// Makes calls fail or wait, and counts them. Operations are named like the methods.
    #[must_use]
    pub fn faults(&self) -> &Faults<&'static str, CatalogError> {
        &self.0.faults
    }

    /// Takes a lease away, as if its time had passed.
    pub fn expire_lease(&self, id: u64) {
        self.state().leases.remove(&id);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call<T>(
        &self,
        operation: &'static str,
        body: impl FnOnce(&mut State) -> Answer<T>,
    ) -> Answer<T> {
        self.0.faults.enter(operation).await?;
        let answer = body(&mut self.state());
        self.0.changed.send_modify(|changes| *changes += 1);
        answer
    }
}

#[async_trait]
impl Catalog for MemoryCatalog {
    async fn create_image(&self, request: v1::CreateImageRequest) -> Answer<v1::Image> {
        self.call("create_image", |state| {
            let pool = state.pool(&v1::PoolRef { name: request.pool, id: 0 })?.id;
            let chunk_size = match request.chunk_size {
                0 => ChunkSize::DEFAULT,
                bytes => ChunkSize::new(u64::from(bytes)).map_err(invalid)?,
            };
            let image = v1::Image {
                name: request.name,
                pool,
                chunk_size: chunk_size.len() as u32,
                writer: request.writer,
                ..v1::Image::default()
            };
            Ok(state.add_image(image)?.image.clone())
        })
        .await
    }

    async fn get_image(&self, request: v1::ImageRef) -> Answer<v1::Image> {
        self.call("get_image", |state| Ok(state.image(&request)?.image.clone())).await
    }

    async fn list_images(&self, request: v1::ListImagesRequest) -> Answer<v1::ListImagesResponse> {
        self.call("list_images", |state| {
            let mut images: Vec<_> = state
                .images
                .values()
                .filter(|record| !record.removed && record.image.name > request.after_name)
                .map(|record| record.image.clone())
                .collect();
            images.sort_by(|a, b| a.name.cmp(&b.name));
            let limit = page_limit(request.limit);
            let more = images.len() > limit;
            images.truncate(limit);
            Ok(v1::ListImagesResponse { images, more })
        })
        .await
    }

    async fn clone_image(&self, request: v1::CloneImageRequest) -> Answer<v1::CloneImageResponse> {
        self.call("clone_image", |state| {
            let source = state.snapshot(&request.source.unwrap_or_default())?.clone();
            if source.state() != SnapshotState::Stable {
                return precondition(format!(
                    "{}@{} is not stable: it cannot be cloned",
                    source.image, source.number
                ));
            }
            let of = &state.images[&source.image_id].image;
            let image = v1::Image {
                name: request.name,
                pool: of.pool,
                chunk_size: of.chunk_size,
                parent_image: source.image_id,
                parent_snapshot: source.number,
                writer: request.writer,
                latest: 1,
                highest_number: 1,
                ..v1::Image::default()
            };
            let record = state.add_image(image)?;
            let now = unix_ms();
            let snapshot = v1::Snapshot {
                image_id: record.image.id,
                image: record.image.name.clone(),
                number: 1,
                state: SnapshotState::Stable.into(),
                root: source.root,
                created_unix_ms: now,
                stable_unix_ms: now,
                ..v1::Snapshot::default()
            };
            record.snapshots.insert(1, snapshot.clone());
            Ok(v1::CloneImageResponse {
                image: Some(record.image.clone()),
                snapshot: Some(snapshot),
            })
        })
        .await
    }

    async fn remove_image(&self, request: v1::ImageRef) -> Answer<v1::RemoveImageResponse> {
        self.call("remove_image", |state| {
            let id = state.image_id(&request)?;
            if let Some(record) = state.images.get_mut(&id) {
                record.removed = true;
                for snapshot in record.snapshots.values_mut() {
                    snapshot.set_state(SnapshotState::Obsolete);
                }
            }
            Ok(v1::RemoveImageResponse {})
        })
        .await
    }

    async fn begin_snapshot(&self, request: v1::BeginSnapshotRequest) -> Answer<v1::Snapshot> {
        self.call("begin_snapshot", |state| {
            state.live_lease(request.lease_id)?;
            let record = state.writable(request.image_id, &request.writer)?;
            let highest = record.image.highest_number;
            let number = match request.number {
                0 => highest + 1,
                number if number > highest => number,
                number => {
                    let name = &record.image.name;
                    return precondition(format!("{name}@{number} was begun before"));
                }
            };
            record.image.highest_number = number;
            let snapshot = v1::Snapshot {
                image_id: record.image.id,
                image: record.image.name.clone(),
                number,
                state: SnapshotState::Pending.into(),
                created_unix_ms: unix_ms(),
                ..v1::Snapshot::default()
            };
            record.snapshots.insert(number, snapshot.clone());
            Ok(snapshot)
        })
        .await
    }

    async fn publish_snapshot(&self, request: v1::PublishSnapshotRequest) -> Answer<v1::Snapshot> {
        self.call("publish_snapshot", |state| {
            let live = state.live_lease(request.lease_id);
            let record = state.writable(request.image_id, &request.writer)?;
            let name = format!("{}@{}", record.image.name, request.number);
            let Some(snapshot) = record.snapshots.get_mut(&request.number) else {
                return Err(CatalogError::NotFound(format!("there is no snapshot {name}")));
            };
            match snapshot.state() {
                SnapshotState::Stable if snapshot.root == request.root => {
                    return Ok(snapshot.clone());
                }
                SnapshotState::Pending => live?,
                state => return precondition(format!("{name} is {}", state.as_str_name())),
            }
            if request.root.is_none() {
                return Err(invalid("a snapshot needs a root"));
            }
            snapshot.set_state(SnapshotState::Stable);
            snapshot.root = request.root;
            snapshot.stats = request.stats;
            snapshot.stable_unix_ms = unix_ms();
            record.image.latest = record.image.latest.max(request.number);
            Ok(snapshot.clone())
        })
        .await
    }

    async fn fail_snapshot(&self, request: v1::FailSnapshotRequest) -> Answer<v1::Snapshot> {
        self.call("fail_snapshot", |state| {
            let record = state.writable(request.image_id, &request.writer)?;
            let name = format!("{}@{}", record.image.name, request.number);
            let Some(snapshot) = record.snapshots.get_mut(&request.number) else {
                return Err(CatalogError::NotFound(format!("there is no snapshot {name}")));
            };
            match snapshot.state() {
                SnapshotState::Failed => {}
                SnapshotState::Pending => {
                    snapshot.set_state(SnapshotState::Failed);
                    snapshot.reason = request.reason;
                }
                state => return precondition(format!("{name} is {}", state.as_str_name())),
            }
            Ok(snapshot.clone())
        })
        .await
    }

    async fn get_snapshot(&self, request: v1::SnapshotRef) -> Answer<v1::Snapshot> {
        self.call("get_snapshot", |state| Ok(state.snapshot(&request)?.clone())).await
    }

    async fn list_snapshots(
        &self,
        request: v1::ListSnapshotsRequest,
    ) -> Answer<v1::ListSnapshotsResponse> {
        self.call("list_snapshots", |state| {
            let record = state.image(&request.image.unwrap_or_default())?;
            let limit = page_limit(request.limit);
            let mut later = record.snapshots.range(request.after_number + 1..);
            let snapshots: Vec<_> = later.by_ref().take(limit).map(|(_, s)| s.clone()).collect();
            Ok(v1::ListSnapshotsResponse { snapshots, more: later.next().is_some() })
        })
        .await
    }

    async fn wait_snapshot(&self, request: v1::WaitSnapshotRequest) -> Answer<v1::Snapshot> {
        let wanted = request.snapshot.unwrap_or_default();
        let mut changed = self.0.changed.subscribe();
        let settled = async {
            loop {
                changed.mark_unchanged();
                let snapshot = self
                    .call("wait_snapshot", |state| Ok(state.snapshot(&wanted)?.clone()))
                    .await?;
                // The call itself was a change.
                changed.mark_unchanged();
                if snapshot.state() != SnapshotState::Pending {
                    return Ok(snapshot);
                }
                // The sender is in `self`: it cannot be gone.
                let _ = changed.changed().await;
            }
        };
        timeout(Duration::from_millis(request.timeout_ms), settled).await.unwrap_or_else(|_| {
            Err(CatalogError::Timeout(format!("snapshot {} is still pending", wanted.number)))
        })
    }

    async fn remove_snapshot(&self, request: v1::SnapshotRef) -> Answer<v1::Snapshot> {
        self.call("remove_snapshot", |state| {
            let found = state.snapshot(&request)?;
            let (id, number) = (found.image_id, found.number);
            let Some(record) = state.images.get_mut(&id) else {
                return Err(CatalogError::NotFound(format!("there is no image {id}")));
            };
            let Some(snapshot) = record.snapshots.get_mut(&number) else {
                return Err(CatalogError::NotFound(format!("there is no snapshot {number}")));
            };
            if number == record.image.latest {
                return precondition(format!("{}@{number} is the latest", record.image.name));
            }
            snapshot.set_state(SnapshotState::Obsolete);
            Ok(snapshot.clone())
        })
        .await
    }

    async fn acquire_lease(&self, request: v1::AcquireLeaseRequest) -> Answer<v1::Lease> {
        self.call("acquire_lease", |state| {
            state.last_lease += 1;
            let id = state.last_lease;
            let lease = v1::Lease { id, generation: id, ttl_ms: request.ttl_ms };
            let until = Instant::now() + Duration::from_millis(request.ttl_ms);
            state.leases.insert(id, (lease, until));
            Ok(lease)
        })
        .await
    }

    async fn renew_lease(&self, request: v1::RenewLeaseRequest) -> Answer<v1::Lease> {
        self.call("renew_lease", |state| {
            state.live_lease(request.lease_id)?;
            let Some((lease, until)) = state.leases.get_mut(&request.lease_id) else {
                return precondition(format!("lease {} has run out", request.lease_id));
            };
            *until = Instant::now() + Duration::from_millis(lease.ttl_ms);
            Ok(*lease)
        })
        .await
    }

    async fn release_lease(
        &self,
        request: v1::ReleaseLeaseRequest,
    ) -> Answer<v1::ReleaseLeaseResponse> {
        self.call("release_lease", |state| {
            state.leases.remove(&request.lease_id);
            Ok(v1::ReleaseLeaseResponse {})
        })
        .await
    }

    async fn create_pool(&self, request: v1::CreatePoolRequest) -> Answer<v1::Pool> {
        self.call("create_pool", |state| {
            blobcr_proto::PoolName::new(request.name.as_str()).map_err(invalid)?;
            request.policy.parse::<Policy>().map_err(invalid)?;
            if state.pools.values().any(|pool| pool.name == request.name) {
                let text = format!("there is a pool {} already", request.name);
                return Err(CatalogError::AlreadyExists(text));
            }
            let id = state.pools.keys().next_back().copied().unwrap_or(0) + 1;
            let pool = v1::Pool {
                id,
                name: request.name,
                policy: request.policy,
                partitions: PARTITIONS,
                compression: request.compression,
            };
            state.pools.insert(id, pool.clone());
            Ok(pool)
        })
        .await
    }

    async fn get_pool(&self, request: v1::PoolRef) -> Answer<v1::Pool> {
        self.call("get_pool", |state| Ok(state.pool(&request)?.clone())).await
    }

    async fn list_pools(&self, _request: v1::ListPoolsRequest) -> Answer<v1::ListPoolsResponse> {
        self.call("list_pools", |state| {
            Ok(v1::ListPoolsResponse { pools: state.pools.values().cloned().collect() })
        })
        .await
    }

    async fn register_node(&self, request: v1::RegisterNodeRequest) -> Answer<v1::Node> {
        self.call("register_node", |state| {
            let node = v1::Node {
                id: request.id.clone(),
                address: request.address,
                domain: request.domain,
                registered_unix_ms: unix_ms(),
            };
            state.nodes.insert(request.id, node.clone());
            Ok(node)
        })
        .await
    }

    async fn list_nodes(&self, _request: v1::ListNodesRequest) -> Answer<v1::ListNodesResponse> {
        self.call("list_nodes", |state| {
            Ok(v1::ListNodesResponse { nodes: state.nodes.values().cloned().collect() })
        })
        .await
    }

    async fn get_placement(&self, request: v1::PoolRef) -> Answer<v1::PlacementTable> {
        self.call("get_placement", |state| {
            let pool = state.pool(&request)?.clone();
            let width = pool.policy.parse::<Policy>().map_err(invalid)?.width();
            if !state.placements.contains_key(&pool.id) {
                let ids: Vec<_> = state.nodes.keys().cloned().collect();
                if ids.len() < width {
                    return precondition(format!(
                        "pool {} ({}) needs {width} nodes; {} are registered",
                        pool.name,
                        pool.policy,
                        ids.len()
                    ));
                }
                state.placements.insert(pool.id, ids);
            }
            let ids = &state.placements[&pool.id];
            let partition = |p: u32| v1::PartitionNodes {
                node: (0..width as u32).map(|i| (p + i) % ids.len() as u32).collect(),
            };
            Ok(v1::PlacementTable {
                pool: pool.id,
                version: 1,
                nodes: ids.iter().map(|id| state.nodes[id].clone()).collect(),
                partitions: (0..pool.partitions).map(partition).collect(),
            })
        })
        .await
    }

    async fn add_to_set(&self, request: v1::AddToSetRequest) -> Answer<v1::CheckpointSet> {
        self.call("add_to_set", |state| {
            let key = (request.group.clone(), request.sequence);
            let set = state.sets.entry(key).or_insert_with(|| v1::CheckpointSet {
                group: request.group,
                sequence: request.sequence,
                created_unix_ms: unix_ms(),
                ..v1::CheckpointSet::default()
            });
            if set.expected_vms != 0 && set.expected_vms != request.expected_vms {
                return precondition(format!("the set expects {} VMs", set.expected_vms));
            }
            set.expected_vms = request.expected_vms;
            for member in request.members {
                set.members.retain(|m| (&m.vm, &m.disk) != (&member.vm, &member.disk));
                set.members.push(member);
            }
            let set = set.clone();
            Ok(state.derived(&set))
        })
        .await
    }

    async fn list_sets(&self, request: v1::ListSetsRequest) -> Answer<v1::ListSetsResponse> {
        self.call("list_sets", |state| {
            let of_group = state.sets.values().filter(|set| set.group == request.group);
            let newest = of_group.rev().take(page_limit(request.limit));
            Ok(v1::ListSetsResponse { sets: newest.map(|set| state.derived(set)).collect() })
        })
        .await
    }

    async fn latest_set(&self, request: v1::LatestSetRequest) -> Answer<v1::CheckpointSet> {
        self.call("latest_set", |state| {
            let of_group = state.sets.values().filter(|set| set.group == request.group);
            of_group.rev().map(|set| state.derived(set)).find(|set| set.stable).ok_or_else(|| {
                let text = format!("group {} has no complete and stable set", request.group);
                CatalogError::NotFound(text)
            })
        })
        .await
    }
}
