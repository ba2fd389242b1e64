//! Pools, nodes, and which nodes hold what.

use std::collections::{BTreeMap, BTreeSet};

use blobcr_metadata::version_manager::placement::{Candidate, build};
use blobcr_proto::v1;
use proptest::prelude::*;

use crate::fixture::{Fixture, Kind, refused};

fn pool(name: &str, policy: &str) -> v1::CreatePoolRequest {
    let (name, policy) = (name.to_owned(), policy.to_owned());
    v1::CreatePoolRequest { name, policy, compression: String::new() }
}

fn table_of(name: &str) -> v1::GetPlacementRequest {
    v1::GetPlacementRequest { name: name.to_owned(), ..Default::default() }
}

fn pool_ref(name: &str) -> v1::PoolRef {
    v1::PoolRef { name: name.to_owned(), id: 0 }
}

fn node(n: usize, address: &str, domain: &str) -> v1::RegisterNodeRequest {
    let (address, domain) = (address.to_owned(), domain.to_owned());
    v1::RegisterNodeRequest { id: format!("{n:032x}"), address, domain, cluster: String::new() }
}

#[tokio::test]
async fn pools_are_found_by_name_and_id_and_listed() {
    let f = Fixture::new().await;
    let made = f.manager.create_pool(pool("wide", "ec:4+2")).await.unwrap();
    assert_eq!((made.id, made.policy.as_str(), made.partitions), (2, "ec:4+2", 1024));
    let zstd = v1::CreatePoolRequest { compression: "zstd".to_owned(), ..pool("z", "replica:3") };
    assert_eq!(f.manager.create_pool(zstd).await.unwrap().compression, "zstd");
    assert_eq!(f.manager.get_pool(pool_ref("wide")).await.unwrap(), made);
    let by_id = v1::PoolRef { name: String::new(), id: 2 };
    assert_eq!(f.manager.get_pool(by_id).await.unwrap(), made);
    let all = f.manager.list_pools(v1::ListPoolsRequest {}).await.unwrap().pools;
    let names: Vec<&str> = all.iter().map(|pool| pool.name.as_str()).collect();
    assert_eq!(names, ["default", "wide", "z"]);

    refused(f.manager.create_pool(pool("wide", "replica:1")).await, Kind::Exists, &["\"wide\""]);
    refused(f.manager.create_pool(pool("a/b", "replica:1")).await, Kind::Invalid, &["a/b"]);
    refused(
        f.manager.create_pool(pool("x", "raid:5")).await,
        Kind::Invalid,
        &["raid:5", "replica:N"],
    );
    let gzip = v1::CreatePoolRequest { compression: "gzip".to_owned(), ..pool("x", "replica:3") };
    refused(f.manager.create_pool(gzip).await, Kind::Invalid, &["gzip", "lz4"]);
    refused(f.manager.get_pool(pool_ref("none")).await, Kind::NotFound, &["\"none\""]);
    refused(f.manager.get_pool(v1::PoolRef::default()).await, Kind::NotFound, &[]);
}

#[tokio::test]
async fn a_pool_is_ensured_once_and_with_one_policy() {
    let f = Fixture::new().await;
    let made = f.manager.ensure_pool("p", "replica:2").await.unwrap();
    assert_eq!(f.manager.ensure_pool("p", "replica:2").await.unwrap(), made);
    let other = f.manager.ensure_pool("p", "replica:3").await;
    refused(other, Kind::Precondition, &["\"p\"", "replica:2", "replica:3"]);
}

#[tokio::test]
async fn a_node_registers_once_and_may_move() {
    let f = Fixture::new().await;
    let first = f.manager.register_node(node(1, "10.0.0.1:7000", "rack-1")).await.unwrap();
    f.clock.advance_ms(5);
    let again = f.manager.register_node(node(1, "10.0.0.1:7000", "rack-1")).await.unwrap();
    assert_eq!(again, first);
    let moved = f.manager.register_node(node(1, "10.0.0.2:7000", "rack-1")).await.unwrap();
    assert_eq!(moved.registered_unix_ms, first.registered_unix_ms + 5);
    f.manager.register_node(node(0, "[::1]:7000", "")).await.unwrap();
    let nodes = f.manager.list_nodes(v1::ListNodesRequest {}).await.unwrap().nodes;
    let addresses: Vec<&str> = nodes.iter().map(|node| node.address.as_str()).collect();
    assert_eq!(addresses, ["[::1]:7000", "10.0.0.2:7000"]);

    let bad = |id: &str, address: &str, domain: &str| {
        let (id, address, domain) = (id.to_owned(), address.to_owned(), domain.to_owned());
        f.manager.register_node(v1::RegisterNodeRequest {
            id,
            address,
            domain,
            cluster: String::new(),
        })
    };
    refused(bad("", "a:1", "").await, Kind::Invalid, &["id"]);
    refused(bad("a/b", "a:1", "").await, Kind::Invalid, &["id"]);
    refused(bad("a", "", "").await, Kind::Invalid, &["address"]);
    refused(bad("a", "a :1", "").await, Kind::Invalid, &["address"]);
    refused(bad("a", "a:1", &"d".repeat(400)).await, Kind::Invalid, &["domain"]);
}

