mod degraded;
mod erasure;

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::codec::{PLAIN_LEN_MAX, crc32c};
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_proto::{ChunkSize, Hash};
use bytes::Bytes;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use tonic::Status;

use super::impatient;
use super::servers::{TestNode, metadata_server};
use crate::client::RemotePools;
use crate::testing::{MemoryCatalog, MemoryDisk};
use crate::tree::{FanOut, Geometry, Root};
use crate::{
    Catalog, CatalogError, ConnectOptions, Object, ObjectStore, PersistJob, PersistLimits,
    PoolOpener, Repository, StoreError, is_zero, persist, verify,
};

/// A pool over real nodes.
struct Cluster {
    catalog: MemoryCatalog,
    nodes: Vec<TestNode>,
    pool: Arc<dyn ObjectStore>,
}

async fn register(catalog: &MemoryCatalog, at: usize, node: &TestNode) {
    let request = v1::RegisterNodeRequest {
        id: format!("node-{at}"),
        address: node.server.address.to_string(),
        domain: format!("rack-{at}"),
        cluster: String::new(),
    };
    catalog.register_node(request).await.unwrap();
}

async fn open(
    catalog: &MemoryCatalog,
    policy: &str,
    compression: &str,
    options: ConnectOptions,
) -> Result<Arc<dyn ObjectStore>, CatalogError> {
    let (name, policy, compression) = ("test".into(), policy.into(), compression.into());
    let request = v1::CreatePoolRequest { name, policy, compression };
    let pool = catalog.create_pool(request).await?;
    let shared: Arc<dyn Catalog> = Arc::new(catalog.clone());
    RemotePools::new(options).open(&shared, pool).await
}

async fn cluster(nodes: usize, policy: &str, compression: &str) -> Cluster {
    cluster_with(nodes, policy, compression, impatient()).await
}

async fn cluster_with(
    nodes: usize,
    policy: &str,
    compression: &str,
    options: ConnectOptions,
) -> Cluster {
    let catalog = MemoryCatalog::default();
    let nodes: Vec<TestNode> = (0..nodes).map(|_| TestNode::start()).collect();
    for (at, node) in nodes.iter().enumerate() {
        register(&catalog, at, node).await;
    }
    let pool = open(&catalog, policy, compression, options).await.unwrap();
    Cluster { catalog, nodes, pool }
}

fn object(kind: RecordKind, plain: impl Into<Bytes>) -> Object {
    let plain = plain.into();
    Object { kind, id: Hash::of(&plain), plain }
}

fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Chunks of which every second one compresses.
fn chunks(count: u64) -> Vec<Object> {
    let chunk = |seed| {
        let bytes = random(seed, 70_000);
        let repeated = bytes[..700].repeat(100);
        object(RecordKind::Chunk, if seed % 2 == 0 { bytes } else { repeated })
    };
    (0..count).map(chunk).collect()
}

impl Cluster {
    /// The nodes that hold a record.
    fn holders(&self, object: &Object) -> Vec<usize> {
        let key = RecordKey::whole(object.kind, object.id);
        let holds = |node: &TestNode| node.state.records.lock().unwrap().contains_key(&key);
        (0..self.nodes.len()).filter(|at| holds(&self.nodes[*at])).collect()
    }

    /// The nodes that hold a record, first choice first.
    async fn placed(&self, object: &Object) -> Vec<usize> {
        let by_name = v1::GetPlacementRequest { name: "test".into(), ..Default::default() };
        let table = self.catalog.get_placement(by_name).await.unwrap();
        let partition = (object.id.prefix() >> 54) as usize;
        table.partitions[partition].node.iter().map(|at| *at as usize).collect()
    }

    fn lose(&self, at: usize, object: &Object) {
        let key = RecordKey::whole(object.kind, object.id);
        self.nodes[at].state.records.lock().unwrap().remove(&key).unwrap();
    }

    /// Rots a record so that only its identity tells.
    fn rot(&self, at: usize, object: &Object) {
        let key = RecordKey::whole(object.kind, object.id);
        let mut records = self.nodes[at].state.records.lock().unwrap();
        let (record, _) = records.get_mut(&key).unwrap();
        let mut payload = object.plain.to_vec();
        payload[5] ^= 1;
        record.set_codec(v1::Codec::Plain);
        record.payload_crc32c = crc32c(&payload);
        record.payload = payload.into();
    }

    fn calls(&self, operation: &'static str) -> u64 {
        self.nodes.iter().map(|node| node.state.faults.calls(operation)).sum()
    }
}

