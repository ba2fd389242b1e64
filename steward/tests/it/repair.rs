//! Repair and rebalance over real nodes.

use std::collections::BTreeSet;

use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_repository::Object;
use blobcr_steward::{RepairOptions, Repaired, Repairer};

use crate::fixture::{Fixture, POOL, disk};

fn repairer(fixture: &Fixture) -> Repairer {
    Repairer::new(fixture.repository(), RepairOptions::default())
}

/// Rounds until there is nothing left, or nothing more can be done.
async fn repair(fixture: &Fixture) -> Repaired {
    let mut repairer = repairer(fixture);
    let mut last = Repaired::default();
    for _ in 0..5 {
        last = repairer.round().await.unwrap();
        if last.partitions == 0 {
            break;
        }
    }
    last
}

async fn table(fixture: &Fixture) -> v1::PlacementTable {
    let request = v1::GetPlacementRequest { id: POOL, ..Default::default() };
    fixture.service.manager().get_placement(request).await.unwrap()
}

async fn debt(fixture: &Fixture) -> u64 {
    let all = v1::ListDebtRequest { pool: POOL, after: None, limit: 0 };
    let page = fixture.service.manager().list_debt(all).await.unwrap();
    page.debts.iter().map(|debt| debt.objects).sum()
}

async fn moving(fixture: &Fixture) -> usize {
    let table = table(fixture).await;
    table.partitions.iter().filter(|row| !row.moving_from.is_empty()).count()
}

/// What the rows of the table name for each node, of what is anywhere.
async fn expected(fixture: &Fixture, policy: &str) -> Vec<BTreeSet<Hash>> {
    let table = table(fixture).await;
    let policy: blobcr_proto::policy::Policy = policy.parse().unwrap();
    let mut sets = vec![BTreeSet::new(); fixture.stores.len()];
    for (kind, id) in fixture.records() {
        let row = &table.partitions[(id.prefix() >> 54) as usize].node;
        for at in &row[..policy.of(kind).nodes()] {
            let node = &table.nodes[*at as usize].id;
            let at = fixture.stores.iter().position(|store| store.node_id() == *node).unwrap();
            sets[at].insert(id);
        }
    }
    sets
}

fn chunk(letter: u8) -> Object {
    let plain = disk(&[letter]);
    Object { kind: RecordKind::Chunk, id: Hash::of(&plain), plain: plain.into() }
}

#[tokio::test]
async fn what_was_written_without_a_node_comes_to_it_and_the_debt_is_paid() {
    for (nodes, policy) in [(3, "replica:3"), (6, "ec:4+2")] {
        let mut fixture = Fixture::new(nodes, policy).await;
        fixture.import("before", &disk(b"abcdefgh")).await;
        fixture.stop_node(0);
        fixture.import("during", &disk(b"ABCDEFGHIJ")).await;
        assert!(debt(&fixture).await > 0, "{policy}");
        let waits = repair(&fixture).await;
        assert_eq!(waits.waits_for, BTreeSet::from([format!("node {}", fixture.id(0))]));
        assert!(debt(&fixture).await > 0, "{policy}: the node is still away");
        fixture.start_node(0).await;
        assert_eq!(repair(&fixture).await, Repaired::default(), "{policy}");
        assert_eq!(debt(&fixture).await, 0, "{policy}");
        assert_eq!(fixture.held(), expected(&fixture, policy).await, "{policy}");
        // Every tolerated loss is tolerated again.
        for lost in 1..nodes {
            fixture.stop_node(lost);
            assert!(fixture.read("during", 1).await == disk(b"ABCDEFGHIJ"), "{policy} {lost}");
            fixture.start_node(lost).await;
        }
    }
}

