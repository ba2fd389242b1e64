//! Pools whose chunks are cut into shards.

use std::time::Instant;

use blobcr_proto::record::whole;

use super::*;
use crate::stripe::HEADER_LEN;

fn shard(object: &Object, place: usize) -> RecordKey {
    RecordKey { kind: object.kind, id: object.id, shard: place as u8 + 1 }
}

impl Cluster {
    fn take(&self, node: usize, key: RecordKey) -> (v1::Record, u64) {
        self.nodes[node].state.records.lock().unwrap().remove(&key).unwrap()
    }

    fn give(&self, node: usize, key: RecordKey, record: (v1::Record, u64)) {
        self.nodes[node].state.records.lock().unwrap().insert(key, record);
    }

    /// Changes the shard at a place so that only the object's identity tells.
    async fn lie(&self, object: &Object, place: usize) {
        let (node, key) = (self.placed(object).await[place], shard(object, place));
        let (mut record, generation) = self.take(node, key);
        let mut payload = record.payload.to_vec();
        payload[HEADER_LEN + 5] ^= 1;
        record.payload_crc32c = crc32c(&payload);
        record.payload = payload.into();
        self.give(node, key, (record, generation));
    }

    async fn reads(&self, object: &Object) -> Result<(), StoreError> {
        let plain = self.pool.get(object.kind, &object.id).await?;
        assert_eq!(plain, object.plain);
        Ok(())
    }

    /// Bytes of all payloads on all nodes.
    fn payload_bytes(&self) -> usize {
        let of_node = |node: &TestNode| -> usize {
            let records = node.state.records.lock().unwrap();
            records.values().map(|(record, _)| record.payload.len()).sum()
        };
        self.nodes.iter().map(of_node).sum()
    }
}

#[tokio::test]
async fn each_node_has_its_shard_and_the_tree_is_replicated() {
    let cluster = cluster(6, "ec:4+2", "adaptive").await;
    let mut objects = chunks(20);
    objects.push(object(RecordKind::Chunk, Vec::new()));
    let node = object(RecordKind::TreeNode, random(9, 500));
    objects.push(node.clone());
    let stored = cluster.pool.put(5, objects.clone()).await.unwrap();
    assert_eq!(stored.objects, 22);
    let with_parity = stored.bytes as usize * 6 / 4;
    assert!(cluster.payload_bytes() < with_parity + 22 * 6 * 24 + 1500, "{stored:?}");
    for object in &objects[..21] {
        for (place, at) in cluster.placed(object).await.into_iter().enumerate() {
            let records = cluster.nodes[at].state.records.lock().unwrap();
            assert!(records.contains_key(&shard(object, place)));
        }
        cluster.reads(object).await.unwrap();
    }
    let mut first = cluster.placed(&node).await[..3].to_vec();
    first.sort_unstable();
    assert_eq!(cluster.holders(&node), first);
    cluster.reads(&node).await.unwrap();
    let ids: Vec<Hash> = objects.iter().map(|object| object.id).collect();
    assert!(cluster.pool.touch(6, RecordKind::Chunk, &ids[..21]).await.unwrap().iter().all(|p| *p));
    let again = cluster.pool.put(6, objects).await.unwrap();
    assert_eq!((again.objects, again.bytes), (0, 0), "nothing was new");
}

#[tokio::test]
async fn writers_of_any_speed_cut_the_same_shards() {
    let cluster = cluster(3, "ec:2+1", "adaptive").await;
    let objects = chunks(30);
    cluster.pool.put(1, objects.clone()).await.unwrap();
    for object in objects.iter().skip(1).step_by(2) {
        let at = cluster.placed(object).await[0];
        let (record, _) = cluster.take(at, shard(object, 0));
        assert_eq!(record.codec(), v1::Codec::Lz4, "what compresses is compressed, always");
    }
}

#[tokio::test]
async fn any_two_nodes_of_four_and_two_may_be_gone() {
    let mut cluster = cluster(6, "ec:4+2", "lz4").await;
    let mut objects = chunks(8);
    objects.push(object(RecordKind::TreeNode, random(9, 500)));
    cluster.pool.put(1, objects.clone()).await.unwrap();
    for (a, b) in [(0, 1), (1, 4), (2, 5), (3, 0)] {
        cluster.nodes[a].server.kill();
        cluster.nodes[b].server.kill();
        for object in &objects {
            cluster.reads(object).await.unwrap();
        }
        cluster.nodes[a].restart();
        cluster.nodes[b].restart();
    }
    for at in 0..3 {
        cluster.nodes[at].server.kill();
    }
    let error = cluster.reads(&objects[0]).await.unwrap_err();
    assert!(error.is_transient(), "nobody knows what the dead nodes hold: {error}");
}