#[tokio::test]
async fn objects_are_on_their_nodes_and_come_back() {
    let cluster = cluster(4, "replica:2", "adaptive").await;
    let mut objects = chunks(40);
    objects.push(object(RecordKind::TreeNode, random(9, 500)));
    objects.push(object(RecordKind::Chunk, Vec::new()));
    let stored = cluster.pool.put(5, objects.clone()).await.unwrap();
    assert_eq!(stored.objects, 42);
    let plain: u64 = objects.iter().map(|object| object.plain.len() as u64).sum();
    assert!(stored.bytes < plain * 6 / 10, "{} of {plain}", stored.bytes);
    for object in &objects {
        let mut placed = cluster.placed(object).await;
        assert_eq!(placed.len(), 2);
        placed.sort_unstable();
        assert_eq!(cluster.holders(object), placed);
        assert_eq!(cluster.pool.get(object.kind, &object.id).await.unwrap(), object.plain);
    }
    let again = cluster.pool.put(6, objects).await.unwrap();
    assert_eq!((again.objects, again.bytes), (0, 0), "nothing was new");
}

#[tokio::test]
async fn the_pools_compression_is_applied() {
    for (compression, codec) in
        [("off", v1::Codec::Plain), ("lz4", v1::Codec::Lz4), ("zstd", v1::Codec::Zstd)]
    {
        let cluster = cluster(1, "replica:1", compression).await;
        let objects = [
            object(RecordKind::Chunk, b"the same again ".repeat(5000)),
            object(RecordKind::TreeNode, b"the same again ".repeat(500)),
        ];
        cluster.pool.put(1, objects.to_vec()).await.unwrap();
        let records = cluster.nodes[0].state.records.lock().unwrap();
        let codec_of =
            |object: &Object| records[&RecordKey::whole(object.kind, object.id)].0.codec();
        assert_eq!(codec_of(&objects[0]), codec);
        assert_eq!(codec_of(&objects[1]), v1::Codec::Plain, "nodes are never compressed");
    }
}

#[tokio::test]
async fn a_read_falls_back_to_the_other_replicas() {
    let mut cluster = cluster(3, "replica:3", "off").await;
    let objects = chunks(4);
    cluster.pool.put(1, objects.clone()).await.unwrap();
    let placed = cluster.placed(&objects[0]).await;
    cluster.lose(placed[0], &objects[0]);
    let get = |object: &Object| {
        let (pool, kind, id) = (Arc::clone(&cluster.pool), object.kind, object.id);
        async move { pool.get(kind, &id).await }
    };
    assert_eq!(get(&objects[0]).await.unwrap(), objects[0].plain, "missing on the first");
    cluster.rot(placed[1], &objects[0]);
    assert_eq!(get(&objects[0]).await.unwrap(), objects[0].plain, "damaged on the second");
    cluster.rot(placed[2], &objects[0]);
    let error = get(&objects[0]).await.unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { id, .. } if *id == objects[0].id), "{error}");
    cluster.lose(placed[1], &objects[0]);
    cluster.lose(placed[2], &objects[0]);
    let error = get(&objects[0]).await.unwrap_err();
    assert!(matches!(error, StoreError::Missing { .. }), "{error}");
    assert!(!error.is_transient());
    cluster.nodes[placed[1]].server.kill();
    let error = get(&objects[0]).await.unwrap_err();
    assert!(error.is_transient(), "nobody knows what the dead node holds: {error}");
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_asked_last_for_a_while() {
    let cluster = cluster(2, "replica:2", "off").await;
    let objects = chunks(10);
    cluster.pool.put(1, objects.clone()).await.unwrap();
    let _held = cluster.nodes[0].state.faults.hold_next("get", 1000);
    for object in &objects {
        assert_eq!(cluster.pool.get(object.kind, &object.id).await.unwrap(), object.plain);
    }
    let asked = cluster.nodes[0].state.faults.calls("get");
    assert_eq!(asked, 1, "only the first read waited");
}

#[tokio::test]
async fn a_put_needs_all_its_nodes() {
    let mut cluster = cluster(2, "replica:2", "off").await;
    let objects = chunks(6);
    cluster.nodes[1].server.kill();
    let error = cluster.pool.put(1, objects.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)) && error.is_transient(), "{error}");
    let address = cluster.nodes[1].server.address.to_string();
    assert!(error.to_string().contains(&address), "{error} names {address}");
    cluster.nodes[1].restart();
    // How many the first node has had since the first attempt is a matter of luck.
    cluster.pool.put(1, objects.clone()).await.unwrap();
    let stored = cluster.pool.put(1, objects.clone()).await.unwrap();
    assert_eq!(stored.objects, 0);
    for object in &objects {
        assert_eq!(cluster.holders(object), [0, 1]);
    }
}

