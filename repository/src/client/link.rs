//! The connections to repository nodes.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blobcr_proto::bulk::BulkRecordStoreClient;
use blobcr_proto::v1::record_store_client::RecordStoreClient;
use blobcr_proto::{MESSAGE_BYTES_MAX, v1};
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::status::NodeError;
use super::{AddressError, ConnectOptions, channel, timed};
use crate::StoreError;

/// A node that did not answer, or was slow to, is asked last for so long, so that reads do not wait
/// for it again and again.
const ASK_LAST_FOR: Duration = Duration::from_secs(2);

/// The connections to one node.
#[derive(Debug)]
pub(super) struct NodeLink {
    address: String,
    channels: Vec<Channel>,
    next: AtomicUsize,
    read_deadline: Duration,
    write_deadline: Duration,
}

impl NodeLink {
    pub(super) fn new(address: &str, options: &ConnectOptions) -> Result<Self, AddressError> {
        let channels = (0..options.channels_per_node.max(1)).map(|_| channel(address, options));
        Ok(Self {
            address: address.to_owned(),
            channels: channels.collect::<Result<_, _>>()?,
            next: AtomicUsize::new(0),
            read_deadline: options.read_deadline,
            write_deadline: options.write_deadline,
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The connections take turns.
    fn channel(&self) -> Channel {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.channels[turn % self.channels.len()].clone()
    }

    fn bulk(&self) -> BulkRecordStoreClient {
        BulkRecordStoreClient::new(self.channel())
    }

    fn client(&self) -> RecordStoreClient<Channel> {
        RecordStoreClient::new(self.channel())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(super) async fn put(&self, request: v1::PutRequest) -> Result<v1::PutResponse, NodeError> {
        let request = timed(request, self.write_deadline);
        within(self.write_deadline, self.bulk().put(request)).await
    }

    pub(super) async fn get(&self, request: v1::GetRequest) -> Result<v1::GetResponse, NodeError> {
        let request = timed(request, self.read_deadline);
        within(self.read_deadline, self.bulk().get(request)).await
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

    async fn status(&self) -> Result<v1::NodeStatus, NodeError> {
        let mut client = self.client();
        let request = timed(v1::NodeStatusRequest {}, self.read_deadline);
        within(self.read_deadline, client.status(request)).await
    }
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

/// What is known of nodes that are not as they should be, by address.
#[derive(Debug, Default)]
struct Doubts {
    /// Not to be asked first before then.
    ask_last_until: HashMap<String, Instant>,
    /// Did not answer the last time, and not since.
    away: HashSet<String>,
    /// Asked in the background whether they are back.
    probed: HashSet<String>,
}

/// The nodes that were ever needed, by address, and which of them did not answer lately.
#[derive(Debug)]
pub(super) struct Links {
    options: ConnectOptions,
    by_address: Mutex<HashMap<String, Arc<NodeLink>>>,
    doubts: Mutex<Doubts>,
}

impl Links {
    pub(super) fn new(options: ConnectOptions) -> Self {
        Self { options, by_address: Mutex::default(), doubts: Mutex::default() }
    }

    pub(super) fn to(&self, address: &str) -> Result<Arc<NodeLink>, StoreError> {
        let mut links = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(address) {
            return Ok(Arc::clone(link));
        }
        let link = NodeLink::new(address, &self.options)
            .map_err(|error| StoreError::Unavailable(error.to_string()))?;
        let link = Arc::new(link);
        links.insert(address.to_owned(), Arc::clone(&link));
        Ok(link)
    }

    fn doubts(&self) -> MutexGuard<'_, Doubts> {
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether others are to be asked first.
    pub(super) fn is_asked_last(&self, address: &str) -> bool {
        self.doubts().ask_last_until.get(address).is_some_and(|until| Instant::now() < *until)
    }

    /// Whether the node did not answer the last time.
    pub(super) fn is_away(&self, address: &str) -> bool {
        self.doubts().away.contains(address)
    }

    /// Remembers whether the node answered.
    pub(super) fn noted<T>(&self, link: &NodeLink, answer: &Result<T, NodeError>) {
        let mut doubts = self.doubts();
        match answer {
            Err(NodeError::Unreachable(_)) => {
                let until = Instant::now() + ASK_LAST_FOR;
                doubts.ask_last_until.insert(link.address().to_owned(), until);
                doubts.away.insert(link.address().to_owned());
            }
            _ if doubts.ask_last_until.is_empty() => {}
            _ => {
                doubts.ask_last_until.remove(link.address());
                doubts.away.remove(link.address());
            }
        }
    }

    /// Remembers that the node took longer than usual. It may answer yet.
    pub(super) fn lags(&self, link: &NodeLink) {
        let until = Instant::now() + ASK_LAST_FOR;
        self.doubts().ask_last_until.insert(link.address().to_owned(), until);
    }

    /// Finds out in the background whether a node that nobody waits for any more answers again.
    pub(super) fn probe(self: &Arc<Self>, link: &Arc<NodeLink>) {
        if !self.doubts().probed.insert(link.address().to_owned()) {
            return;
        }
        let (links, link) = (Arc::clone(self), Arc::clone(link));
        tokio::spawn(async move {
            let answer = link.status().await;
            links.noted(&link, &answer);
            links.doubts().probed.remove(link.address());
        });
    }
}