#[tokio::test]
async fn a_table_is_made_of_enough_nodes_and_names_them_by_id() {
    let f = Fixture::new().await;
    f.manager.create_pool(pool("p", "replica:3")).await.unwrap();
    for n in 0..2 {
        f.manager.register_node(node(n, &format!("h{n}:1"), &format!("d{n}"))).await.unwrap();
        let early = f.manager.get_placement(table_of("p")).await;
        refused(early, Kind::Precondition, &["\"p\"", "3 nodes", &format!("{} have", n + 1)]);
    }
    f.manager.register_node(node(2, "h2:1", "d2")).await.unwrap();
    let table = f.manager.get_placement(table_of("p")).await.unwrap();
    assert_eq!((table.version, table.partitions.len(), table.nodes.len()), (1, 1024, 3));
    for row in &table.partitions {
        assert_eq!(row.node.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([0, 1, 2]));
    }
    // Until the next round a newcomer changes nothing; a move only the address, a restart nothing.
    f.manager.register_node(node(3, "h3:1", "d3")).await.unwrap();
    f.manager.register_node(node(1, "elsewhere:1", "d1")).await.unwrap();
    let mut expected = table;
    let moved = expected.nodes.iter_mut().find(|node| node.address == "h1:1").unwrap();
    moved.address = "elsewhere:1".to_owned();
    assert_eq!(f.manager.get_placement(table_of("p")).await.unwrap(), expected);
    assert_eq!(f.restarted().manager.get_placement(table_of("p")).await.unwrap(), expected);
    // Another pool has a table of its own.
    let other = f.manager.get_placement(table_of("default")).await.unwrap();
    assert_eq!((other.pool, other.nodes.len()), (1, 4));
    refused(f.manager.get_placement(table_of("none")).await, Kind::NotFound, &[]);
    // Who has the newest is told so, and nothing more.
    let known = |known_version| v1::GetPlacementRequest { known_version, ..table_of("p") };
    let same = f.manager.get_placement(known(1)).await.unwrap();
    let nothing = v1::PlacementTable { pool: expected.pool, version: 1, ..Default::default() };
    assert_eq!(same, nothing);
    f.manager.place().await.unwrap();
    let newer = f.manager.get_placement(known(1)).await.unwrap();
    assert_eq!((newer.version, newer.partitions.len()), (2, 1024));
}

#[tokio::test]
async fn the_widest_table_fits() {
    let f = Fixture::new().await;
    f.manager.create_pool(pool("wide", "ec:16+8")).await.unwrap();
    for n in 0..600 {
        f.manager
            .register_node(node(n, &format!("h{n}:1"), &format!("d{}", n % 40)))
            .await
            .unwrap();
    }
    let table = f.manager.get_placement(table_of("wide")).await.unwrap();
    assert_eq!((table.nodes.len(), table.partitions.len()), (512, 1024));
    for row in &table.partitions {
        let domains: BTreeSet<&str> =
            row.node.iter().map(|n| table.nodes[*n as usize].domain.as_str()).collect();
        assert_eq!((row.node.len(), domains.len()), (24, 24));
    }
}

fn candidates(domains: &[usize]) -> Vec<Candidate> {
    let node = |(n, domain): (usize, &usize)| Candidate {
        id: format!("{:032x}", n * 0x1234_5678_9abc),
        domain: format!("d{domain}"),
    };
    domains.iter().enumerate().map(node).collect()
}

fn spread(counts: &BTreeMap<u32, u32>, nodes: usize) -> u32 {
    let count = |n: usize| counts.get(&(n as u32)).copied().unwrap_or(0);
    let (min, max) = (0..nodes).map(count).fold((u32::MAX, 0), |(a, b), c| (a.min(c), b.max(c)));
    max - min
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn rows_are_of_different_nodes_and_domains(
        domains in prop::collection::vec(0..8usize, 1..20), width in 1..8usize,
    ) {
        let width = width.min(domains.len());
        let nodes = candidates(&domains);
        let rows = build(&nodes, 256, width);
        prop_assert_eq!(&rows, &build(&nodes, 256, width), "deterministic");
        prop_assert_eq!(rows.len(), 256);
        let possible = domains.iter().collect::<BTreeSet<_>>().len().min(width);
        for row in &rows {
            let unique: BTreeSet<u32> = row.iter().copied().collect();
            prop_assert_eq!(unique.len(), width);
            let used: BTreeSet<&str> =
                row.iter().map(|n| nodes[*n as usize].domain.as_str()).collect();
            prop_assert_eq!(used.len(), possible);
        }
    }

    #[test]
    fn nodes_of_their_own_domains_are_balanced(nodes in 1..40usize, width in 1..8usize) {
        let width = width.min(nodes);
        let rows = build(&candidates(&(0..nodes).collect::<Vec<_>>()), 1024, width);
        let mut held: BTreeMap<u32, u32> = BTreeMap::new();
        let mut first: BTreeMap<u32, u32> = BTreeMap::new();
        for row in &rows {
            row.iter().for_each(|node| *held.entry(*node).or_default() += 1);
            *first.entry(row[0]).or_default() += 1;
        }
        prop_assert!(spread(&held, nodes) <= 1, "{:?}", held);
        prop_assert!(spread(&first, nodes) <= 2 + 1024 / nodes as u32 / 8, "{:?}", first);
    }
}
