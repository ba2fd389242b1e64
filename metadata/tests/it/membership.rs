//! Nodes that come, fall silent, are drained and removed, and the tables that follow them.

use std::sync::Arc;

use blobcr_metadata::Error;
use blobcr_metadata::records::{KeyKind, NodeRecord, PlacementPartRecord};
use blobcr_metadata::version_manager::nodes::{DOWN_AFTER_DEFAULT, SUSPECT_AFTER};
use blobcr_proto::v1;
use blobcr_proto::v1::NodeState;

use crate::fixture::{Fixture, Kind, manager, refused};
use crate::flaky::flaky;

fn ms(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap()
}

fn id(n: usize) -> String {
    format!("{n:032x}")
}

fn registration(n: usize) -> v1::RegisterNodeRequest {
    let (id, address) = (id(n), format!("h{n}:1"));
    v1::RegisterNodeRequest { id, address, domain: format!("d{n}"), cluster: String::new() }
}

async fn say_hello(f: &Fixture, nodes: impl IntoIterator<Item = usize>) {
    for n in nodes {
        f.manager.register_node(registration(n)).await.unwrap();
    }
}

async fn states(f: &Fixture) -> Vec<NodeState> {
    let nodes = f.manager.list_nodes(v1::ListNodesRequest {}).await.unwrap().nodes;
    nodes.iter().map(v1::Node::state).collect()
}

async fn drain(f: &Fixture, n: usize, cancel: bool) -> v1::Node {
    f.manager.drain_node(v1::DrainNodeRequest { id: id(n), cancel }).await.unwrap()
}

async fn remove(f: &Fixture, n: usize) -> Result<v1::Node, Error> {
    f.manager.remove_node(v1::RemoveNodeRequest { id: id(n) }).await
}

async fn table(f: &Fixture) -> v1::PlacementTable {
    let pool = v1::GetPlacementRequest { name: "p".to_owned(), ..Default::default() };
    f.manager.get_placement(pool).await.unwrap()
}

/// Nodes 0 to `nodes` - 1, and the pool "p" of `replica:2` with its first table.
async fn with_table(nodes: usize) -> Fixture {
    let f = Fixture::new().await;
    f.manager.ensure_pool("p", "replica:2").await.unwrap();
    say_hello(&f, 0..nodes).await;
    table(&f).await;
    f
}

/// Which partitions name a node in their row, and which of them move from it.
fn uses(table: &v1::PlacementTable, n: usize) -> (Vec<u32>, Vec<u32>) {
    let at = table.nodes.iter().position(|node| node.id == id(n)).map(|at| at as u32);
    let where_in = |of: fn(&v1::PartitionNodes) -> &Vec<u32>| {
        let named = |row: &v1::PartitionNodes| at.is_some_and(|at| of(row).contains(&at));
        (0..).zip(&table.partitions).filter(|(_, row)| named(row)).map(|(p, _)| p).collect()
    };
    (where_in(|row| &row.node), where_in(|row| &row.moving_from))
}

async fn settle(f: &Fixture, table: &v1::PlacementTable, partitions: &[u32]) {
    for &partition in partitions {
        let (pool, version) = (table.pool, table.version);
        let r = v1::SettlePartitionsRequest { pool, partitions: vec![partition], version };
        assert!(f.manager.settle_partitions(r).await.unwrap().settled);
    }
}

#[tokio::test]
async fn a_silent_node_is_suspected_then_down_and_comes_back() {
    use NodeState::{Down, Suspected, Up};
    let f = Fixture::new().await;
    say_hello(&f, 0..2).await;
    assert_eq!(states(&f).await, [Up, Up]);
    f.clock.advance_ms(ms(SUSPECT_AFTER) - 1);
    say_hello(&f, [1]).await;
    assert_eq!(states(&f).await, [Up, Up]);
    f.clock.advance_ms(1);
    assert_eq!(states(&f).await, [Suspected, Up]);
    f.clock.advance_ms(ms(DOWN_AFTER_DEFAULT - SUSPECT_AFTER) - 1);
    say_hello(&f, [1]).await;
    assert_eq!(states(&f).await, [Suspected, Up]);
    f.clock.advance_ms(1);
    assert_eq!(states(&f).await, [Down, Up]);
    // After a restart they have their full time again: nobody could hear them meanwhile.
    let again = f.restarted();
    assert_eq!(states(&again).await, [Up, Up]);
    f.clock.advance_ms(ms(DOWN_AFTER_DEFAULT));
    assert_eq!(states(&again).await, [Down, Down]);
    say_hello(&again, [0]).await;
    assert_eq!(states(&again).await, [Up, Down]);
}

