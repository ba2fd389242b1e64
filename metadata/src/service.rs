//! The gRPC service over a [`VersionManager`].

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_proto::v1::metadata_server::{Metadata, MetadataServer};
use tokio::sync::Mutex;
use tonic::{Request, Response, Status};

use crate::clock::{Clock, Entropy, SystemClock, SystemEntropy};
use crate::directory::{Directory, DirectoryError};
use crate::error::Error;
#[cfg(feature = "etcd")]
use crate::store::etcd::{EtcdOpenError, EtcdStore, EtcdTarget};
use crate::store::sled::{SledOpenError, SledStore};
use crate::store::{MetaStore, Retry};
use crate::tasks::Tasks;
use crate::version_manager::VersionManager;
use crate::version_manager::nodes::DOWN_AFTER_DEFAULT;
use crate::version_manager::pools::PARTITIONS;

/// What the service takes from outside.
#[derive(Clone, Debug)]
pub struct Options {
    /// Decides when leases run out.
    pub clock: Arc<dyn Clock>,
    /// Names leases.
    pub entropy: Arc<dyn Entropy>,
    /// Nodes that were not heard of for so long are down; at least
    /// [`crate::version_manager::nodes::DOWN_AFTER_MIN`].
    pub down_after: Duration,
    /// Partitions of new pools, a power of two: fewer than
    /// [`crate::version_manager::pools::PARTITIONS`] only where tables must be small.
    pub partitions: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clock: Arc::new(SystemClock),
            entropy: Arc::new(SystemEntropy),
            down_after: DOWN_AFTER_DEFAULT,
            partitions: PARTITIONS,
        }
    }
}

/// Why the service did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Its store cannot be opened.
    #[error(transparent)]
    Store(#[from] SledOpenError),
    /// Its etcd cannot be opened.
    #[cfg(feature = "etcd")]
    #[error(transparent)]
    Etcd(#[from] EtcdOpenError),
}

/// The service; cheap to clone. It lets go of its directory when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct MetadataService {
    tasks: Arc<Mutex<Tasks>>,
    manager: Arc<VersionManager>,
}

/// Opens the embedded service in `dir`, which is made when it is not there. Must be called on a
/// tokio runtime, on which its tasks then run.
///
/// # Errors
/// When another process uses the directory, it was made by a newer program, or it is damaged.
pub async fn open(dir: &Path, options: Options) -> Result<MetadataService, OpenError> {
    let directory = Directory::open(dir)?;
    let store = SledStore::open(&directory.store()).await?.holding(directory);
    Ok(MetadataService::over(Arc::new(store), options))
}

/// Opens the service over an etcd, which any number of others may use at the same time. Must be
/// called on a tokio runtime.
///
/// # Errors
/// When no member answers, or what is there may not be used.
#[cfg(feature = "etcd")]
pub async fn open_etcd(
    target: &EtcdTarget,
    options: Options,
) -> Result<MetadataService, OpenError> {
    let store = EtcdStore::open(target).await?;
    Ok(MetadataService::over(Arc::new(store), options))
}

/// The gRPC service, to be mounted on a server.
#[must_use]
pub fn service(service: MetadataService) -> MetadataServer<MetadataService> {
    MetadataServer::new(service)
        .max_decoding_message_size(blobcr_proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(blobcr_proto::MESSAGE_BYTES_MAX)
}

impl MetadataService {
    /// A service over any store. Must be called on a tokio runtime.
    #[must_use]
    pub fn over(store: Arc<dyn MetaStore>, options: Options) -> Self {
        let manager = VersionManager::new(store, options.clock, options.entropy);
        let manager = manager.with_down_after(options.down_after);
        let manager = Arc::new(manager.with_partitions(options.partitions));
        let tasks = Arc::new(Mutex::new(Tasks::start(&manager)));
        Self { tasks, manager }
    }

    /// What it serves.
    #[must_use]
    pub fn manager(&self) -> &Arc<VersionManager> {
        &self.manager
    }

    /// Stops the service's own tasks. When this was the last clone, the directory is free when this
    /// returns; dropping the last clone does the same a moment later.
    pub async fn close(self) {
        self.tasks.lock().await.stop().await;
    }

    /// The pool of that name, which is made when it is not there.
    ///
    /// # Errors
    /// When it is there with another policy.
    pub async fn ensure_pool(&self, name: &str, policy: &str) -> Result<v1::Pool, Error> {
        self.manager.ensure_pool(name, policy).await
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NotFound { .. } => Self::not_found(message),
            Error::AlreadyExists { .. } => Self::already_exists(message),
            Error::Invalid(_) => Self::invalid_argument(message),
            Error::Precondition { .. } => Self::failed_precondition(message),
            Error::Contended { .. } => Self::aborted(message),
            Error::Timeout { .. } => Self::deadline_exceeded(message),
            Error::Record(_) => Self::data_loss(message),
            Error::Store(store) => match store.retry() {
                Retry::AfterReading => Self::aborted(message),
                Retry::Later => Self::unavailable(message),
                Retry::Never => refused_for_good(&store, message),
            },
        }
    }
}

