//! Servers in memory behind real sockets, which can be killed and come back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blobcr_proto::record::{RecordKey, check_payload, open};
use blobcr_proto::v1::metadata_server::{Metadata, MetadataServer};
use blobcr_proto::v1::record_store_server::{RecordStore, RecordStoreServer};
use blobcr_proto::{MESSAGE_BYTES_MAX, v1};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status};

use crate::testing::{Faults, MemoryCatalog};
use crate::{Catalog, CatalogError};

/// A server in a runtime of its own: killing it cuts every connection at once.
pub(super) struct Running {
    runtime: Option<tokio::runtime::Runtime>,
    pub(super) address: SocketAddr,
}

impl Running {
    fn start(
        address: SocketAddr,
        router: impl FnOnce() -> tonic::transport::server::Router,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        // A port that was in use a moment ago may need another.
        let listener = (0..100)
            .find_map(|_| match std::net::TcpListener::bind(address) {
                Ok(listener) => Some(listener),
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(20));
                    None
                }
            })
            .expect("the port is free");
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let _inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let serving = router().serve_with_incoming(TcpListenerStream::new(listener));
        runtime.spawn(async move { serving.await.unwrap() });
        Self { runtime: Some(runtime), address }
    }

    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// An address where nobody listens.
pub(super) fn closed_port() -> SocketAddr {
    std::net::TcpListener::bind(any_port()).unwrap().local_addr().unwrap()
}

#[derive(Default)]
pub(super) struct NodeState {
    pub(super) records: Mutex<BTreeMap<RecordKey, (v1::Record, u64)>>,
    pub(super) faults: Faults<&'static str, Status>,
}

#[derive(Clone)]
struct NodeService(Arc<NodeState>);

#[tonic::async_trait]
impl RecordStore for NodeService {
    async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        self.0.faults.enter("put").await?;
        let request = request.into_inner();
        let mut answer = v1::PutResponse::default();
        for record in request.records {
            let is_shard = record.r#ref.as_ref().is_some_and(|wire| wire.shard != 0);
            let key = match is_shard {
                true => check_payload(&record),
                false => open(&record).map(|(key, _)| key),
            }
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
            let mut records = self.0.records.lock().unwrap();
            let bytes = record.payload.len() as u64 + 100;
            if records.insert(key, (record, request.generation)).is_none() {
                answer.stored += 1;
                answer.stored_bytes += bytes;
            }
        }
        Ok(Response::new(answer))
    }

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        self.0.faults.enter("get").await?;
        let refs = request.into_inner().refs;
        let records = self.0.records.lock().unwrap();
        let found = refs.iter().map(|wire| {
            let record = records.get(&RecordKey::try_from(wire).unwrap());
            v1::Found { record: record.map(|(record, _)| record.clone()), damaged: false }
        });
        Ok(Response::new(v1::GetResponse { found: found.collect(), ..Default::default() }))
    }

    async fn touch(
        &self,
        request: Request<v1::TouchRequest>,
    ) -> Result<Response<v1::TouchResponse>, Status> {
        self.0.faults.enter("touch").await?;
        let request = request.into_inner();
        let mut records = self.0.records.lock().unwrap();
        let present = request.refs.iter().map(|wire| {
            let held = records.get_mut(&RecordKey::try_from(wire).unwrap());
            held.map(|(_, generation)| *generation = request.generation).is_some()
        });
        Ok(Response::new(v1::TouchResponse { present: present.collect(), ..Default::default() }))
    }

    async fn check(
        &self,
        _: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        Err(Status::unimplemented("no client checks"))
    }

    async fn delete(
        &self,
        _: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        Err(Status::unimplemented("clients do not delete"))
    }

    async fn list(
        &self,
        _: Request<v1::ListRequest>,
    ) -> Result<Response<v1::ListResponse>, Status> {
        Err(Status::unimplemented("clients do not list"))
    }

    async fn status(
        &self,
        _: Request<v1::NodeStatusRequest>,
    ) -> Result<Response<v1::NodeStatus>, Status> {
        Err(Status::unimplemented("clients do not ask"))
    }
}

/// A repository node whose records survive its death.
pub(super) struct TestNode {
    pub(super) state: Arc<NodeState>,
    pub(super) server: Running,
}

impl TestNode {
    pub(super) fn start() -> Self {
        let state = Arc::new(NodeState::default());
        Self { server: Self::serve(&state, any_port()), state }
    }

    fn serve(state: &Arc<NodeState>, address: SocketAddr) -> Running {
        let service = RecordStoreServer::new(NodeService(Arc::clone(state)))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Running::start(address, || tonic::transport::Server::builder().add_service(service))
    }

    /// Comes back at the same address.
    pub(super) fn restart(&mut self) {
        let address = self.server.address;
        self.server.kill();
        self.server = Self::serve(&self.state, address);
    }

