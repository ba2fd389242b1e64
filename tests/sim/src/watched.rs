//! A node's service with somebody looking over its shoulder.

use blobcr_proto::v1;
use blobcr_proto::v1::record_store_server::RecordStore;
use blobcr_repo_node::service::NodeService;
use tonic::{Request, Response, Status};

use crate::oracle::Oracle;

/// Tells the oracle what a node acknowledges.
pub(crate) struct Watched {
    /// The real service.
    pub(crate) service: NodeService,
    /// Which node of the run.
    pub(crate) node: usize,
    /// Who is told.
    pub(crate) oracle: Oracle,
}

#[tonic::async_trait]
impl RecordStore for Watched {
    async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        let asked = request.get_ref().clone();
        self.oracle.asked(&asked);
        let done = self.service.put(request).await?;
        self.oracle.put(self.node, &asked);
        Ok(done)
    }

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        self.service.get(request).await
    }

    async fn touch(
        &self,
        request: Request<v1::TouchRequest>,
    ) -> Result<Response<v1::TouchResponse>, Status> {
        let asked = request.get_ref().clone();
        let done = self.service.touch(request).await?;
        self.oracle.touched(self.node, &asked, &done.get_ref().present);
        Ok(done)
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let deleting = self.oracle.deleting(self.node, request.get_ref());
        let done = self.service.delete(request).await?;
        deleting.done();
        Ok(done)
    }

    async fn list(
        &self,
        request: Request<v1::ListRequest>,
    ) -> Result<Response<v1::ListResponse>, Status> {
        self.service.list(request).await
    }

    async fn check(
        &self,
        request: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        self.service.check(request).await
    }

    async fn status(
        &self,
        request: Request<v1::NodeStatusRequest>,
    ) -> Result<Response<v1::NodeStatus>, Status> {
        self.service.status(request).await
    }
}
