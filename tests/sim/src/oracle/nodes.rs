//! What nodes must not forget, and must not delete.

use std::collections::{BTreeMap, BTreeSet};

use blobcr_proto::policy::Policy;
use blobcr_proto::record::{RecordKey, open};
use blobcr_proto::v1::{self, RecordKind};
use blobcr_repo_node::{ChunkStore, Fetched, OpenError};

use super::{Key, NodeFacts, Object, Oracle, State};

/// A delete that a node has begun. Dropped before it is done, nobody knows what it took.
pub struct Deleting {
    oracle: Oracle,
    node: usize,
    number: u64,
    keys: BTreeSet<Key>,
}

impl Deleting {
    /// The node has acknowledged it.
    pub fn done(self) {
        let mut state = self.oracle.state();
        state.deleted += self.keys.len() as u64;
        if let Some(facts) = state.nodes.get_mut(&self.node) {
            facts.uncertain.retain(|key| !self.keys.contains(key));
        }
    }
}

impl Drop for Deleting {
    fn drop(&mut self) {
        if let Some(facts) = self.oracle.state().nodes.get_mut(&self.node) {
            facts.deletes.remove(&self.number);
        }
    }
}

fn key(pool: u32, wire: &v1::RecordRef) -> Option<Key> {
    Some((pool, RecordKey::try_from(wire).ok()?))
}

impl NodeFacts {
    fn hold(&mut self, key: Key, generation: u64) {
        let taken =
            |(keys, before): &(BTreeSet<Key>, u64)| *before > generation && keys.contains(&key);
        if self.deletes.values().any(taken) {
            self.uncertain.insert(key);
            return;
        }
        self.uncertain.remove(&key);
        let held = self.held.entry(key).or_default();
        *held = generation.max(*held);
    }
}

impl Oracle {
    /// A node was asked to put. Which bytes a tree node has is known from then on: a put whose answer
    /// is lost may have stored it all the same, and a touch that finds it there is as good.
    pub fn asked(&self, request: &v1::PutRequest) {
        let mut state = self.state();
        for record in &request.records {
            let kind = record.r#ref.as_ref().map(v1::RecordRef::kind);
            if kind == Some(RecordKind::TreeNode)
                && let Ok((key, plain)) = open(record)
            {
                state.tree_nodes.insert(key.id, plain);
            }
        }
    }

    /// A node has acknowledged a put.
    pub fn put(&self, node: usize, request: &v1::PutRequest) {
        let mut state = self.state();
        for record in &request.records {
            let Some(wire) = &record.r#ref else { continue };
            let Some(key) = key(request.pool, wire) else { continue };
            self.trace.about(
                &key.1.id,
                format_args!("node-{node} has shard {}, {}", key.1.shard, request.generation),
            );
            state.nodes.entry(node).or_default().hold(key, request.generation);
        }
    }

    /// A node has acknowledged a touch.
    pub fn touched(&self, node: usize, request: &v1::TouchRequest, present: &[bool]) {
        let mut state = self.state();
        let facts = state.nodes.entry(node).or_default();
        for (wire, _) in request.refs.iter().zip(present).filter(|(_, present)| **present) {
            if let Some(key) = key(request.pool, wire) {
                self.trace.about(
                    &key.1.id,
                    format_args!("node-{node} keeps shard {}, {}", key.1.shard, request.generation),
                );
                facts.hold(key, request.generation);
            }
        }
    }

    /// A node was asked to delete: what will go must not be needed.
    #[must_use]
    pub fn deleting(&self, node: usize, request: &v1::DeleteRequest) -> Deleting {
        let mut state = self.state();
        state.deletes += 1;
        let number = state.deletes;
        let before = request.before_generation;
        let asked: BTreeSet<Key> =
            request.refs.iter().filter_map(|wire| key(request.pool, wire)).collect();
        let facts = state.nodes.entry(node).or_default();
        facts.deletes.insert(number, (asked.clone(), before));
        let mut keys = BTreeSet::new();
        let mut going: BTreeMap<Object, u64> = BTreeMap::new();
        for key in asked {
            let Some(generation) = facts.held.get(&key).copied().filter(|held| *held < before)
            else {
                continue;
            };
            self.trace.about(
                &key.1.id,
                format_args!("node-{node} loses shard {} of {generation}, {before}", key.1.shard),
            );
            facts.held.remove(&key);
            facts.uncertain.insert(key);
            keys.insert(key);
            let newest = going.entry((key.1.kind, key.1.id)).or_default();
            *newest = generation.max(*newest);
        }
        for (object, generation) in going {
            if let Some(whose) = state.needed(request.pool, object, generation) {
                let what = format!(
                    "node-{node} is to delete {:?} {} of generation {generation} (before {before}), \
                     which {whose}, and too little of it is left",
                    object.0, object.1
                );
                state.violation(&self.trace, what);
            }
        }
        drop(state);
        Deleting { oracle: self.clone(), node, number, keys }
    }