#[tokio::test]
async fn a_node_that_is_there_is_rarely_written() {
    let f = Fixture::new().await;
    let first = f.manager.register_node(registration(0)).await.unwrap();
    assert_eq!(first.cluster, f.manager.cluster_id().await.unwrap());
    let mut written = std::collections::BTreeSet::new();
    for _ in 0..60 {
        f.clock.advance_ms(1000);
        say_hello(&f, [0]).await;
        let records: Vec<NodeRecord> = f.records(KeyKind::Node).await;
        written.insert(records[0].last_seen_unix_ms);
        assert_eq!(records[0].registered_unix_ms, first.registered_unix_ms);
    }
    assert_eq!(written.len(), 13);
}

#[tokio::test]
async fn foreign_and_doubled_identities_are_refused() {
    let f = Fixture::new().await;
    say_hello(&f, 0..2).await;
    let cluster = f.manager.cluster_id().await.unwrap();
    assert_eq!(f.restarted().manager.cluster_id().await.unwrap(), cluster, "kept");
    let own = v1::RegisterNodeRequest { cluster: cluster.clone(), ..registration(0) };
    f.manager.register_node(own.clone()).await.unwrap();
    let foreign = v1::RegisterNodeRequest { cluster: "f".repeat(32), ..registration(7) };
    let parts = [&id(7), "another repository", &cluster, "empty directory"];
    refused(f.manager.register_node(foreign).await, Kind::Precondition, &parts);
    // Where another node was heard of lately, nobody else is.
    let doubled = v1::RegisterNodeRequest { address: "h0:1".to_owned(), ..registration(8) };
    let parts = [&id(8), "h0:1", &id(0)];
    refused(f.manager.register_node(doubled.clone()).await, Kind::Precondition, &parts);
    let moved = v1::RegisterNodeRequest { address: "h0:1".to_owned(), ..registration(1) };
    refused(f.manager.register_node(moved).await, Kind::Precondition, &[&id(0)]);
    f.clock.advance_ms(ms(SUSPECT_AFTER));
    f.manager.register_node(doubled).await.unwrap();
    // Who was removed stays so.
    remove(&f, 1).await.unwrap();
    let parts = [&id(1), "was removed", "empty directory"];
    refused(f.manager.register_node(registration(1)).await, Kind::Precondition, &parts);
    assert_eq!(states(&f).await.len(), 2);
    refused(remove(&f, 1).await, Kind::NotFound, &[&id(1)]);
}

#[tokio::test]
async fn a_drained_node_leaves_the_tables_and_can_be_removed() {
    let f = with_table(4).await;
    assert_eq!(f.manager.place().await.unwrap(), 0, "nothing has changed");
    refused(remove(&f, 2).await, Kind::Precondition, &[&id(2), "blobcr node drain"]);
    let first = table(&f).await;
    let (held, _) = uses(&first, 2);
    assert_eq!(drain(&f, 2, false).await.state(), NodeState::Draining);
    say_hello(&f, [2]).await;
    assert_eq!(states(&f).await[2], NodeState::Draining, "also when it says hello");
    assert_eq!(f.manager.place().await.unwrap(), 1);
    assert_eq!(f.manager.place().await.unwrap(), 0);
    let next = table(&f).await;
    assert_eq!((next.version, uses(&next, 2)), (2, (vec![], held.clone())));
    // No part of the first table is left behind.
    let parts: Vec<PlacementPartRecord> = f.records(KeyKind::PlacementPart).await;
    assert_eq!(parts.len(), 4);
    refused(remove(&f, 2).await, Kind::Precondition, &[&id(2)]);

    let stale = v1::SettlePartitionsRequest { pool: 2, partitions: vec![held[0]], version: 1 };
    assert!(!f.manager.settle_partitions(stale).await.unwrap().settled);
    let none = v1::SettlePartitionsRequest { pool: 2, partitions: vec![1024], version: 2 };
    refused(f.manager.settle_partitions(none).await, Kind::NotFound, &["1024"]);
    settle(&f, &next, &held).await;
    settle(&f, &next, &held[..1]).await;
    assert_eq!(uses(&table(&f).await, 2), (vec![], vec![]));
    assert_eq!(remove(&f, 2).await.unwrap().state(), NodeState::Removed);
    // The table can still be read, although it lists the node.
    assert_eq!(table(&f).await.version, 2);
    f.manager.place().await.unwrap();
}

