//! What must hold at every moment of a run. It knows everything and tells nobody: no part of the
//! cluster asks it.
//!
//! | invariant | where it is checked |
//! |---|---|
//! | a snapshot is published whole: its tree and chunks are held by as many nodes as its pool's policy asks for | at each swap that makes a snapshot stable |
//! | `latest` never goes back, and is stable | at each swap that changes an image |
//! | a node holds after a restart what it acknowledged | at each start of a node |
//! | what a live root or a leased writer needs is not deleted | at each delete that a node begins |
//! | a stable snapshot reads back byte for byte | by readers, all the time and at the end |
//! | nothing unreachable stays | at the end |

mod catalog;
mod nodes;
mod tree;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blobcr_proto::Hash;
use blobcr_proto::policy::Policy;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;

use crate::content::Content;
use crate::trace::Trace;
pub use nodes::Deleting;

/// Violations that are kept.
const VIOLATIONS_MAX: usize = 20;

/// A pool and a key in it.
type Key = (u32, RecordKey);

/// An object: a chunk or a tree node.
type Object = (RecordKind, Hash);

/// A snapshot that is stable.
#[derive(Clone, Debug)]
pub struct Stable {
    /// Id of its image.
    pub image: u64,
    /// Its number.
    pub number: u64,
    /// The pool of its image.
    pub pool: u32,
    /// What it holds.
    pub content: Content,
    /// What its tree reaches, with itself.
    reaches: Arc<BTreeSet<Object>>,
}

#[derive(Debug, Default)]
struct NodeFacts {
    /// Acknowledged records and their generations.
    held: BTreeMap<Key, u64>,
    /// Records that a delete which was not answered may have taken.
    uncertain: BTreeSet<Key>,
    /// Deletes that were begun: keys, and the generation below which they go.
    deletes: BTreeMap<u64, (BTreeSet<Key>, u64)>,
    /// Its disk lied: nothing is expected of it any more.
    tainted: bool,
}

#[derive(Debug, Default)]
struct State {
    violations: Vec<String>,
    /// What trees hold, by root, once their writer has made them.
    roots: HashMap<Vec<u8>, Content>,
    stable: BTreeMap<(u64, u64), Stable>,
    /// Snapshots that somebody wants removed.
    leaving: BTreeSet<(u64, u64)>,
    latest: BTreeMap<u64, u64>,
    images: BTreeMap<u64, u32>,
    pools: BTreeMap<u32, Policy>,
    leases: BTreeMap<u64, u64>,
    nodes: BTreeMap<usize, NodeFacts>,
    tree_nodes: HashMap<Hash, Bytes>,
    deletes: u64,
    published: u64,
    deleted: u64,
}

/// The oracle; clones are the same one.
#[derive(Clone, Debug)]
pub struct Oracle {
    state: Arc<Mutex<State>>,
    trace: Trace,
}

impl State {
    fn violation(&mut self, trace: &Trace, what: String) {
        trace.note(format_args!("VIOLATION: {what}"));
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(what);
        }
    }

    fn policy(&self, pool: u32, kind: RecordKind) -> Policy {
        self.pools.get(&pool).copied().unwrap_or(Policy::Replica(1)).of(kind)
    }

    /// How many nodes hold a copy of an object, or different shards of it.
    fn copies(&self, pool: u32, (kind, id): Object) -> usize {
        let is_cut = matches!(self.policy(pool, kind), Policy::Erasure { .. });
        let first = RecordKey { kind, id, shard: 0 };
        let last = RecordKey { shard: u8::MAX, ..first };
        let mut shards = BTreeSet::new();
        let mut holders = 0;
        for facts in self.nodes.values() {
            let mut held = facts.held.range((pool, first)..=(pool, last)).peekable();
            holders += usize::from(held.peek().is_some());
            shards.extend(held.map(|((_, key), _)| key.shard));
        }
        if is_cut { shards.len() } else { holders }
    }
}

impl Oracle {
    /// Of a world in which nothing has happened.
    #[must_use]
    pub fn new(trace: Trace) -> Self {
        Self { state: Arc::default(), trace }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is wrong.
    pub fn violation(&self, what: String) {
        self.state().violation(&self.trace, what);
    }

    /// What was found wrong so far.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// Snapshots published, and records deleted, so far.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.published, state.deleted)
    }

    /// A writer has made a tree that holds `content`, and is about to publish it.
    pub fn made(&self, root: &v1::TreeRoot, content: &Content) {
        self.state().roots.insert(tree::name(root), content.clone());
    }

    /// Somebody is about to remove a snapshot.
    pub fn leaving(&self, image: u64, number: u64) {
        self.state().leaving.insert((image, number));
    }

    /// Somebody is about to remove all of an image.
    pub fn image_leaving(&self, image: u64) {
        let mut state = self.state();
        let of_image = state.stable.range((image, 0)..=(image, u64::MAX)).map(|(at, _)| *at);
        let of_image: Vec<_> = of_image.collect();
        state.leaving.extend(of_image);
    }

    /// The snapshots that are stable and that nobody wants removed.
    #[must_use]
    pub fn stable(&self) -> Vec<Stable> {
        let state = self.state();
        let stays = |at: &(u64, u64)| !state.leaving.contains(at);
        state.stable.iter().filter(|(at, _)| stays(at)).map(|(_, one)| one.clone()).collect()
    }

    /// Whether a snapshot is stable, and nobody wants it removed.
    #[must_use]
    pub fn is_stable(&self, image: u64, number: u64) -> bool {
        let state = self.state();
        let at = (image, number);
        state.stable.contains_key(&at) && !state.leaving.contains(&at)
    }

    /// The content of a tree that was made.
    #[must_use]
    pub fn content_of(&self, root: &v1::TreeRoot) -> Option<Content> {
        self.state().roots.get(&tree::name(root)).cloned()
    }
}
