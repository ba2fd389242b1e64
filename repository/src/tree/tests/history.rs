//! Nothing costs more because a disk has many snapshots.

use blobcr_proto::ChunkSize;

use super::{Change, Cost, FanOut, Geometry, Nodes, Root, content};

const CHUNKS: u64 = 16_384;
const SNAPSHOTS: u64 = 10_000;

/// Four chunks, spread over the disk.
fn changes(snapshot: u64) -> Vec<Change> {
    let mut at: Vec<u64> = (0..4).map(|i| content(snapshot * 4 + i).prefix() % CHUNKS).collect();
    at.sort_unstable();
    at.dedup();
    at.into_iter().map(|index| (index, Some(content(snapshot << 32 | index)))).collect()
}

/// What it costs to find single chunks, a run of chunks, and what the last snapshot changed, and
/// to make the next one.
fn costs(nodes: &Nodes, before: &Root, root: &Root) -> Vec<Cost> {
    let mut costs = Vec::new();
    for index in (0..CHUNKS).step_by(501) {
        costs.push(nodes.cost_of(|| nodes.lookup(root, index, 1)).1);
    }
    costs.push(nodes.cost_of(|| nodes.lookup(root, 1000, 2000)).1);
    let far_apart: Vec<Change> = [1, 6000, 12_000].map(|i| (i, Some(content(!i)))).into();
    let (updated, cost) = nodes.cost_of(|| nodes.update(root, root.geometry, &far_apart));
    costs.push(cost);
    costs.push(nodes.cost_of(|| nodes.diff(root, &updated.root).unwrap()).1);
    let (found, cost) = nodes.cost_of(|| nodes.diff(before, root).unwrap());
    assert!(cost.nodes <= super::diff_nodes_max(before, root, found.len()));
    costs
}

#[test]
fn ten_thousand_snapshots_cost_what_ten_cost() {
    for fan_out in [2, 16, 64, FanOut::DEFAULT.get()] {
        let nodes = Nodes::default();
        let fan_out = FanOut::new(fan_out).unwrap();
        let geometry = Geometry::new(CHUNKS << 18, ChunkSize::DEFAULT, fan_out).unwrap();
        let full: Vec<Change> = (0..CHUNKS).map(|i| (i, Some(content(i)))).collect();
        let mut root = nodes.update(&Root::empty(geometry), geometry, &full).root;
        let nodes_of_one = nodes.len() as u64;
        let mut after_ten = Vec::new();
        for snapshot in 1..=SNAPSHOTS {
            let before = root;
            root = nodes.update(&root, geometry, &changes(snapshot)).root;
            if snapshot == 10 {
                after_ten = costs(&nodes, &before, &root);
            }
            if snapshot == SNAPSHOTS {
                let now = costs(&nodes, &before, &root);
                assert_eq!(now, after_ten);
                let depth = u64::from(geometry.depth());
                assert_eq!(now[0], Cost { requests: depth, nodes: depth });
            }
        }
        assert_eq!(nodes.walk(&root).len() as u64, nodes_of_one + CHUNKS, "nothing piles up");
    }
}