#[tokio::test]
async fn refusals_are_told_as_what_they_are() {
    let cluster = cluster(1, "replica:1", "off").await;
    let put = |status: Status| {
        cluster.nodes[0].state.faults.fail_next("put", 1, status);
        cluster.pool.put(1, chunks(1))
    };
    let full = put(Status::resource_exhausted("3 bytes left")).await.unwrap_err();
    assert!(matches!(&full, StoreError::Full { detail, .. } if detail == "3 bytes left"));
    assert!(full.is_transient());
    let busy = put(Status::resource_exhausted("Too many active requests for the connection"));
    assert!(matches!(busy.await.unwrap_err(), StoreError::Unavailable(_)));
    let poisoned = put(Status::failed_precondition("an fsync failed")).await.unwrap_err();
    assert!(poisoned.is_transient(), "a restart mends it: {poisoned}");
    let never = put(Status::invalid_argument("no such pool")).await.unwrap_err();
    assert!(matches!(never, StoreError::Refused { .. }) && !never.is_transient());
}

#[tokio::test]
async fn every_node_call_ends_by_its_deadline() {
    let catalog = MemoryCatalog::default();
    let node = TestNode::start();
    register(&catalog, 0, &node).await;
    let deadline = Duration::from_millis(300);
    let options =
        ConnectOptions { read_deadline: deadline, write_deadline: deadline, ..impatient() };
    let pool = open(&catalog, "replica:1", "off", options).await.unwrap();
    let one = chunks(1);
    let faults = &node.state.faults;
    let _held = ["put", "touch", "get"].map(|operation| faults.hold_next(operation, 9));
    let put = pool.put(1, one.clone()).await.unwrap_err();
    let touch = pool.touch(1, RecordKind::Chunk, &[one[0].id]).await.unwrap_err();
    let get = pool.get(RecordKind::Chunk, &one[0].id).await.unwrap_err();
    for error in [put, touch, get] {
        assert!(error.is_transient());
        assert!(error.to_string().contains("no answer within 300ms"), "{error}");
    }
}

#[tokio::test]
async fn a_touch_asks_each_node_once_and_needs_all_replicas() {
    let cluster = cluster(3, "replica:2", "off").await;
    let objects = chunks(60);
    cluster.pool.put(1, objects.clone()).await.unwrap();
    let mut ids: Vec<Hash> = objects.iter().map(|object| object.id).collect();
    ids.insert(7, Hash::of(b"never stored"));
    cluster.lose(cluster.holders(&objects[3])[0], &objects[3]);
    cluster.lose(cluster.holders(&objects[50])[1], &objects[50]);
    let present = cluster.pool.touch(9, RecordKind::Chunk, &ids).await.unwrap();
    let absent: Vec<usize> = (0..ids.len()).filter(|at| !present[*at]).collect();
    assert_eq!(absent, [3, 7, 51]);
    assert_eq!(cluster.calls("touch"), 3, "one request to each node");
    for node in &cluster.nodes {
        let records = node.state.records.lock().unwrap();
        assert!(records.values().all(|(_, generation)| *generation == 9));
    }
    assert!(cluster.pool.touch(9, RecordKind::Chunk, &[]).await.unwrap().is_empty());
}

#[tokio::test]
async fn many_small_objects_take_few_requests() {
    let cluster = cluster(3, "replica:2", "off").await;
    let objects: Vec<Object> =
        (0..300).map(|seed| object(RecordKind::TreeNode, random(seed, 300))).collect();
    cluster.pool.put(1, objects.clone()).await.unwrap();
    assert_eq!(cluster.calls("put"), 6, "three pairs of nodes");
    let ids: Vec<Hash> = objects.iter().map(|object| object.id).collect();
    let got = cluster.pool.get_many(RecordKind::TreeNode, &ids).await.unwrap();
    assert!(got.iter().eq(objects.iter().map(|object| &object.plain)), "in order");
    assert_eq!(cluster.calls("get"), 3, "one request to each node");
    // What the first choice lost comes from the second.
    cluster.lose(cluster.placed(&objects[4]).await[0], &objects[4]);
    cluster.rot(cluster.placed(&objects[5]).await[0], &objects[5]);
    let got = cluster.pool.get_many(RecordKind::TreeNode, &ids).await.unwrap();
    assert!(got.iter().eq(objects.iter().map(|object| &object.plain)));
}

#[tokio::test]
async fn the_largest_chunks_fit_in_messages() {
    let cluster = cluster(2, "replica:2", "off").await;
    let objects: Vec<Object> =
        (0..5).map(|seed| object(RecordKind::Chunk, random(seed, PLAIN_LEN_MAX))).collect();
    let stored = cluster.pool.put(1, objects.clone()).await.unwrap();
    assert_eq!((stored.objects, stored.bytes), (5, 5 * PLAIN_LEN_MAX as u64));
    let ids: Vec<Hash> = objects.iter().map(|object| object.id).collect();
    let got = cluster.pool.get_many(RecordKind::Chunk, &ids).await.unwrap();
    assert!(got.iter().eq(objects.iter().map(|object| &object.plain)));
}

