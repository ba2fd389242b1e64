//! The calls of a repository node that carry chunks.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, StdError, http};
use tonic::server::NamedService;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::call::{answer, call};
use crate::v1::record_store_server::{RecordStore, RecordStoreServer, SERVICE_NAME};
use crate::{MESSAGE_BYTES_MAX, v1};

const PUT: &str = "/blobcr.v1.RecordStore/Put";
const GET: &str = "/blobcr.v1.RecordStore/Get";

/// `Put` and `Get` of a node; the other calls are those of the generated client.
#[derive(Clone, Debug)]
pub struct BulkRecordStoreClient(Channel);

impl BulkRecordStoreClient {
    /// Over `channel`.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self(channel)
    }

    /// Stores records.
    ///
    /// # Errors
    /// As `Put` in `records.proto`, and what connections fail with.
    pub async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        call(self.0.clone(), PUT, request).await
    }

    /// Fetches records.
    ///
    /// # Errors
    /// As `Get` in `records.proto`, and what connections fail with.
    pub async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        call(self.0.clone(), GET, request).await
    }
}

/// A node as a service: `Put` and `Get` from here, everything else as generated. Takes and sends
/// messages of up to [`MESSAGE_BYTES_MAX`].
pub struct BulkRecordStoreServer<S> {
    node: Arc<S>,
    generated: RecordStoreServer<S>,
}

impl<S: RecordStore> BulkRecordStoreServer<S> {
    /// Over `node`.
    #[must_use]
    pub fn new(node: S) -> Self {
        let node = Arc::new(node);
        let generated = RecordStoreServer::from_arc(Arc::clone(&node))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Self { node, generated }
    }
}

impl<S> Clone for BulkRecordStoreServer<S> {
    fn clone(&self) -> Self {
        Self { node: Arc::clone(&self.node), generated: self.generated.clone() }
    }
}

impl<S> NamedService for BulkRecordStoreServer<S> {
    const NAME: &'static str = SERVICE_NAME;
}

impl<S, B> Service<http::Request<B>> for BulkRecordStoreServer<S>
where
    S: RecordStore,
    B: tonic::codegen::Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let node = Arc::clone(&self.node);
        match request.uri().path() {
            PUT => Box::pin(async move { Ok(answer(request, |asked| node.put(asked)).await) }),
            GET => Box::pin(async move { Ok(answer(request, |asked| node.get(asked)).await) }),
            _ => self.generated.call(request),
        }
    }
}