#[tokio::test]
async fn a_node_that_is_drained_gives_everything_away_and_can_be_removed() {
    for (nodes, policy) in [(3, "replica:2"), (7, "ec:4+2")] {
        let fixture = Fixture::new(nodes, policy).await;
        fixture.import("image", &disk(b"abcdefghijklmnopqrstuvw")).await;
        let id = fixture.id(1);
        let manager = fixture.service.manager();
        manager.drain_node(v1::DrainNodeRequest { id: id.clone(), cancel: false }).await.unwrap();
        assert_eq!(fixture.place().await, 1);
        assert!(moving(&fixture).await > 0);
        let remove = v1::RemoveNodeRequest { id: id.clone() };
        manager.remove_node(remove.clone()).await.unwrap_err();
        assert_eq!(repair(&fixture).await, Repaired::default(), "{policy}");
        assert_eq!(moving(&fixture).await, 0);
        // What is left there is of no use, and goes.
        let collected = fixture.collect().await;
        let misplaced: u64 = collected.nodes.iter().map(|node| node.misplaced).sum();
        assert!(misplaced > 0 && misplaced == collected.records(), "{policy}");
        assert_eq!(fixture.held()[1], BTreeSet::new(), "{policy}");
        assert_eq!(fixture.held(), expected(&fixture, policy).await, "{policy}");
        manager.remove_node(remove).await.unwrap();
        assert!(fixture.read("image", 1).await == disk(b"abcdefghijklmnopqrstuvw"));
    }
}

#[tokio::test]
async fn what_a_lost_node_had_is_made_again_from_the_others() {
    for (nodes, policy) in [(4, "replica:3"), (7, "ec:4+2")] {
        let mut fixture = Fixture::new(nodes, policy).await;
        fixture.import("image", &disk(b"abcdefghijklmnopqrstuvw")).await;
        fixture.stop_node(2);
        // Written while it is away, before it is given up.
        fixture.import("later", &disk(b"ABCDEFGH")).await;
        assert!(debt(&fixture).await > 0);
        fixture.end_leases().await;
        assert_eq!(fixture.place().await, 1);
        assert_eq!(repair(&fixture).await, Repaired::default(), "{policy}");
        assert_eq!((moving(&fixture).await, debt(&fixture).await), (0, 0), "{policy}");
        let remove = v1::RemoveNodeRequest { id: fixture.id(2) };
        fixture.service.manager().remove_node(remove).await.unwrap();
        for lost in [0, 1, 3] {
            fixture.stop_node(lost);
            assert!(fixture.read("image", 1).await == disk(b"abcdefghijklmnopqrstuvw"));
            assert!(fixture.read("later", 1).await == disk(b"ABCDEFGH"));
            fixture.start_node(lost).await;
        }
    }
}

#[tokio::test]
async fn a_new_node_gets_its_share() {
    let mut fixture = Fixture::new(3, "replica:2").await;
    fixture.import("image", &disk(b"abcdefghijklmnopqrstuvwxyz")).await;
    let new = fixture.add_node().await;
    assert_eq!(fixture.place().await, 1);
    let reader = fixture.repository();
    let pool = reader.pool(POOL).await.unwrap();
    // Read while it moves: a client that has the table finds what has not come yet.
    let id = chunk(b'k').id;
    assert!(pool.get(RecordKind::Chunk, &id).await.is_ok());
    assert_eq!(repair(&fixture).await, Repaired::default());
    assert!(!fixture.held()[new].is_empty());
    fixture.collect().await;
    assert_eq!(fixture.held(), expected(&fixture, "replica:2").await);
    // And one whose table is of before the move.
    for letter in b'a'..=b'z' {
        assert!(pool.get(RecordKind::Chunk, &chunk(letter).id).await.is_ok(), "{letter}");
    }
}

/// A writer with an old table, whose lease is of before the new one.
#[tokio::test]
async fn a_partition_settles_only_when_nobody_writes_under_an_older_table() {
    let mut fixture = Fixture::new(2, "replica:1").await;
    let writer = fixture.repository();
    let pool = writer.pool(POOL).await.unwrap();
    let old = fixture.lease().await;
    pool.put(old.generation, vec![chunk(b'0')]).await.unwrap();
    let new = fixture.add_node().await;
    fixture.service.manager().place().await.unwrap();
    let moved = moving(&fixture).await;
    assert!(moved > 0);
    let mut repairer = repairer(&fixture);
    let round = repairer.round().await.unwrap();
    assert_eq!((round.settled, moving(&fixture).await), (0, moved));
    assert_eq!(round.waits_for, BTreeSet::from(["writers that began earlier".to_owned()]));
    // Under the old table still: some of it goes to nodes that do not hold its partition any more.
    let letters: Vec<u8> = (b'1'..=b'z').collect();
    for letter in &letters {
        pool.put(old.generation, vec![chunk(*letter)]).await.unwrap();
    }
    let newcomer = fixture.held()[new].len();
    fixture.release(old.id).await;
    // The next lease, and with it the new table.
    let lease = fixture.lease().await;
    for letter in b'A'..=b'Z' {
        let fresh = Object { id: Hash::of(&disk(&[letter, 0])), ..chunk(letter) };
        let fresh = Object { plain: disk(&[letter, 0]).into(), ..fresh };
        pool.put(lease.generation, vec![fresh]).await.unwrap();
    }
    assert!(fixture.held()[new].len() > newcomer, "a writer that began later knows the table");
    repairer.round().await.unwrap();
    assert_eq!(moving(&fixture).await, 0);
    let reader = fixture.repository();
    let pool = reader.pool(POOL).await.unwrap();
    for letter in letters {
        assert!(pool.get(RecordKind::Chunk, &chunk(letter).id).await.is_ok(), "{letter}");
    }
}

