//! A version manager in memory.

mod debt;
mod images;
mod leases;
mod pins;
mod pools;
mod sets;
mod snapshots;
mod steward;
mod traces;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use blobcr_proto::v1;
use tokio::sync::watch;
use tokio::time::timeout;

use super::Faults;
use crate::{Catalog, CatalogError};
use debt::Debts;
use images::Images;
use leases::Leases;
use pools::Pools;
use sets::Sets;
use steward::Stewards;

/// Ordered, because lists are.
type ById<K, V> = BTreeMap<K, V>;
type Answer<T> = Result<T, CatalogError>;

/// Entries of a list's page at most, and when the request names no limit.
const PAGE: usize = 1000;
/// How often a wait looks whether a lease has run out meanwhile (which fails its snapshots).
const LEASES_LOOKED_AT_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    debts: Debts,
    images: Images,
    leases: Leases,
    pools: Pools,
    sets: Sets,
    steward: Stewards,
}

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    faults: Faults<&'static str, CatalogError>,
}

/// A [`Catalog`] in memory with the rules of the real one; clones share it. It starts with pool
/// `default` (id 1, `replica:1`). Leases run on tokio's clock, so a paused clock drives them.
#[derive(Debug, Clone, Default)]
pub struct MemoryCatalog(Arc<Inner>);

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn precondition<T>(text: impl Into<String>) -> Answer<T> {
    Err(CatalogError::Precondition(text.into()))
}

fn not_found<T>(text: impl Into<String>) -> Answer<T> {
    Err(CatalogError::NotFound(text.into()))
}

fn invalid(error: impl ToString) -> CatalogError {
    CatalogError::Invalid(error.to_string())
}

/// The first page of `entries`, and whether there is more.
fn page<T>(entries: impl Iterator<Item = T>, limit: u32) -> (Vec<T>, bool) {
    let limit = if limit == 0 { PAGE } else { PAGE.min(limit as usize) };
    let mut entries = entries;
    let page = entries.by_ref().take(limit).collect();
    (page, entries.next().is_some())
}

