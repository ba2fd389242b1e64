//! The gRPC service `Checkpoint`, for the host's own tools.

use std::sync::Arc;

use blobcr_proto::v1;
use blobcr_proto::v1::checkpoint_server::Checkpoint;
use tonic::{Request, Response, Status};

use crate::new_vm::NewVm;
use crate::proxy::Proxy;
use crate::requests::{self, Vm};
use crate::sets;

/// Serves [`Checkpoint`] on a [`Proxy`]. Made by [`Proxy::service`].
pub struct CheckpointService {
    proxy: Proxy,
}

impl CheckpointService {
    pub(crate) fn new(proxy: Proxy) -> Self {
        Self { proxy }
    }

    fn vm(&self, name: &str) -> Result<Arc<Vm>, Status> {
        self.proxy.vm(name).map_err(Status::from)
    }
}

#[tonic::async_trait]
impl Checkpoint for CheckpointService {
    async fn checkpoint(
        &self,
        request: Request<v1::CheckpointRequest>,
    ) -> Result<Response<v1::CheckpointReply>, Status> {
        let request = request.into_inner();
        let vm = self.vm(&request.vm)?;
        requests::checkpoint(self.proxy.backend(), &vm, request).await.map(Response::new)
    }

    async fn wait_stable(
        &self,
        request: Request<v1::WaitStableRequest>,
    ) -> Result<Response<v1::WaitStableReply>, Status> {
        let request = request.into_inner();
        let vm = self.vm(&request.vm)?;
        requests::wait_stable(self.proxy.backend(), &vm, request).await.map(Response::new)
    }

    async fn status(
        &self,
        request: Request<v1::VmStatusRequest>,
    ) -> Result<Response<v1::VmStatusReply>, Status> {
        let vm = self.vm(&request.into_inner().vm)?;
        requests::status(self.proxy.backend(), &vm).await.map(Response::new)
    }

    async fn begin_set(
        &self,
        request: Request<v1::BeginVmSetRequest>,
    ) -> Result<Response<v1::VmSet>, Status> {
        let request = request.into_inner();
        let vm = self.vm(&request.vm)?;
        sets::begin(self.proxy.backend(), &vm, request).await.map(Response::new)
    }

    async fn set_status(
        &self,
        request: Request<v1::VmSetStatusRequest>,
    ) -> Result<Response<v1::VmSet>, Status> {
        let request = request.into_inner();
        let vm = self.vm(&request.vm)?;
        sets::status(self.proxy.backend(), &vm, request).await.map(Response::new)
    }

    async fn add_vm(&self, request: Request<v1::AddVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let v1::AddVmRequest { name, disks, groups, tcp, replace, vsock_cid } =
            request.into_inner();
        let vm = NewVm { name, disks, groups, tcp, vsock_cid, replace };
        Ok(Response::new(self.proxy.add_vm(vm).await?))
    }

    async fn remove_vm(
        &self,
        request: Request<v1::VmRef>,
    ) -> Result<Response<v1::RemoveVmResponse>, Status> {
        self.proxy.remove_vm(&request.into_inner().name).await?;
        Ok(Response::new(v1::RemoveVmResponse {}))
    }

    async fn list_vms(
        &self,
        _request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        Ok(Response::new(v1::ListVmsResponse { vms: self.proxy.vms() }))
    }
}
