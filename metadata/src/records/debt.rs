//! What was acknowledged with fewer copies than its pool's policy wants.

use blobcr_proto::policy::POLICY_NODES_MAX;
use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::{Key, Version};

/// What one partition owes: one record however much it is, so that a long failure stays small.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DebtRecord {
    /// The pool.
    #[prost(uint32, tag = "1")]
    pub pool: u32,
    /// The partition.
    #[prost(uint32, tag = "2")]
    pub partition: u32,
    /// Objects owed, at most.
    #[prost(uint64, tag = "3")]
    pub objects: u64,
    /// When the first of them was reported, in ms since 1970.
    #[prost(uint64, tag = "4")]
    pub since_unix_ms: u64,
    /// Ids of the nodes that lack some of them, in order; empty when any may.
    #[prost(string, repeated, tag = "5")]
    pub missed_nodes: Vec<String>,
}

/// Nodes that one debt names at most: more than the rows of a partition have had when it moves from
/// as many nodes as it may. Beyond that any may lack something.
pub const MISSED_NODES_MAX: usize = 2 * POLICY_NODES_MAX;

impl DebtRecord {
    /// The key of a partition's debt.
    #[must_use]
    pub fn key_of(pool: u32, partition: u32) -> Key {
        KeyBuilder::new(KeyKind::Debt).u32(pool).u32(partition).key()
    }

    /// Lists what a pool owes.
    #[must_use]
    pub fn prefix_of(pool: u32) -> Key {
        KeyBuilder::new(KeyKind::Debt).u32(pool).key()
    }

    /// The wire form. The store's version is the revision: every report writes the record, and no
    /// version is ever given twice, so a debt that was settled and came again is another one.
    #[must_use]
    pub fn to_wire(&self, version: Version) -> v1::Debt {
        v1::Debt {
            pool: self.pool,
            partition: self.partition,
            objects: self.objects,
            since_unix_ms: self.since_unix_ms,
            revision: version.0,
            missed_nodes: self.missed_nodes.clone(),
        }
    }
}

impl Record for DebtRecord {
    const KIND: KeyKind = KeyKind::Debt;

    fn key(&self) -> Key {
        Self::key_of(self.pool, self.partition)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.pool == 0 || self.partition >= 1 << 16 {
            return Err("an id or partition is out of range");
        }
        if self.missed_nodes.len() > MISSED_NODES_MAX {
            return Err("too many nodes that lack something");
        }
        self.missed_nodes.iter().try_for_each(|id| super::node::check_node_id(id))?;
        if self.objects == 0 { Err("a debt of nothing") } else { Ok(()) }
    }
}