#[tokio::test]
async fn shards_that_lie_or_are_lost_lose_nothing_while_enough_are_left() {
    let cluster = cluster(6, "ec:4+2", "off").await;
    let objects = chunks(3);
    cluster.pool.put(1, objects.clone()).await.unwrap();
    let [lied, lost, mixed] = &objects[..] else { unreachable!("three were made") };
    for place in [1, 3] {
        cluster.lie(lied, place).await;
        cluster.reads(lied).await.unwrap();
        cluster.take(cluster.placed(lost).await[place], shard(lost, place));
        cluster.reads(lost).await.unwrap();
    }
    cluster.lie(mixed, 0).await;
    cluster.take(cluster.placed(mixed).await[5], shard(mixed, 5));
    cluster.reads(mixed).await.unwrap();
    for (object, there) in [(lied, 6), (lost, 3)] {
        cluster.lie(object, 4).await;
        if there == 3 {
            cluster.take(cluster.placed(object).await[4], shard(object, 4));
        }
        let error = cluster.reads(object).await.unwrap_err();
        assert!(matches!(&error, StoreError::Damaged { id, .. } if *id == object.id), "{error}");
        assert!(error.to_string().contains(&format!("{there} of its 6 shards")), "{error}");
    }
    let error = cluster.pool.get(RecordKind::Chunk, &Hash::of(b"none")).await.unwrap_err();
    assert!(matches!(error, StoreError::Missing { .. }), "{error}");
}

#[tokio::test]
async fn a_shard_is_found_where_its_place_was_another() {
    let cluster = cluster(3, "ec:2+1", "off").await;
    let [object] = &chunks(1)[..] else { unreachable!("one was made") };
    cluster.pool.put(1, vec![object.clone()]).await.unwrap();
    let placed = cluster.placed(object).await;
    let shards: Vec<_> = (0..3).map(|at| cluster.take(placed[at], shard(object, at))).collect();
    for (at, record) in shards.into_iter().enumerate() {
        cluster.give(placed[(at + 1) % 3], shard(object, at), record);
    }
    cluster.reads(object).await.unwrap();
    // A touch wants each at its place, and a put brings it there.
    let present = cluster.pool.touch(2, RecordKind::Chunk, &[object.id]).await.unwrap();
    assert_eq!(present, [false]);
    cluster.pool.put(2, vec![object.clone()]).await.unwrap();
    assert_eq!(cluster.pool.touch(2, RecordKind::Chunk, &[object.id]).await.unwrap(), [true]);
}

#[tokio::test]
async fn a_whole_record_in_place_of_a_shard_is_not_believed() {
    let cluster = cluster(3, "ec:2+1", "off").await;
    let [object] = &chunks(1)[..] else { unreachable!("one was made") };
    cluster.pool.put(1, vec![object.clone()]).await.unwrap();
    let (at, key) = (cluster.placed(object).await[0], shard(object, 0));
    let len = object.plain.len();
    let record = whole(object.kind, object.id, v1::Codec::Plain, len, object.plain.clone());
    cluster.give(at, key, (record, 1));
    cluster.reads(object).await.unwrap();
}

#[tokio::test]
async fn nobody_waits_for_a_slow_node() {
    let patient = ConnectOptions { read_deadline: Duration::from_secs(60), ..impatient() };
    for (nodes, policy) in [(6, "ec:4+2"), (3, "replica:3")] {
        let cluster = cluster_with(nodes, policy, "off", patient.clone()).await;
        let mut objects = chunks(6);
        objects.push(object(RecordKind::TreeNode, random(9, 500)));
        cluster.pool.put(1, objects.clone()).await.unwrap();
        let _held: Vec<_> =
            [0, 2].map(|at| cluster.nodes[at].state.faults.hold_next("get", 1000)).into();
        let begun = Instant::now();
        for object in &objects {
            cluster.reads(object).await.unwrap();
            cluster.pool.get_many(object.kind, &[object.id]).await.unwrap();
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(30), "{policy}: {took:?}");
    }
}