#[tokio::test]
async fn a_node_that_went_down_is_replaced_and_one_that_came_gets_its_share() {
    let f = with_table(3).await;
    let first = table(&f).await;
    let (held, _) = uses(&first, 0);
    f.clock.advance_ms(ms(DOWN_AFTER_DEFAULT));
    say_hello(&f, [1]).await;
    // Two nodes are down: too few are left for the policy, so nothing moves.
    assert_eq!(f.manager.place().await.unwrap(), 0);
    say_hello(&f, [2]).await;
    assert_eq!(f.manager.place().await.unwrap(), 1);
    let next = table(&f).await;
    assert_eq!(uses(&next, 0), (vec![], held.clone()));

    // What moves stays until it is settled, whoever comes, also who was away.
    say_hello(&f, [0, 3]).await;
    f.manager.place().await.unwrap();
    let third = table(&f).await;
    let (of_newcomer, _) = uses(&third, 3);
    assert!(of_newcomer.iter().all(|p| !held.contains(p)), "only what does not move yet");
    let moving: Vec<u32> =
        (0..1024).filter(|p| !third.partitions[*p as usize].moving_from.is_empty()).collect();
    settle(&f, &third, &moving).await;
    assert_eq!(f.manager.place().await.unwrap(), 1);
    let even = table(&f).await;
    for n in 0..4 {
        assert_eq!(uses(&even, n).0.len(), 512, "node {n}");
    }
}

#[tokio::test]
async fn a_new_holder_that_dies_is_replaced_before_it_has_settled() {
    let f = with_table(4).await;
    let (held, _) = uses(&table(&f).await, 0);
    drain(&f, 0, false).await;
    f.manager.place().await.unwrap();
    let second = table(&f).await;
    let (of_1, _) = uses(&second, 1);
    let twice: Vec<u32> = of_1.iter().copied().filter(|p| held.contains(p)).collect();
    assert!(!twice.is_empty());
    f.clock.advance_ms(ms(DOWN_AFTER_DEFAULT));
    say_hello(&f, [0, 2, 3]).await;
    assert_eq!(f.manager.place().await.unwrap(), 1);
    let third = table(&f).await;
    let (now, from) = uses(&third, 1);
    assert_eq!(now, Vec::<u32>::new());
    assert_eq!(from, of_1, "it may come back with what was written to it");
    assert_eq!(uses(&third, 0).1, held, "the first holder is not forgotten");
}

#[tokio::test]
async fn a_node_is_not_removed_while_a_table_takes_it_in() {
    let f = with_table(3).await;
    say_hello(&f, [3]).await;
    let store = flaky(&f.store);
    let slow = manager(&store.as_store(), &f.clock, 7);
    let other = Arc::clone(&f.manager);
    store.before_next_swap(async move {
        assert_eq!(other.place().await.unwrap(), 1);
    });
    let removed = slow.remove_node(v1::RemoveNodeRequest { id: id(3) }).await;
    refused(removed, Kind::Precondition, &[&id(3)]);
    // The other way round: the table is made without it.
    let f = with_table(3).await;
    say_hello(&f, [3]).await;
    let store = flaky(&f.store);
    let slow = manager(&store.as_store(), &f.clock, 7);
    let other = Arc::clone(&f.manager);
    store.before_next_swap(async move {
        other.remove_node(v1::RemoveNodeRequest { id: id(3) }).await.unwrap();
    });
    assert_eq!(slow.place().await.unwrap(), 0);
    assert_eq!(uses(&table(&f).await, 3), (vec![], vec![]));
}

/// A node comes back without its disk: another one at the address of the old, which is not down yet.
#[tokio::test]
async fn one_machine_is_never_two_nodes_of_a_row() {
    let f = with_table(3).await;
    f.clock.advance_ms(ms(SUSPECT_AFTER));
    say_hello(&f, 0..2).await;
    let again = v1::RegisterNodeRequest { address: "h2:1".to_owned(), ..registration(9) };
    f.manager.register_node(again).await.unwrap();
    assert!(states(&f).await.contains(&NodeState::Suspected), "the old one is not down");
    assert_eq!(f.manager.place().await.unwrap(), 1);
    let table = table(&f).await;
    let (old, new) = (uses(&table, 2), uses(&table, 9));
    assert_eq!(old.0, [0; 0], "its place is the new one's");
    assert!(!old.1.is_empty() && !new.0.is_empty());
}