#[tokio::test]
async fn a_node_that_moved_is_found_again() {
    let mut cluster = cluster(2, "replica:2", "off").await;
    let objects = chunks(8);
    cluster.pool.put(1, objects.clone()).await.unwrap();
    for at in 0..2 {
        cluster.nodes[at].move_elsewhere();
        register(&cluster.catalog, at, &cluster.nodes[at]).await;
    }
    // The table was asked for only just now: it takes a moment until it is again.
    let found = async {
        while cluster.pool.put(2, chunks(12)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.unwrap();
    for object in &objects {
        assert_eq!(cluster.pool.get(object.kind, &object.id).await.unwrap(), object.plain);
    }
}

#[tokio::test]
async fn a_pool_without_enough_nodes_may_have_them_later() {
    let catalog = MemoryCatalog::default();
    let node = TestNode::start();
    let pool = open(&catalog, "replica:1", "off", impatient()).await.unwrap();
    let error = pool.put(1, chunks(1)).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("needs 1 nodes"), "{error}");
    register(&catalog, 0, &node).await;
    pool.put(1, chunks(1)).await.unwrap();
}

#[tokio::test]
async fn policies_that_are_not_known_are_refused() {
    let other = v1::Pool { policy: "raid:5".into(), ..Default::default() };
    let shared: Arc<dyn Catalog> = Arc::new(MemoryCatalog::default());
    let error = RemotePools::new(impatient()).open(&shared, other).await.err().unwrap();
    assert!(matches!(error, CatalogError::Invalid(_)), "{error}");
}

/// The whole client: metadata over the wire, three nodes, one of which dies in the middle of a
/// persist and comes back.
#[tokio::test]
async fn a_persist_survives_the_death_of_a_node() {
    let catalog = MemoryCatalog::default();
    let mut nodes: Vec<TestNode> = (0..3).map(|_| TestNode::start()).collect();
    for (at, node) in nodes.iter().enumerate() {
        register(&catalog, at, node).await;
    }
    let (name, policy) = ("safe".into(), "replica:2".into());
    let request = v1::CreatePoolRequest { name, policy, compression: "adaptive".into() };
    let pool_id = catalog.create_pool(request).await.unwrap().id;
    let server = metadata_server(&catalog);
    let addresses = [server.address.to_string()];
    let repository = Repository::connect(&addresses, impatient()).await.unwrap();
    let (pool, tree) =
        (repository.pool(pool_id).await.unwrap(), repository.nodes(pool_id).await.unwrap());

    let chunk_size = ChunkSize::MIN;
    let disk = MemoryDisk::new(random(4, 200 * chunk_size.len()), chunk_size);
    assert!(!is_zero(disk.bytes()));
    let size = disk.bytes().len() as u64;
    let geometry = Geometry::new(size, chunk_size, FanOut::DEFAULT).unwrap();
    let stalled = tokio::sync::watch::Sender::new(false);
    let job = PersistJob {
        base: Root::empty(geometry),
        geometry,
        chunks: (0..200).collect(),
        generation: 1,
        source: &disk,
        progress: &|step| stalled.send_modify(|seen| *seen |= step.stalled.is_some()),
        limits: PersistLimits { puts: 2, put_bytes: 1, ..PersistLimits::default() },
    };
    nodes[1].state.faults.pass_next("put", 20);
    let held = nodes[1].state.faults.hold_next("put", 1);
    let persisting = persist(&*pool, &*tree, job);
    let meanwhile = async {
        held.arrived(1).await;
        nodes[1].server.kill();
        stalled.subscribe().wait_for(|seen| *seen).await.unwrap();
        nodes[1].restart();
    };
    let (done, ()) = futures::join!(persisting, meanwhile);
    let done = done.unwrap();
    let patience = Duration::from_secs(5);
    let found = verify(&pool, &done.root, patience, &|_, _| ()).await.unwrap();
    assert!(found.is_whole(), "{:?}", found.damage);
    assert_eq!(found.chunks, 200);
    // To the policy: whichever node dies, all is there.
    for (at, node) in nodes.iter_mut().enumerate() {
        node.server.kill();
        let found = verify(&pool, &done.root, patience, &|_, _| ()).await.unwrap();
        assert!(found.is_whole(), "without node {at}: {:?}", found.damage);
        node.restart();
    }
}
