//! Tests of whole trees, over nodes in memory that count what is read.

mod history;
mod hostile;
mod model;
mod shadowing;
mod sparse;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::sync::Mutex;

use async_trait::async_trait;
use blobcr_proto::v1::RecordKind;
use blobcr_proto::{ChunkSize, Hash};
use bytes::Bytes;
use futures::FutureExt;

use super::{
    Change, FanOut, Geometry, NewNode, NodeSource, Reached, Root, TreeError, Updated, diff,
    for_each_node, for_each_present, lookup, update,
};
use crate::store::StoreError;

/// What was asked of the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    requests: u64,
    nodes: u64,
}

#[derive(Default)]
struct Nodes {
    stored: Mutex<HashMap<Hash, Bytes>>,
    cost: Mutex<Cost>,
}

#[async_trait]
impl NodeSource for Nodes {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let mut cost = self.cost.lock().unwrap();
        cost.requests += 1;
        cost.nodes += ids.len() as u64;
        let stored = self.stored.lock().unwrap();
        ids.iter()
            .map(|id| {
                let missing = StoreError::Missing { kind: RecordKind::TreeNode, id: *id };
                stored.get(id).cloned().ok_or(missing)
            })
            .collect()
    }
}

/// These trees never wait for anything.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("nodes in memory are there at once")
}

impl Nodes {
    /// Checks the promises on new nodes, and stores them.
    fn store(&self, new_nodes: &[NewNode]) {
        let mut stored = self.stored.lock().unwrap();
        let ids: HashSet<Hash> = new_nodes.iter().map(|node| node.id).collect();
        assert_eq!(ids.len(), new_nodes.len(), "each once");
        let mut later: HashSet<Hash> =
            ids.into_iter().filter(|id| !stored.contains_key(id)).collect();
        for node in new_nodes {
            assert_eq!(node.id, Hash::of(&node.encoding));
            later.remove(&node.id);
            let mut children = node.encoding.rchunks_exact(Hash::LEN).filter_map(Hash::from_slice);
            assert!(children.all(|id| !later.contains(&id)), "children before parents");
            stored.insert(node.id, node.encoding.clone());
        }
    }

    fn put(&self, encoding: Bytes) -> Hash {
        let id = Hash::of(&encoding);
        self.stored.lock().unwrap().insert(id, encoding);
        id
    }

    fn len(&self) -> usize {
        self.stored.lock().unwrap().len()
    }

    /// What `read` costs.
    fn cost_of<T>(&self, read: impl FnOnce() -> T) -> (T, Cost) {
        *self.cost.lock().unwrap() = Cost::default();
        let result = read();
        (result, *self.cost.lock().unwrap())
    }

    fn update(&self, root: &Root, geometry: Geometry, changes: &[Change]) -> Updated {
        let updated = now(update(self, root, geometry, changes)).unwrap();
        self.store(&updated.new_nodes);
        updated
    }

    fn build(&self, geometry: Geometry, chunks: &BTreeMap<u64, Hash>) -> Root {
        let changes: Vec<Change> = chunks.iter().map(|(index, id)| (*index, Some(*id))).collect();
        let (updated, cost) =
            self.cost_of(|| self.update(&Root::empty(geometry), geometry, &changes));
        assert_eq!(cost, Cost::default(), "a new tree reads nothing");
        updated.root
    }

    fn present(&self, root: &Root) -> BTreeMap<u64, Hash> {
        let mut found = BTreeMap::new();
        now(for_each_present(self, root, 0..u64::MAX, &mut |index, id| {
            assert!(found.last_key_value().is_none_or(|(last, _)| *last < index), "ascending");
            found.insert(index, id);
        }))
        .unwrap();
        found
    }

    fn lookup(&self, root: &Root, first: u64, count: usize) -> Vec<Option<Hash>> {
        now(lookup(self, root, first, count)).unwrap()
    }

    fn diff(&self, a: &Root, b: &Root) -> Result<Vec<Difference>, TreeError> {
        let mut found: Vec<Difference> = Vec::new();
        now(diff(self, a, b, &mut |index, a, b| {
            assert!(found.last().is_none_or(|(last, _, _)| *last < index), "ascending");
            found.push((index, a, b));
        }))?;
        Ok(found)
    }

    fn walk(&self, root: &Root) -> Vec<Reached> {
        let mut found = Vec::new();
        now(for_each_node(self, root, &mut |reached| {
            found.push(reached);
            true
        }))
        .unwrap();
        found
    }
}

type Difference = (u64, Option<Hash>, Option<Hash>);

/// A chunk's identity, made up.
fn content(of: u64) -> Hash {
    Hash::of(&of.to_le_bytes())
}

fn fan_outs() -> impl Iterator<Item = FanOut> {
    (1..=10).map(|bits| FanOut::new(1 << bits).unwrap())
}

fn chunk_sizes() -> impl Iterator<Item = ChunkSize> {
    (16..=22).map(|bits| ChunkSize::new(1 << bits).unwrap())
}

/// Where two models differ.
fn model_diff(a: &BTreeMap<u64, Hash>, b: &BTreeMap<u64, Hash>) -> Vec<Difference> {
    let mut indices: Vec<u64> = a.keys().chain(b.keys()).copied().collect();
    indices.sort_unstable();
    indices.dedup();
    indices
        .into_iter()
        .map(|index| (index, a.get(&index).copied(), b.get(&index).copied()))
        .filter(|(_, a, b)| a != b)
        .collect()
}

/// The most nodes that a diff may read: on each side the way to each chunk that differs, and the
/// nodes by which one tree is deeper.
fn diff_nodes_max(a: &Root, b: &Root, differing: usize) -> u64 {
    let (a, b) = (a.geometry.depth(), b.geometry.depth());
    u64::from(a + b) * differing as u64 + u64::from(a.abs_diff(b))
}