    /// A node's disk has lied.
    pub fn taint(&self, node: usize) {
        self.state().nodes.entry(node).or_default().tainted = true;
    }

    /// A node's store does not open.
    pub fn not_opened(&self, node: usize, error: &OpenError) {
        let mut state = self.state();
        if !state.nodes.entry(node).or_default().tainted {
            state.violation(&self.trace, format!("node-{node} does not open its store: {error}"));
        }
    }

    /// A node has opened its store again: it must hold what it acknowledged.
    pub fn restarted(&self, node: usize, store: &ChunkStore) {
        let mut state = self.state();
        let found = listed(state.pools.keys().copied(), store);
        let facts = state.nodes.entry(node).or_default();
        for key in std::mem::take(&mut facts.uncertain) {
            if let Some(generation) = found.get(&key) {
                facts.held.insert(key, *generation);
            }
        }
        if facts.tainted {
            facts.held.retain(|key, _| found.contains_key(key));
            return;
        }
        let mut lost = Vec::new();
        for (key, generation) in &facts.held {
            let whole = matches!(store.get(key.0, key.1), Fetched::Found(_));
            if !whole || found.get(key).is_none_or(|found| found < generation) {
                lost.push(format!(
                    "node-{node} acknowledged {:?} with generation {generation}, and after a restart \
                     has {:?} (whole: {whole})",
                    key.1,
                    found.get(key)
                ));
            }
        }
        lost.into_iter().for_each(|what| state.violation(&self.trace, what));
    }

    /// At the end: what a node holds that no stable snapshot reaches.
    pub fn nothing_unreachable(&self, node: usize, store: &ChunkStore) {
        let mut state = self.state();
        let found = listed(state.pools.keys().copied(), store);
        let reached = |key: &Key| {
            let object = (key.1.kind, key.1.id);
            state.stable.values().any(|one| one.pool == key.0 && one.reaches.contains(&object))
        };
        let orphans: Vec<Key> = found.into_keys().filter(|key| !reached(key)).collect();
        if let Some(first) = orphans.first() {
            let what = format!(
                "node-{node} still holds {} records that nothing reaches, one of them {first:?}",
                orphans.len()
            );
            state.violation(&self.trace, what);
        }
    }
}

impl State {
    /// Who needs an object of which too little is left.
    fn needed(&self, pool: u32, object: Object, generation: u64) -> Option<String> {
        let enough = match self.policy(pool, object.0) {
            Policy::Replica(_) => 1,
            Policy::Erasure { data, .. } => usize::from(data),
        };
        if self.copies(pool, object) >= enough {
            return None;
        }
        let of = self.stable.values().find(|one| one.pool == pool && one.reaches.contains(&object));
        if let Some(one) = of {
            return Some(format!("{}@{} needs", one.image, one.number));
        }
        let (_, oldest) = self.leases.iter().min_by_key(|(_, generation)| **generation)?;
        (generation >= *oldest)
            .then(|| format!("a writer of generation {oldest} or later may need"))
    }
}

fn listed(pools: impl Iterator<Item = u32>, store: &ChunkStore) -> BTreeMap<Key, u64> {
    let mut found = BTreeMap::new();
    for pool in pools {
        for kind in [RecordKind::Chunk, RecordKind::TreeNode] {
            let (records, _) = store.list(pool, kind, None, usize::MAX);
            for record in records {
                if let Some(key) = record.r#ref.and_then(|wire| key(pool, &wire)) {
                    found.insert(key, record.generation);
                }
            }
        }
    }
    found
}
