//! The store over gRPC: what the messages and statuses of `records.proto` promise.

use std::sync::Arc;

use crate::common::{chunk, open, options};
use blobcr_proto::bulk::BulkRecordStoreClient;
use blobcr_proto::v1;
use blobcr_proto::v1::record_store_client::RecordStoreClient;
use blobcr_proto::{Hash, MESSAGE_BYTES_MAX};
use blobcr_repo_node::service::{LIST_LIMIT_MAX, RECORDS_PER_REQUEST_MAX};
use blobcr_repo_node::{ChunkStore, server_builder, service};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Channel;
use tonic::{Code, Request};

async fn serve(store: ChunkStore) -> RecordStoreClient<Channel> {
    RecordStoreClient::new(connect(store).await)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

async fn connect(store: ChunkStore) -> Channel {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let service = service(Arc::new(store));
    let server = server_builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Channel::from_shared(address).unwrap().connect().await.unwrap()
}

fn put(records: Vec<v1::Record>) -> v1::PutRequest {
    v1::PutRequest { pool: 1, generation: 5, records, table_version: 0 }
}

fn refs(records: &[v1::Record]) -> Vec<v1::RecordRef> {
    records.iter().map(|record| record.r#ref.clone().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), 64 << 20);
    let node_id = store.node_id();
    let mut client = serve(store).await;
    // The largest chunk thrice, and small ones.
    let records: Vec<_> = (0..3).map(|n| chunk(n, 4 << 20)).chain([chunk(3, 10)]).collect();
    let done = client.put(put(records.clone())).await.unwrap().into_inner();
    assert_eq!(done.stored, 4);
    let absent = Hash::of(b"absent").to_bytes();
    let mut asked = refs(&records);
    asked.push(v1::RecordRef { id: absent, ..asked[0].clone() });
    let get = v1::GetRequest { pool: 1, refs: asked.clone(), table_version: 0 };
    let found = client.get(get).await.unwrap().into_inner().found;
    let whole: Vec<_> = found.iter().map(|found| found.record.clone()).collect();
    let expected: Vec<_> = records.iter().cloned().map(Some).chain([None]).collect();
    assert_eq!(whole, expected);

    let touch =
        v1::TouchRequest { pool: 1, generation: 8, refs: asked[3..].to_vec(), table_version: 0 };
    assert_eq!(client.touch(touch).await.unwrap().into_inner().present, [true, false]);
    let delete = v1::DeleteRequest { pool: 1, refs: asked.clone(), before_generation: 8 };
    let deleted = client.delete(delete).await.unwrap().into_inner();
    assert_eq!((deleted.deleted, deleted.kept), (3, 1));
    let list = v1::ListRequest { pool: 1, kind: 1, after: None, limit: 0 };
    let listed = client.list(list).await.unwrap().into_inner();
    let expected =
        v1::ListedRecord { r#ref: Some(asked[3].clone()), generation: 8, stored_bytes: 96 };
    assert_eq!((listed.records, listed.more), (vec![expected], false));
    let status = client.status(v1::NodeStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.node_id, status.records, status.live_bytes), (node_id, 1, 96));
    assert!(status.capacity_bytes > status.free_bytes && !status.poisoned && !status.full);
}

/// What is sent in pieces is what the generated client sends, and so are answers and refusals.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_copy_nothing_are_the_same_calls() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), 64 << 20);
    let channel = connect(store).await;
    let bulk = BulkRecordStoreClient::new(channel.clone());
    let mut generated =
        RecordStoreClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let sizes = [4 << 20, 0, 16 << 10, (16 << 10) + 1, 300_000, 4 << 20];
    let records: Vec<_> = sizes.iter().zip(0..).map(|(size, n)| chunk(n, *size)).collect();
    let done = bulk.put(Request::new(put(records.clone()))).await.unwrap().into_inner();
    assert_eq!(done.stored, 6);
    assert_eq!(generated.put(put(records.clone())).await.unwrap().into_inner().stored, 0);
    let get = v1::GetRequest { pool: 1, refs: refs(&records), table_version: 0 };
    let found = bulk.get(Request::new(get.clone())).await.unwrap().into_inner();
    assert!(found.found.iter().zip(&records).all(|(f, r)| f.record.as_ref() == Some(r)));
    assert!(generated.get(get.clone()).await.unwrap().into_inner() == found);

    let bad = put(vec![v1::Record { payload_crc32c: 1, ..records[4].clone() }]);
    let refused = bulk.put(Request::new(bad.clone())).await.unwrap_err();
    let expected = generated.put(bad).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (expected.code(), expected.message()));
    assert_eq!(refused.code(), Code::InvalidArgument);
    // More than a message may have, in either direction.
    let long = put((10..15).map(|n| chunk(n, 4 << 20)).collect());
    assert_eq!(bulk.put(Request::new(long)).await.unwrap_err().code(), Code::OutOfRange);
    let long = v1::GetRequest { refs: vec![get.refs[0].clone(); 4], ..get };
    assert_eq!(bulk.get(Request::new(long)).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_their_status() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), 64 << 20);
    let mut client = serve(store).await;
    let record = chunk(1, 100);

    let bad = v1::Record { payload_crc32c: 1, ..record.clone() };
    let status = client.put(put(vec![bad])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("checksum"), "{status}");

    let r#ref = record.r#ref.clone().unwrap();
    for bad in [
        v1::RecordRef { kind: 0, ..r#ref.clone() },
        v1::RecordRef { kind: 77, ..r#ref.clone() },
        v1::RecordRef { shard: 256, ..r#ref.clone() },
        v1::RecordRef { id: vec![1; 31].into(), ..r#ref.clone() },
    ] {
        let get = v1::GetRequest { pool: 1, refs: vec![bad], table_version: 0 };
        assert_eq!(client.get(get).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let many = vec![r#ref.clone(); RECORDS_PER_REQUEST_MAX + 1];
    let touch = v1::TouchRequest { pool: 1, generation: 1, refs: many, table_version: 0 };
    assert_eq!(client.touch(touch).await.unwrap_err().code(), Code::InvalidArgument);
    let list = v1::ListRequest { pool: 1, kind: 0, after: None, limit: 1 };
    assert_eq!(client.list(list).await.unwrap_err().code(), Code::InvalidArgument);

    // More than one answer may have.
    let large = chunk(2, 4 << 20);
    client.put(put(vec![large.clone()])).await.unwrap();
    let refs = vec![large.r#ref.unwrap(); 4];
    let status = client.get(v1::GetRequest { pool: 1, refs, table_version: 0 }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("fewer"), "{status}");
}

#[test]
fn a_full_disk_is_resource_exhausted_and_reads_and_deletes_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let record = chunk(1, 100);
    let (store, _) = open(dir.path(), 1 << 20);
    store.put(1, 1, std::slice::from_ref(&record)).unwrap();
    drop(store);
    // A reserve that no disk has.
    let options = blobcr_repo_node::Options { reserve_bytes: Some(u64::MAX), ..options(1 << 20) };
    let (store, _) = ChunkStore::open(dir.path(), options).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = serve(store).await;
        let status = client.put(put(vec![chunk(2, 100)])).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(client.status(v1::NodeStatusRequest {}).await.unwrap().into_inner().full);
        // What is there already needs no room.
        assert_eq!(client.put(put(vec![record.clone()])).await.unwrap().into_inner().stored, 0);
        let refs = refs(&[record]);
        let get = v1::GetRequest { pool: 1, refs: refs.clone(), table_version: 0 };
        assert!(client.get(get).await.unwrap().into_inner().found[0].record.is_some());
        let delete = v1::DeleteRequest { pool: 1, refs, before_generation: 6 };
        assert_eq!(client.delete(delete).await.unwrap().into_inner().deleted, 1);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_asks_for_too_much_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), 1 << 20);
    let mut client = serve(store).await;
    client.put(put((0..100).map(|n| chunk(n, 10)).collect())).await.unwrap();
    let list = v1::ListRequest { pool: 1, kind: 1, after: None, limit: u32::MAX };
    let listed = client.list(list).await.unwrap().into_inner();
    assert_eq!((listed.records.len(), listed.more), (100, false));
    const { assert!(LIST_LIMIT_MAX * 100 < MESSAGE_BYTES_MAX) };
}
