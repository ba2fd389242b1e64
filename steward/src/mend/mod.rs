//! Completes objects: what a node lacks it gets from a good copy, or from shards enough.
//!
//! *Invariant:* where a copy was added, all copies of the object have the same generation, and not
//! less than any had: a copy is only as safe from the collector as its generation says, and the
//! writer that touched the others while this node was away may not have published yet.

mod shards;
mod whole;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blobcr_proto::record::{RecordKey, check_payload};
use blobcr_proto::{Hash, v1};
use futures::future::join_all;
use tokio::sync::Semaphore;

use crate::layout::Layout;
use crate::members::Members;
use crate::node::Node;
use crate::pace::Pace;
use crate::walk::{Copied, Object};

/// Bytes that are on their way at the same time, at most: eight chunks of the largest size.
const IN_FLIGHT_BYTES: u32 = 32 << 20;
/// Lost records that are told one by one; beyond them only their number is.
const LOST_TOLD_MAX: usize = 100;

/// What was found and done at one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Copies and shards read.
    pub records: u64,
    /// Their bytes, as stored.
    pub bytes: u64,
    /// Copies that were damaged.
    pub damaged: u64,
    /// Copies that should have been there.
    pub missing: u64,
    /// Copies written anew.
    pub mended: u64,
    /// Bytes of those.
    pub mended_bytes: u64,
}

impl Tally {
    /// Adds what was found at another time.
    pub fn add(&mut self, more: &Self) {
        self.records += more.records;
        self.bytes += more.bytes;
        self.damaged += more.damaged;
        self.missing += more.missing;
        self.mended += more.mended;
        self.mended_bytes += more.mended_bytes;
    }
}

/// All that was found and done so far, by node.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) nodes: BTreeMap<String, Tally>,
    pub(crate) lost: u64,
    pub(crate) lost_ids: Vec<Hash>,
}

/// How thoroughly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// What a node lists, it has.
    Listed,
    /// Everything is read, and checked down to its identity.
    Read,
}

/// Whether an object is now as its pool's policy wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mended {
    /// On every node that is to have it.
    Complete,
    /// A node did not answer, or did not take its copy.
    Owing,
    /// Of what is there too much is damaged.
    Lost,
    /// Fewer shards than it takes were ever there: what a writer left that died.
    Fragment,
}

/// Mends the objects of one pool. Any number of them at the same time.
pub(crate) struct Mender<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) members: &'a Members,
    pub(crate) pace: &'a Pace,
    pub(crate) depth: Depth,
    /// Every copy of an object gets at least this generation.
    pub(crate) generation: u64,
    room: Semaphore,
    found: Mutex<Found>,
}

impl<'a> Mender<'a> {
    pub(crate) fn new(
        layout: &'a Layout,
        members: &'a Members,
        pace: &'a Pace,
        depth: Depth,
        generation: u64,
    ) -> Self {
        let room = Semaphore::new(IN_FLIGHT_BYTES as usize);
        Self { layout, members, pace, depth, generation, room, found: Mutex::default() }
    }

    pub(crate) fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an object on every node that is to have it.
    pub(crate) async fn mend(&self, object: Object) -> Mended {
        let largest = object.copies.iter().map(|copy| copy.stored_bytes).max().unwrap_or(0);
        let parts = self.layout.policy.of(object.kind).nodes() as u64;
        let bytes = u32::try_from(largest.saturating_mul(parts)).unwrap_or(u32::MAX);
        // Never closed.
        let _room = self.room.acquire_many(bytes.clamp(1, IN_FLIGHT_BYTES)).await;
        let mended = if self.layout.stripe(object.kind).is_some() {
            self.mend_shards(&object).await
        } else {
            self.mend_whole(&object).await
        };
        let went_away = object.copies.iter().any(|copy| self.node(copy.node).is_none());
        if mended == Mended::Lost && went_away {
            return Mended::Owing;
        }
        if mended == Mended::Lost {
            let mut found = self.found();
            found.lost += 1;
            if found.lost_ids.len() < LOST_TOLD_MAX {
                found.lost_ids.push(object.id);
            }
        }
        mended
    }

