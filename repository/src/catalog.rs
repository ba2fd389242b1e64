//! The mutable facts of the repository, as its clients see them.

use async_trait::async_trait;
use blobcr_proto::v1;

/// Why the metadata service did not do what it was asked. The texts are its own: they name the
/// object and say what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// No such image, snapshot, pool or set.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The state of the object, a lease or a writer forbids it.
    #[error("{0}")]
    Precondition(String),
    /// Another writer was quicker; trying again may succeed.
    #[error("{0}")]
    Conflict(String),
    /// No metadata server answered.
    #[error("the metadata service cannot be reached: {0}")]
    Unavailable(String),
    /// What was waited for did not happen in time.
    #[error("{0}")]
    Timeout(String),
}

impl CatalogError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Conflict(_) | Self::Unavailable(_))
    }
}

/// The verbs of service `Metadata` (`proto/blobcr/v1/metadata.proto` has their promises).
#[async_trait]
#[expect(missing_docs, reason = "one method per RPC; the .proto file carries the docs")]
pub trait Catalog: Send + Sync + 'static {
    async fn create_image(
        &self,
        request: v1::CreateImageRequest,
    ) -> Result<v1::Image, CatalogError>;
    async fn get_image(&self, request: v1::ImageRef) -> Result<v1::Image, CatalogError>;
    async fn list_images(
        &self,
        request: v1::ListImagesRequest,
    ) -> Result<v1::ListImagesResponse, CatalogError>;
    async fn clone_image(
        &self,
        request: v1::CloneImageRequest,
    ) -> Result<v1::CloneImageResponse, CatalogError>;
    async fn remove_image(
        &self,
        request: v1::ImageRef,
    ) -> Result<v1::RemoveImageResponse, CatalogError>;
    async fn begin_snapshot(
        &self,
        request: v1::BeginSnapshotRequest,
    ) -> Result<v1::Snapshot, CatalogError>;
    async fn publish_snapshot(
        &self,
        request: v1::PublishSnapshotRequest,
    ) -> Result<v1::Snapshot, CatalogError>;
    async fn fail_snapshot(
        &self,
        request: v1::FailSnapshotRequest,
    ) -> Result<v1::Snapshot, CatalogError>;
    async fn get_snapshot(&self, request: v1::SnapshotRef) -> Result<v1::Snapshot, CatalogError>;
    async fn list_snapshots(
        &self,
        request: v1::ListSnapshotsRequest,
    ) -> Result<v1::ListSnapshotsResponse, CatalogError>;
    async fn wait_snapshot(
        &self,
        request: v1::WaitSnapshotRequest,
    ) -> Result<v1::Snapshot, CatalogError>;
    async fn remove_snapshot(&self, request: v1::SnapshotRef)
    -> Result<v1::Snapshot, CatalogError>;
    async fn pin_snapshot(&self, request: v1::PinSnapshotRequest) -> Result<v1::Pin, CatalogError>;
    async fn pin_snapshots(
        &self,
        request: v1::PinSnapshotsRequest,
    ) -> Result<v1::PinSnapshotsResponse, CatalogError>;
    async fn unpin_snapshot(
        &self,
        request: v1::UnpinSnapshotRequest,
    ) -> Result<v1::UnpinSnapshotResponse, CatalogError>;
    async fn list_pins(
        &self,
        request: v1::ListPinsRequest,
    ) -> Result<v1::ListPinsResponse, CatalogError>;
    async fn get_read_trace(
        &self,
        request: v1::SnapshotRef,
    ) -> Result<v1::GetReadTraceResponse, CatalogError>;
    async fn put_read_trace(
        &self,
        request: v1::PutReadTraceRequest,
    ) -> Result<v1::PutReadTraceResponse, CatalogError>;
    async fn acquire_lease(
        &self,
        request: v1::AcquireLeaseRequest,
    ) -> Result<v1::Lease, CatalogError>;
    async fn renew_lease(&self, request: v1::RenewLeaseRequest) -> Result<v1::Lease, CatalogError>;
    async fn release_lease(
        &self,
        request: v1::ReleaseLeaseRequest,
    ) -> Result<v1::ReleaseLeaseResponse, CatalogError>;
    async fn get_collection_bound(
        &self,
        request: v1::CollectionBoundRequest,
    ) -> Result<v1::CollectionBound, CatalogError>;
    async fn list_roots(
        &self,
        request: v1::ListRootsRequest,
    ) -> Result<v1::ListRootsResponse, CatalogError>;
    async fn create_pool(&self, request: v1::CreatePoolRequest) -> Result<v1::Pool, CatalogError>;
    async fn get_pool(&self, request: v1::PoolRef) -> Result<v1::Pool, CatalogError>;
    async fn list_pools(
        &self,
        request: v1::ListPoolsRequest,
    ) -> Result<v1::ListPoolsResponse, CatalogError>;
    async fn register_node(
        &self,
        request: v1::RegisterNodeRequest,
    ) -> Result<v1::Node, CatalogError>;
    async fn list_nodes(
        &self,
        request: v1::ListNodesRequest,
    ) -> Result<v1::ListNodesResponse, CatalogError>;
    async fn drain_node(&self, request: v1::DrainNodeRequest) -> Result<v1::Node, CatalogError>;
    async fn remove_node(&self, request: v1::RemoveNodeRequest) -> Result<v1::Node, CatalogError>;
    async fn settle_partitions(
        &self,
        request: v1::SettlePartitionsRequest,
    ) -> Result<v1::SettlePartitionsResponse, CatalogError>;
    async fn get_placement(
        &self,
        request: v1::GetPlacementRequest,
    ) -> Result<v1::PlacementTable, CatalogError>;
    async fn report_debt(
        &self,
        request: v1::ReportDebtRequest,
    ) -> Result<v1::ReportDebtResponse, CatalogError>;
    async fn list_debt(
        &self,
        request: v1::ListDebtRequest,
    ) -> Result<v1::ListDebtResponse, CatalogError>;
    async fn settle_debts(
        &self,
        request: v1::SettleDebtsRequest,
    ) -> Result<v1::SettleDebtsResponse, CatalogError>;
    async fn lead_steward(
        &self,
        request: v1::LeadStewardRequest,
    ) -> Result<v1::Steward, CatalogError>;
    async fn get_steward(
        &self,
        request: v1::GetStewardRequest,
    ) -> Result<v1::Steward, CatalogError>;
    async fn add_to_set(
        &self,
        request: v1::AddToSetRequest,
    ) -> Result<v1::CheckpointSet, CatalogError>;
    async fn list_sets(
        &self,
        request: v1::ListSetsRequest,
    ) -> Result<v1::ListSetsResponse, CatalogError>;
    async fn latest_set(
        &self,
        request: v1::LatestSetRequest,
    ) -> Result<v1::CheckpointSet, CatalogError>;
    async fn begin_set(
        &self,
        request: v1::BeginSetRequest,
    ) -> Result<v1::CheckpointSet, CatalogError>;
    async fn get_set(&self, request: v1::GetSetRequest) -> Result<v1::CheckpointSet, CatalogError>;
    async fn pin_set(&self, request: v1::PinSetRequest) -> Result<v1::CheckpointSet, CatalogError>;
    async fn unpin_set(
        &self,
        request: v1::PinSetRequest,
    ) -> Result<v1::CheckpointSet, CatalogError>;
    async fn list_groups(
        &self,
        request: v1::ListGroupsRequest,
    ) -> Result<v1::ListGroupsResponse, CatalogError>;
    async fn keep_sets(&self, request: v1::KeepSetsRequest) -> Result<v1::Group, CatalogError>;
    async fn retire_sets(
        &self,
        request: v1::RetireSetsRequest,
    ) -> Result<v1::RetireSetsResponse, CatalogError>;
}
