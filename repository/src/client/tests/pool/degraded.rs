//! Writes while some holders are away: acknowledged with fewer, but never without a record of it.

use std::collections::BTreeMap;
use std::time::Instant;

use super::*;

impl Cluster {
    /// Objects owed, by partition.
    async fn debt(&self) -> BTreeMap<u32, u64> {
        let pool = self.catalog.get_pool(v1::PoolRef { name: "test".into(), id: 0 }).await.unwrap();
        let request = v1::ListDebtRequest { pool: pool.id, after: None, limit: 0 };
        let debts = self.catalog.list_debt(request).await.unwrap().debts;
        debts.into_iter().map(|debt| (debt.partition, debt.objects)).collect()
    }

    async fn present(&self, objects: &[Object]) -> Result<Vec<bool>, StoreError> {
        let ids: Vec<Hash> = objects.iter().map(|object| object.id).collect();
        self.pool.touch(2, RecordKind::Chunk, &ids).await
    }

    fn reports(&self) -> u64 {
        self.catalog.faults().calls("report_debt")
    }
}

fn by_partition(objects: &[Object]) -> BTreeMap<u32, u64> {
    let mut counts = BTreeMap::new();
    for object in objects {
        *counts.entry((object.id.prefix() >> 54) as u32).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn what_a_degraded_put_owes_is_recorded_before_it_is_acknowledged() {
    for (nodes, policy) in [(3, "replica:3"), (6, "ec:4+2")] {
        let mut cluster = cluster(nodes, policy, "off").await;
        let objects = chunks(12);
        cluster.nodes[1].server.kill();
        let stored = cluster.pool.put(1, objects.clone()).await.unwrap();
        assert_eq!(stored.objects, 12);
        assert_eq!(cluster.reports(), 1, "one report for a call");
        assert_eq!(cluster.debt().await, by_partition(&objects), "{policy}");
        for object in &objects {
            let got = cluster.pool.get(object.kind, &object.id).await.unwrap();
            assert_eq!(got, object.plain);
        }
        // They are there, and what a second writer relies on is recorded as well.
        assert!(cluster.present(&objects).await.unwrap().iter().all(|present| *present));
        assert_eq!(cluster.reports(), 2);
        // Once the node is back, it lacks them: they are put again, and nothing more is owed.
        cluster.nodes[1].restart();
        let back = async {
            while cluster.present(&objects).await.unwrap().iter().any(|present| *present) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), back).await.unwrap();
        let before = cluster.reports();
        cluster.pool.put(2, objects.clone()).await.unwrap();
        assert!(cluster.present(&objects).await.unwrap().iter().all(|present| *present));
        assert_eq!(cluster.reports(), before);
    }
}

#[tokio::test]
async fn nothing_is_acknowledged_below_the_least() {
    for (nodes, policy) in [(3, "replica:3"), (6, "ec:4+2")] {
        let mut cluster = cluster(nodes, policy, "off").await;
        cluster.nodes[0].server.kill();
        cluster.nodes[2].server.kill();
        let error = cluster.pool.put(1, chunks(4)).await.unwrap_err();
        assert!(error.is_transient(), "{policy}: {error}");
        assert_eq!(cluster.reports(), 0, "{policy}");
        let error = cluster.present(&chunks(4)).await;
        assert!(error.is_err() || error.unwrap().iter().all(|present| !present), "{policy}");
    }
}

#[tokio::test]
async fn tree_nodes_are_written_with_as_many_copies_as_their_losses_need() {
    let mut cluster = cluster(6, "ec:4+2", "off").await;
    let node = object(RecordKind::TreeNode, random(9, 500));
    let placed = cluster.placed(&node).await;
    cluster.nodes[placed[1]].server.kill();
    cluster.pool.put(1, vec![node.clone()]).await.unwrap();
    assert_eq!(cluster.debt().await, by_partition(std::slice::from_ref(&node)));
    cluster.nodes[placed[0]].server.kill();
    assert!(cluster.pool.put(1, vec![node.clone()]).await.unwrap_err().is_transient());
    let got = cluster.pool.get_many(RecordKind::TreeNode, &[node.id]).await.unwrap();
    assert_eq!(got, [node.plain]);
}

#[tokio::test]
async fn a_full_or_poisoned_holder_is_owed_and_one_that_refuses_is_told() {
    let cluster = cluster(3, "replica:3", "off").await;
    let objects = chunks(2);
    let put = |status: Status| {
        cluster.nodes[1].state.faults.fail_next("put", 1, status);
        cluster.pool.put(1, objects[..1].to_vec())
    };
    put(Status::resource_exhausted("3 bytes left")).await.unwrap();
    put(Status::failed_precondition("an fsync failed")).await.unwrap();
    assert_eq!(cluster.reports(), 2);
    let error = put(Status::invalid_argument("no such pool")).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert_eq!(cluster.reports(), 2);
}

#[tokio::test]
async fn without_a_record_nothing_is_acknowledged() {
    let mut cluster = cluster(3, "replica:3", "off").await;
    let objects = chunks(3);
    cluster.nodes[1].server.kill();
    let away = CatalogError::Unavailable("no metadata server".into());
    cluster.catalog.faults().fail_next("report_debt", 2, away);
    let error = cluster.pool.put(1, objects.clone()).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("is owed"), "{error}");
    assert!(cluster.present(&objects).await.unwrap_err().is_transient());
    cluster.pool.put(1, objects.clone()).await.unwrap();
    assert_eq!(cluster.debt().await, by_partition(&objects));
}

#[tokio::test]
async fn a_slow_holder_is_waited_for_and_one_that_is_away_is_not() {
    let deadline = Duration::from_secs(4);
    let options = ConnectOptions { write_deadline: deadline, ..impatient() };
    let cluster = cluster_with(3, "replica:3", "off", options).await;
    let held = cluster.nodes[0].state.faults.hold_next("put", 1);
    let release = async {
        held.arrived(1).await;
        held.release();
    };
    let objects = chunks(6);
    let (put, ()) = futures::join!(cluster.pool.put(1, objects[..2].to_vec()), release);
    put.unwrap();
    assert_eq!(cluster.reports(), 0, "slow is not away");
    let _held = cluster.nodes[0].state.faults.hold_next("put", 100);
    let begun = Instant::now();
    cluster.pool.put(1, objects[2..4].to_vec()).await.unwrap();
    assert!(begun.elapsed() >= deadline, "it had all its time: {:?}", begun.elapsed());
    let begun = Instant::now();
    cluster.pool.put(1, objects[4..].to_vec()).await.unwrap();
    assert!(begun.elapsed() < deadline / 2, "it is known to be away: {:?}", begun.elapsed());
    assert_eq!(cluster.reports(), 2);
}