/// A node misses the touch of a chunk that it has; the collector takes its copy, as it may, because
/// the snapshot is not published. Once repaired, it does not any more.
#[tokio::test]
async fn a_repaired_copy_is_as_safe_from_the_collector_as_the_others() {
    let mut fixture = Fixture::new(3, "replica:3").await;
    fixture.import("goes", &disk(b"abcd")).await;
    fixture.remove_image("goes").await;
    fixture.stop_node(1);
    let lease = fixture.lease().await;
    let repository = fixture.repository();
    let pool = repository.pool(POOL).await.unwrap();
    let id = chunk(b'b').id;
    let held = pool.touch(lease.generation, RecordKind::Chunk, &[id]).await.unwrap();
    assert_eq!(held, [true]);
    fixture.start_node(1).await;
    assert_eq!(repair(&fixture).await, Repaired::default());
    assert_eq!(debt(&fixture).await, 0);
    fixture.collect().await;
    assert!(fixture.held().iter().all(|node| node.contains(&id)), "the lease lives");
}

#[tokio::test]
async fn what_is_on_a_node_that_is_away_alone_is_not_given_up() {
    let mut fixture = Fixture::new(3, "replica:2").await;
    let lease = fixture.lease().await;
    let repository = fixture.repository();
    let pool = repository.pool(POOL).await.unwrap();
    for letter in b'a'..=b'z' {
        pool.put(lease.generation, vec![chunk(letter)]).await.unwrap();
    }
    fixture.release(lease.id).await;
    let (a, b) = (1, 2);
    fixture.stop_node(a);
    fixture.stop_node(b);
    // Two new ones, so that the rows are whole.
    fixture.add_node().await;
    fixture.add_node().await;
    fixture.place().await;
    let round = repair(&fixture).await;
    assert!(round.partitions > 0, "partitions that only those two had stay open");
    assert!(round.waits_for.contains(&format!("node {}", fixture.id(a))));
    fixture.start_node(a).await;
    fixture.start_node(b).await;
    assert_eq!(repair(&fixture).await, Repaired::default());
    let reader = fixture.repository();
    let pool = reader.pool(POOL).await.unwrap();
    for letter in b'a'..=b'z' {
        assert!(pool.get(RecordKind::Chunk, &chunk(letter).id).await.is_ok(), "{letter}");
    }
}

/// A client learns of a new table from any node that another client has told of it.
#[tokio::test]
async fn a_client_with_an_old_table_is_told_so_by_the_nodes() {
    let mut fixture = Fixture::new(2, "replica:1").await;
    let (old, other) = (fixture.repository(), fixture.repository());
    let pool = old.pool(POOL).await.unwrap();
    let lease = fixture.lease().await;
    for letter in b'a'..=b'h' {
        pool.put(lease.generation, vec![chunk(letter)]).await.unwrap();
    }
    let new = fixture.add_node().await;
    fixture.service.manager().place().await.unwrap();
    // Its own lease is as old as the table that it has.
    for letter in b'A'..=b'Z' {
        pool.put(lease.generation, vec![chunk(letter)]).await.unwrap();
    }
    assert!(fixture.held()[new].is_empty(), "nobody has told it");
    let others = other.pool(POOL).await.unwrap();
    for letter in b'a'..=b'h' {
        others.get(RecordKind::Chunk, &chunk(letter).id).await.unwrap();
    }
    for letter in b'a'..=b'h' {
        pool.get(RecordKind::Chunk, &chunk(letter).id).await.unwrap();
    }
    for letter in 0x80..=0xFF {
        pool.put(lease.generation, vec![chunk(letter)]).await.unwrap();
    }
    assert!(!fixture.held()[new].is_empty(), "a node has");
}