impl MemoryCatalog {
    /// Makes calls fail or wait, and counts them. Operations are named like the methods.
    #[must_use]
    pub fn faults(&self) -> &Faults<&'static str, CatalogError> {
        &self.0.faults
    }

    /// Ends a lease as if its time had passed: its pending snapshots fail.
    pub fn expire_lease(&self, id: u64) {
        let mut state = self.state();
        state.leases.remove(id);
        state.images.lease_ended(id, "its writer's lease ran out");
        drop(state);
        self.0.changed.send_modify(|changes| *changes += 1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies faults, ends leases whose time has passed, and does what is asked.
    async fn call<T>(
        &self,
        operation: &'static str,
        body: impl FnOnce(&mut State) -> Answer<T>,
    ) -> Answer<T> {
        self.0.faults.enter(operation).await?;
        let answer = {
            let mut state = self.state();
            for lease in state.leases.take_expired() {
                state.images.lease_ended(lease, "its writer's lease ran out");
            }
            body(&mut state)
        };
        self.0.changed.send_modify(|changes| *changes += 1);
        answer
    }

    async fn settled(&self, wanted: &v1::SnapshotRef) -> Answer<v1::Snapshot> {
        let mut changed = self.0.changed.subscribe();
        loop {
            let found = self.call("wait_snapshot", |state| state.images.snapshot(wanted)).await?;
            // The call itself was a change.
            changed.mark_unchanged();
            if found.state() != v1::SnapshotState::Pending {
                return Ok(found);
            }
            // Either way: look again.
            let _ = timeout(LEASES_LOOKED_AT_EVERY, changed.changed()).await;
        }
    }
}

/// The implementation: one method per verb, and `wait_snapshot`, which is not like the others.
macro_rules! catalog_of {
    ($($name:ident($request:ident) -> $answer:ident: |$state:ident, $r:ident| $body:expr;)*) => {
        #[async_trait]
        impl Catalog for MemoryCatalog {
            $(async fn $name(&self, $r: v1::$request) -> Answer<v1::$answer> {
                self.call(stringify!($name), |$state| $body).await
            })*

            async fn wait_snapshot(&self, r: v1::WaitSnapshotRequest) -> Answer<v1::Snapshot> {
                let wanted = r.snapshot.unwrap_or_default();
                let settled = self.settled(&wanted);
                timeout(Duration::from_millis(r.timeout_ms), settled).await.unwrap_or_else(|_| {
                    let text = format!("snapshot {} is still pending", wanted.number);
                    Err(CatalogError::Timeout(text))
                })
            }
        }
    };
}

catalog_of! {
    create_image(CreateImageRequest) -> Image: |s, r| s.images.create(r, &s.pools);
    get_image(ImageRef) -> Image: |s, r| s.images.get(&r);
    list_images(ListImagesRequest) -> ListImagesResponse: |s, r| s.images.list(&r);
    clone_image(CloneImageRequest) -> CloneImageResponse: |s, r| s.images.clone_image(r);
    remove_image(ImageRef) -> RemoveImageResponse: |s, r| s.images.remove(&r, s.leases.newest());
    begin_snapshot(BeginSnapshotRequest) -> Snapshot: |s, r| s.images.begin(&r, &s.leases);
    publish_snapshot(PublishSnapshotRequest) -> Snapshot: |s, r| s.images.publish(r, &s.leases);
    fail_snapshot(FailSnapshotRequest) -> Snapshot: |s, r| s.images.fail(r, &s.leases);
    get_snapshot(SnapshotRef) -> Snapshot: |s, r| s.images.snapshot(&r);
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse:
        |s, r| s.images.list_snapshots(&r);
    remove_snapshot(SnapshotRef) -> Snapshot: |s, r| s.images.remove_snapshot(&r, s.leases.newest());
    pin_snapshot(PinSnapshotRequest) -> Pin: |s, r| s.images.pin(r);
    pin_snapshots(PinSnapshotsRequest) -> PinSnapshotsResponse: |s, r| s.images.pin_all(&r);
    unpin_snapshot(UnpinSnapshotRequest) -> UnpinSnapshotResponse: |s, r| Ok(s.images.unpin(&r));
    list_pins(ListPinsRequest) -> ListPinsResponse: |s, r| Ok(s.images.list_pins(&r));
    get_read_trace(SnapshotRef) -> GetReadTraceResponse: |s, r| s.images.get_trace(&r);
    put_read_trace(PutReadTraceRequest) -> PutReadTraceResponse: |s, r| s.images.put_trace(r);
    acquire_lease(AcquireLeaseRequest) -> Lease: |s, r| s.leases.acquire(&r);
    renew_lease(RenewLeaseRequest) -> Lease: |s, r| s.leases.renew(r.lease_id);
    release_lease(ReleaseLeaseRequest) -> ReleaseLeaseResponse: |s, r| {
        s.leases.remove(r.lease_id);
        s.images.lease_ended(r.lease_id, "its writer released the lease");
        Ok(v1::ReleaseLeaseResponse {})
    };
    get_collection_bound(CollectionBoundRequest) -> CollectionBound: |s, _r| Ok(s.leases.bound());
    list_roots(ListRootsRequest) -> ListRootsResponse: |s, r| Ok(s.images.list_roots(&r));
    create_pool(CreatePoolRequest) -> Pool: |s, r| s.pools.create(r);
    get_pool(PoolRef) -> Pool: |s, r| s.pools.get(&r).cloned();
    list_pools(ListPoolsRequest) -> ListPoolsResponse: |s, _r| Ok(s.pools.list());
    register_node(RegisterNodeRequest) -> Node: |s, r| Ok(s.pools.register(r));
    list_nodes(ListNodesRequest) -> ListNodesResponse: |s, _r| Ok(s.pools.nodes());
    drain_node(DrainNodeRequest) -> Node: |s, r| s.pools.drain(&r);
    remove_node(RemoveNodeRequest) -> Node: |s, r| s.pools.remove(&r);
    settle_partitions(SettlePartitionsRequest) -> SettlePartitionsResponse:
        |_s, _r| Ok(v1::SettlePartitionsResponse { settled: true });
    get_placement(GetPlacementRequest) -> PlacementTable: |s, r| s.pools.placement(&r);
    report_debt(ReportDebtRequest) -> ReportDebtResponse: |s, r| s.debts.report(&r, &s.pools);
    list_debt(ListDebtRequest) -> ListDebtResponse: |s, r| Ok(s.debts.list(&r));
    settle_debts(SettleDebtsRequest) -> SettleDebtsResponse: |s, r| Ok(s.debts.settle(&r));
    lead_steward(LeadStewardRequest) -> Steward: |s, r| Ok(s.steward.lead(r));
    get_steward(GetStewardRequest) -> Steward: |s, _r| Ok(s.steward.get());
    add_to_set(AddToSetRequest) -> CheckpointSet: |s, r| s.sets.add(r, &mut s.images);
    list_sets(ListSetsRequest) -> ListSetsResponse: |s, r| s.sets.list(&r, &s.images);
    latest_set(LatestSetRequest) -> CheckpointSet: |s, r| s.sets.latest(&r, &s.images);
    begin_set(BeginSetRequest) -> CheckpointSet: |s, r| s.sets.begin(r, &mut s.images);
    get_set(GetSetRequest) -> CheckpointSet: |s, r| s.sets.get(&r, &s.images);
    pin_set(PinSetRequest) -> CheckpointSet: |_s, _r| sets::keeps_all();
    unpin_set(PinSetRequest) -> CheckpointSet: |_s, _r| sets::keeps_all();
    list_groups(ListGroupsRequest) -> ListGroupsResponse: |_s, _r| Ok(v1::ListGroupsResponse::default());
    keep_sets(KeepSetsRequest) -> Group: |_s, _r| sets::keeps_all();
    retire_sets(RetireSetsRequest) -> RetireSetsResponse: |_s, _r| sets::keeps_all();
}
