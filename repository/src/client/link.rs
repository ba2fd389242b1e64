//! One repository node.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blobcr_proto::v1::record_store_client::RecordStoreClient;
use blobcr_proto::{MESSAGE_BYTES_MAX, v1};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::status::NodeError;
use super::{AddressError, ConnectOptions, channel};

/// The connections to one node.
#[derive(Debug)]
pub(super) struct NodeLink {
    address: String,
    clients: Vec<RecordStoreClient<Channel>>,
    next: AtomicUsize,
    read_deadline: Duration,
    write_deadline: Duration,
}

impl NodeLink {
    pub(super) fn new(address: &str, options: &ConnectOptions) -> Result<Self, AddressError> {
        let client = |_| {
            Ok(RecordStoreClient::new(channel(address, options.connect_timeout)?)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX))
        };
        Ok(Self {
            address: address.to_owned(),
            clients: (0..options.channels_per_node.max(1)).map(client).collect::<Result<_, _>>()?,
            next: AtomicUsize::new(0),
            read_deadline: options.read_deadline,
            write_deadline: options.write_deadline,
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The connections take turns.
    fn client(&self) -> RecordStoreClient<Channel> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.clients[turn % self.clients.len()].clone()
    }

    pub(super) async fn put(&self, request: v1::PutRequest) -> Result<v1::PutResponse, NodeError> {
        let mut client = self.client();
        let request = timed(request, self.write_deadline);
        within(self.write_deadline, client.put(request)).await
    }

    pub(super) async fn get(&self, request: v1::GetRequest) -> Result<v1::GetResponse, NodeError> {
        let mut client = self.client();
        let request = timed(request, self.read_deadline);
        within(self.read_deadline, client.get(request)).await
    }

    pub(super) async fn touch(
        &self,
        request: v1::TouchRequest,
    ) -> Result<v1::TouchResponse, NodeError> {
        let mut client = self.client();
        // A touch is made durable before it is acknowledged: it may take as long as a put.
        let request = timed(request, self.write_deadline);
        within(self.write_deadline, client.touch(request)).await
    }
}

fn timed<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, NodeError> {
    match timeout(deadline, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(NodeError::of(&status)),
        Err(_) => Err(NodeError::Unreachable(format!("no answer within {deadline:?}"))),
    }
}
