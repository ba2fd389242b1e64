//! One repository node, as the steward talks to it: to it alone, past any placement.

use std::time::Duration;

use blobcr_proto::v1::record_store_client::RecordStoreClient;
use blobcr_proto::{Hash, MESSAGE_BYTES_MAX, v1};
use blobcr_repository::ConnectOptions;
use blobcr_repository::client::channel;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Response, Status};

/// For one answer: a delete waits for its group's sync, a get for a busy disk.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why a node did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("repository node {address}: {detail}")]
pub struct NodeError {
    /// Where it is.
    pub address: String,
    /// What it said, or that it did not answer.
    pub detail: String,
}

/// A connection to one node.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) registered: v1::Node,
    client: RecordStoreClient<Channel>,
}

impl Node {
    /// Connects, and asks the node who it is: at the address of one that is gone, a node of another
    /// repository may answer, and nothing of that must be touched.
    pub(crate) async fn open(
        registered: v1::Node,
        options: &ConnectOptions,
    ) -> Result<Self, NodeError> {
        let failed = |detail: String| NodeError { address: registered.address.clone(), detail };
        let channel =
            channel(&registered.address, options).map_err(|error| failed(error.to_string()))?;
        let client = RecordStoreClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let node = Self { registered: registered.clone(), client };
        let found = node
            .ask(|mut client| async move { client.status(timed(v1::NodeStatusRequest {})).await });
        let found = found.await?.node_id;
        if found == registered.id {
            return Ok(node);
        }
        Err(failed(format!("the node {found} answers there, not {}", registered.id)))
    }

    async fn ask<T, F>(
        &self,
        call: impl FnOnce(RecordStoreClient<Channel>) -> F,
    ) -> Result<T, NodeError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let failed = |detail| NodeError { address: self.registered.address.clone(), detail };
        match timeout(DEADLINE, call(self.client.clone())).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(failed(status.message().to_owned())),
            Err(_) => Err(failed(format!("no answer within {DEADLINE:?}"))),
        }
    }

    /// A page of records, and whether there are more behind it.
    pub(crate) async fn list(
        &self,
        pool: u32,
        kind: v1::RecordKind,
        after: Option<v1::RecordRef>,
        limit: u32,
    ) -> Result<(Vec<Listed>, bool), NodeError> {
        let request = v1::ListRequest { pool, kind: kind.into(), after, limit };
        let page = self.ask(|mut client| async move { client.list(timed(request)).await }).await?;
        let listed = |record: v1::ListedRecord| {
            let key = record.r#ref?;
            let id = Hash::from_slice(&key.id)?;
            let v1::ListedRecord { generation, stored_bytes, .. } = record;
            Some(Listed { id, key, generation, stored_bytes })
        };
        let count = page.records.len();
        let records: Vec<Listed> = page.records.into_iter().filter_map(listed).collect();
        if records.len() == count {
            return Ok((records, page.more && count > 0));
        }
        let address = self.registered.address.clone();
        Err(NodeError { address, detail: "it listed a record without an identity".into() })
    }

    pub(crate) async fn delete(
        &self,
        pool: u32,
        refs: Vec<v1::RecordRef>,
        before_generation: u64,
    ) -> Result<v1::DeleteResponse, NodeError> {
        let request = v1::DeleteRequest { pool, refs, before_generation };
        self.ask(|mut client| async move { client.delete(timed(request)).await }).await
    }

    /// Has the node read about so many bytes of its records, and tell which are damaged.
    pub(crate) async fn check(
        &self,
        pool: u32,
        kind: v1::RecordKind,
        after: Option<v1::RecordRef>,
        limit_bytes: u64,
    ) -> Result<v1::CheckResponse, NodeError> {
        let request = v1::CheckRequest { pool, kind: kind.into(), after, limit_bytes };
        self.ask(|mut client| async move { client.check(timed(request)).await }).await
    }

    pub(crate) async fn get(
        &self,
        pool: u32,
        refs: Vec<v1::RecordRef>,
    ) -> Result<Vec<v1::Found>, NodeError> {
        let request = v1::GetRequest { pool, refs, table_version: 0 };
        Ok(self.ask(|mut client| async move { client.get(timed(request)).await }).await?.found)
    }

    /// Raises records to a generation; tells which of them the node has.
    pub(crate) async fn touch(
        &self,
        pool: u32,
        generation: u64,
        refs: Vec<v1::RecordRef>,
    ) -> Result<Vec<bool>, NodeError> {
        let request = v1::TouchRequest { pool, generation, refs, table_version: 0 };
        let done = self.ask(|mut client| async move { client.touch(timed(request)).await });
        Ok(done.await?.present)
    }

    pub(crate) async fn put(
        &self,
        pool: u32,
        generation: u64,
        records: Vec<v1::Record>,
    ) -> Result<v1::PutResponse, NodeError> {
        let request = v1::PutRequest { pool, generation, records, table_version: 0 };
        self.ask(|mut client| async move { client.put(timed(request)).await }).await
    }
}

/// A record of a node's list.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) id: Hash,
    pub(crate) key: v1::RecordRef,
    pub(crate) generation: u64,
    pub(crate) stored_bytes: u64,
}

/// The place behind every record of an identity, whatever its shard.
pub(crate) fn behind(kind: v1::RecordKind, id: Hash) -> v1::RecordRef {
    v1::RecordRef { kind: kind.into(), id: id.to_bytes(), shard: u8::MAX.into() }
}

fn timed<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(DEADLINE);
    request
}