    /// Records copied so far, and their bytes.
    pub(crate) fn copied(&self) -> (u64, u64) {
        let found = self.found();
        let sum = |of: fn(&Tally) -> u64| found.nodes.values().map(of).sum();
        (sum(|tally| tally.mended), sum(|tally| tally.mended_bytes))
    }

    /// The generation that all copies of an object are to have.
    fn generation_of(&self, object: &Object) -> u64 {
        object.copies.iter().map(|copy| copy.generation).max().unwrap_or(0).max(self.generation)
    }

    /// The records that belong to the object's places, and who of those nodes has a copy.
    fn places<'o>(&self, object: &'o Object) -> Vec<(u32, RecordKey, Option<&'o Copied>)> {
        let partition = self.layout.placement.partition(&object.id);
        let row = self.layout.row(object.kind, partition).iter().enumerate();
        row.map(|(place, node)| {
            let key = self.layout.key(object.kind, object.id, place);
            let copy = object.copies.iter().find(|copy| copy.node == *node && copy.key == key);
            (*node, key, copy)
        })
        .collect()
    }

    fn node(&self, node: u32) -> Option<&'a Node> {
        self.members.get(self.layout.id(node))
    }

    fn tally(&self, node: u32, add: impl FnOnce(&mut Tally)) {
        add(self.found().nodes.entry(self.layout.id(node).to_owned()).or_default());
    }

    /// Reads one record, checked as far as it can be by itself. Notes one that is damaged.
    async fn read(&self, copy: &Copied) -> Option<v1::Record> {
        let node = self.node(copy.node)?;
        self.pace.before(copy.stored_bytes).await;
        let found = match node.get(self.layout.pool, vec![copy.key.to_ref()]).await {
            Ok(mut found) => found.pop().unwrap_or_default(),
            Err(error) => {
                self.members.fail(self.layout.id(copy.node), error);
                return None;
            }
        };
        let gone = found.record.is_none() && !found.damaged;
        let good = found.record.filter(|record| {
            check_payload(record).is_ok_and(|key| key == copy.key)
                // A shard shows what it is a part of only beside others.
                && (copy.key.shard != 0 || blobcr_proto::record::open(record).is_ok())
        });
        self.tally(copy.node, |tally| {
            tally.records += u64::from(!gone);
            tally.bytes += if gone { 0 } else { copy.stored_bytes };
            tally.damaged += u64::from(!gone && good.is_none());
        });
        good
    }

    /// Writes records to their nodes. Whether all took theirs.
    async fn put(&self, generation: u64, records: Vec<(u32, v1::Record)>) -> bool {
        let mut puts = Vec::with_capacity(records.len());
        for (node, record) in records {
            puts.push(self.put_one(generation, node, record));
        }
        join_all(puts).await.into_iter().all(|put| put)
    }

    async fn put_one(&self, generation: u64, at: u32, record: v1::Record) -> bool {
        let Some(node) = self.node(at) else { return false };
        let bytes = record.payload.len() as u64;
        match node.put(self.layout.pool, generation, vec![record]).await {
            Ok(done) => {
                self.tally(at, |tally| {
                    tally.mended += u64::from(done.stored);
                    tally.mended_bytes += u64::from(done.stored) * bytes;
                });
                true
            }
            Err(error) => {
                self.members.fail(self.layout.id(at), error);
                false
            }
        }
    }

    /// Raises copies to a generation. What a node turns out to lack is told by another walk.
    async fn raise(&self, generation: u64, copies: &[&Copied]) -> bool {
        let mut raises = Vec::new();
        for copy in copies.iter().filter(|copy| copy.generation < generation) {
            raises.push(self.raise_one(generation, copy));
        }
        join_all(raises).await.into_iter().all(|raised| raised)
    }

    async fn raise_one(&self, generation: u64, copy: &Copied) -> bool {
        let Some(node) = self.node(copy.node) else { return false };
        match node.touch(self.layout.pool, generation, vec![copy.key.to_ref()]).await {
            Ok(present) => present.first() == Some(&true),
            Err(error) => {
                self.members.fail(self.layout.id(copy.node), error);
                false
            }
        }
    }
}