fn refused_for_good(error: &crate::store::StoreError, message: String) -> Status {
    use crate::store::StoreError;
    match error {
        // Another copy of the service, or this one after a restart, may well answer.
        StoreError::Poisoned { .. } => Status::unavailable(message),
        StoreError::Damaged { .. } => Status::data_loss(message),
        _ => Status::internal(message),
    }
}

/// Methods that pass a request on as it is.
macro_rules! pass_on {
    ($($method:ident($request:ty) -> $reply:ty;)*) => {
        #[tonic::async_trait]
        impl Metadata for MetadataService {
            $(
                async fn $method(
                    &self,
                    request: Request<$request>,
                ) -> Result<Response<$reply>, Status> {
                    let reply = self.manager.$method(request.into_inner()).await;
                    reply.map(Response::new).map_err(Status::from)
                }
            )*
        }
    };
}

pass_on! {
    create_image(v1::CreateImageRequest) -> v1::Image;
    get_image(v1::ImageRef) -> v1::Image;
    list_images(v1::ListImagesRequest) -> v1::ListImagesResponse;
    clone_image(v1::CloneImageRequest) -> v1::CloneImageResponse;
    remove_image(v1::ImageRef) -> v1::RemoveImageResponse;
    begin_snapshot(v1::BeginSnapshotRequest) -> v1::Snapshot;
    publish_snapshot(v1::PublishSnapshotRequest) -> v1::Snapshot;
    fail_snapshot(v1::FailSnapshotRequest) -> v1::Snapshot;
    get_snapshot(v1::SnapshotRef) -> v1::Snapshot;
    list_snapshots(v1::ListSnapshotsRequest) -> v1::ListSnapshotsResponse;
    wait_snapshot(v1::WaitSnapshotRequest) -> v1::Snapshot;
    remove_snapshot(v1::SnapshotRef) -> v1::Snapshot;
    pin_snapshot(v1::PinSnapshotRequest) -> v1::Pin;
    pin_snapshots(v1::PinSnapshotsRequest) -> v1::PinSnapshotsResponse;
    unpin_snapshot(v1::UnpinSnapshotRequest) -> v1::UnpinSnapshotResponse;
    list_pins(v1::ListPinsRequest) -> v1::ListPinsResponse;
    get_read_trace(v1::SnapshotRef) -> v1::GetReadTraceResponse;
    put_read_trace(v1::PutReadTraceRequest) -> v1::PutReadTraceResponse;
    acquire_lease(v1::AcquireLeaseRequest) -> v1::Lease;
    renew_lease(v1::RenewLeaseRequest) -> v1::Lease;
    release_lease(v1::ReleaseLeaseRequest) -> v1::ReleaseLeaseResponse;
    get_collection_bound(v1::CollectionBoundRequest) -> v1::CollectionBound;
    list_roots(v1::ListRootsRequest) -> v1::ListRootsResponse;
    create_pool(v1::CreatePoolRequest) -> v1::Pool;
    get_pool(v1::PoolRef) -> v1::Pool;
    list_pools(v1::ListPoolsRequest) -> v1::ListPoolsResponse;
    register_node(v1::RegisterNodeRequest) -> v1::Node;
    list_nodes(v1::ListNodesRequest) -> v1::ListNodesResponse;
    drain_node(v1::DrainNodeRequest) -> v1::Node;
    remove_node(v1::RemoveNodeRequest) -> v1::Node;
    settle_partitions(v1::SettlePartitionsRequest) -> v1::SettlePartitionsResponse;
    get_placement(v1::GetPlacementRequest) -> v1::PlacementTable;
    report_debt(v1::ReportDebtRequest) -> v1::ReportDebtResponse;
    list_debt(v1::ListDebtRequest) -> v1::ListDebtResponse;
    settle_debts(v1::SettleDebtsRequest) -> v1::SettleDebtsResponse;
    lead_steward(v1::LeadStewardRequest) -> v1::Steward;
    get_steward(v1::GetStewardRequest) -> v1::Steward;
    add_to_set(v1::AddToSetRequest) -> v1::CheckpointSet;
    list_sets(v1::ListSetsRequest) -> v1::ListSetsResponse;
    latest_set(v1::LatestSetRequest) -> v1::CheckpointSet;
    begin_set(v1::BeginSetRequest) -> v1::CheckpointSet;
    get_set(v1::GetSetRequest) -> v1::CheckpointSet;
    pin_set(v1::PinSetRequest) -> v1::CheckpointSet;
    unpin_set(v1::PinSetRequest) -> v1::CheckpointSet;
    list_groups(v1::ListGroupsRequest) -> v1::ListGroupsResponse;
    keep_sets(v1::KeepSetsRequest) -> v1::Group;
    retire_sets(v1::RetireSetsRequest) -> v1::RetireSetsResponse;
}