    /// Comes back at another address.
    pub(super) fn move_elsewhere(&mut self) {
        self.server.kill();
        self.server = Self::serve(&self.state, any_port());
    }
}

fn status_of(error: CatalogError) -> Status {
    let code = match &error {
        CatalogError::NotFound(_) => Code::NotFound,
        CatalogError::AlreadyExists(_) => Code::AlreadyExists,
        CatalogError::Invalid(_) => Code::InvalidArgument,
        CatalogError::Precondition(_) => Code::FailedPrecondition,
        CatalogError::Conflict(_) => Code::Aborted,
        CatalogError::Unavailable(_) => Code::Unavailable,
        CatalogError::Timeout(_) => Code::DeadlineExceeded,
    };
    Status::new(code, error.to_string())
}

struct MetadataService(MemoryCatalog);

macro_rules! metadata_of {
    ($($name:ident($request:ident) -> $answer:ident;)*) => {
        #[tonic::async_trait]
        impl Metadata for MetadataService {
            $(async fn $name(
                &self,
                request: Request<v1::$request>,
            ) -> Result<Response<v1::$answer>, Status> {
                let answer = self.0.$name(request.into_inner()).await;
                answer.map(Response::new).map_err(status_of)
            })*
        }
    };
}

metadata_of! {
    create_image(CreateImageRequest) -> Image;
    get_image(ImageRef) -> Image;
    list_images(ListImagesRequest) -> ListImagesResponse;
    clone_image(CloneImageRequest) -> CloneImageResponse;
    remove_image(ImageRef) -> RemoveImageResponse;
    begin_snapshot(BeginSnapshotRequest) -> Snapshot;
    publish_snapshot(PublishSnapshotRequest) -> Snapshot;
    fail_snapshot(FailSnapshotRequest) -> Snapshot;
    get_snapshot(SnapshotRef) -> Snapshot;
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse;
    wait_snapshot(WaitSnapshotRequest) -> Snapshot;
    remove_snapshot(SnapshotRef) -> Snapshot;
    pin_snapshot(PinSnapshotRequest) -> Pin;
    pin_snapshots(PinSnapshotsRequest) -> PinSnapshotsResponse;
    unpin_snapshot(UnpinSnapshotRequest) -> UnpinSnapshotResponse;
    list_pins(ListPinsRequest) -> ListPinsResponse;
    get_read_trace(SnapshotRef) -> GetReadTraceResponse;
    put_read_trace(PutReadTraceRequest) -> PutReadTraceResponse;
    acquire_lease(AcquireLeaseRequest) -> Lease;
    renew_lease(RenewLeaseRequest) -> Lease;
    release_lease(ReleaseLeaseRequest) -> ReleaseLeaseResponse;
    get_collection_bound(CollectionBoundRequest) -> CollectionBound;
    list_roots(ListRootsRequest) -> ListRootsResponse;
    create_pool(CreatePoolRequest) -> Pool;
    get_pool(PoolRef) -> Pool;
    list_pools(ListPoolsRequest) -> ListPoolsResponse;
    register_node(RegisterNodeRequest) -> Node;
    list_nodes(ListNodesRequest) -> ListNodesResponse;
    get_placement(GetPlacementRequest) -> PlacementTable;
    add_to_set(AddToSetRequest) -> CheckpointSet;
    list_sets(ListSetsRequest) -> ListSetsResponse;
    latest_set(LatestSetRequest) -> CheckpointSet;
    begin_set(BeginSetRequest) -> CheckpointSet;
    get_set(GetSetRequest) -> CheckpointSet;
    pin_set(PinSetRequest) -> CheckpointSet;
    unpin_set(PinSetRequest) -> CheckpointSet;
    list_groups(ListGroupsRequest) -> ListGroupsResponse;
    keep_sets(KeepSetsRequest) -> Group;
    retire_sets(RetireSetsRequest) -> RetireSetsResponse;
    drain_node(DrainNodeRequest) -> Node;
    remove_node(RemoveNodeRequest) -> Node;
    settle_partitions(SettlePartitionsRequest) -> SettlePartitionsResponse;
    report_debt(ReportDebtRequest) -> ReportDebtResponse;
    list_debt(ListDebtRequest) -> ListDebtResponse;
    settle_debts(SettleDebtsRequest) -> SettleDebtsResponse;
    lead_steward(LeadStewardRequest) -> Steward;
    get_steward(GetStewardRequest) -> Steward;
}

/// A metadata server over a catalog that it may share with others.
pub(super) fn metadata_server(catalog: &MemoryCatalog) -> Running {
    let service = MetadataServer::new(MetadataService(catalog.clone()));
    Running::start(any_port(), || tonic::transport::Server::builder().add_service(service))
}
