//! The mirror's gRPC service.

use blobcr_proto::v1;
use blobcr_proto::v1::mirror_server::{Mirror, MirrorServer};
use blobcr_repository::CatalogError;
use tonic::{Request, Response, Status};

use crate::disk::{BaseError, DiskError, UpstreamError};
use crate::host::{Host, HostError};

/// Serves [`Host`] over gRPC.
#[derive(Clone, Debug)]
pub struct MirrorService(Host);

impl Host {
    /// Its service, to be added to a server.
    #[must_use]
    pub fn service(&self) -> MirrorServer<MirrorService> {
        MirrorServer::new(MirrorService(self.clone()))
    }
}

fn of_catalog(error: &CatalogError, text: String) -> Status {
    match error {
        CatalogError::NotFound(_) => Status::not_found(text),
        CatalogError::AlreadyExists(_) => Status::already_exists(text),
        CatalogError::Invalid(_) => Status::invalid_argument(text),
        CatalogError::Precondition(_) => Status::failed_precondition(text),
        CatalogError::Conflict(_) => Status::aborted(text),
        CatalogError::Unavailable(_) | CatalogError::Timeout(_) => Status::unavailable(text),
    }
}

fn of_disk(error: &DiskError, text: String) -> Status {
    match error {
        DiskError::Upstream { source: UpstreamError::Unavailable(_), .. }
        | DiskError::Base { source: BaseError::Unavailable { .. }, .. }
        | DiskError::Stopped(_) => Status::unavailable(text),
        DiskError::Upstream { source: UpstreamError::NotFound(_), .. }
        | DiskError::NoSnapshot { .. }
        | DiskError::Absent(_) => Status::not_found(text),
        DiskError::Upstream { source: UpstreamError::AlreadyExists(_), .. }
        | DiskError::Exists(_) => Status::already_exists(text),
        DiskError::Invalid { .. } | DiskError::OutOfRange { .. } | DiskError::KeyTooLong => {
            Status::invalid_argument(text)
        }
        DiskError::NoSpace { .. } => Status::resource_exhausted(text),
        DiskError::Base { source: BaseError::Lost { .. }, .. } | DiskError::Damaged { .. } => {
            Status::data_loss(text)
        }
        DiskError::Upstream { .. } | DiskError::NotCloned(_) | DiskError::Locked(_) => {
            Status::failed_precondition(text)
        }
        _ => Status::internal(text),
    }
}

impl From<HostError> for Status {
    fn from(error: HostError) -> Self {
        let text = error.to_string();
        match &error {
            HostError::NoDisk(_) => Self::not_found(text),
            HostError::Exists(_) => Self::already_exists(text),
            HostError::Name(_) | HostError::Invalid(_) => Self::invalid_argument(text),
            HostError::Precondition(_) | HostError::Directory(_) | HostError::Mount(_) => {
                Self::failed_precondition(text)
            }
            HostError::Stopping => Self::unavailable(text),
            HostError::Catalog(error) => of_catalog(error, text),
            HostError::Disk(error) => of_disk(error, text),
            HostError::Io { .. } | HostError::Fault(_) => Self::internal(text),
        }
    }
}

/// Does what changes a disk to its end, whether or not the caller still waits. Half of an attach or
/// a detach is a directory that no disk has; and were a disk's file let open again in the middle of
/// a rollback, what is written to it then would be thrown away.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, HostError>> + Send + 'static,
) -> Result<T, HostError> {
    tokio::spawn(work).await?
}

#[tonic::async_trait]
impl Mirror for MirrorService {
    async fn attach_disk(
        &self,
        request: Request<v1::AttachDiskRequest>,
    ) -> Result<Response<v1::Disk>, Status> {
        let host = self.0.clone();
        let attached = async move { host.attach(request.into_inner()).await };
        Ok(Response::new(to_the_end(attached).await?))
    }

    async fn fork_disks(
        &self,
        request: Request<v1::ForkDisksRequest>,
    ) -> Result<Response<v1::ForkDisksResponse>, Status> {
        let host = self.0.clone();
        let forked = async move { host.fork(request.into_inner()).await };
        Ok(Response::new(v1::ForkDisksResponse { disks: to_the_end(forked).await? }))
    }

    async fn detach_disk(
        &self,
        request: Request<v1::DetachDiskRequest>,
    ) -> Result<Response<v1::DetachDiskResponse>, Status> {
        let request = request.into_inner();
        let host = self.0.clone();
        to_the_end(async move { host.detach(&request.disk, request.discard_changes).await })
            .await?;
        Ok(Response::new(v1::DetachDiskResponse {}))
    }

    async fn list_disks(
        &self,
        _: Request<v1::ListDisksRequest>,
    ) -> Result<Response<v1::ListDisksResponse>, Status> {
        Ok(Response::new(v1::ListDisksResponse { disks: self.0.list() }))
    }

    async fn get_disk(&self, request: Request<v1::DiskRef>) -> Result<Response<v1::Disk>, Status> {
        Ok(Response::new(self.0.get(&request.into_inner().disk)?))
    }

    async fn checkpoint_disks(
        &self,
        request: Request<v1::CheckpointDisksRequest>,
    ) -> Result<Response<v1::CheckpointDisksResponse>, Status> {
        let request = request.into_inner();
        let snapshots = self.0.checkpoint(&request.disks, &request.idempotency_key).await?;
        Ok(Response::new(v1::CheckpointDisksResponse { snapshots }))
    }

    async fn rollback_disk(
        &self,
        request: Request<v1::RollbackDiskRequest>,
    ) -> Result<Response<v1::Disk>, Status> {
        let request = request.into_inner();
        let host = self.0.clone();
        let rolled_back = async move { host.rollback(&request.disk, request.number).await };
        Ok(Response::new(to_the_end(rolled_back).await?))
    }
}
