//! Placement tables. A table is split, because a large pool's does not fit one value: the newest
//! version's head names the nodes, and parts of that version hold the rows.

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;
use blobcr_proto::policy::POLICY_NODES_MAX;

/// Nodes of one pool's table at most: their ids fit one record, and their index two bytes.
pub const TABLE_NODES_MAX: usize = 512;

/// Partitions in one part: 256 rows of the widest policy fit one record.
pub const PART_ROWS: usize = 256;

/// The newest table of a pool.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PlacementRecord {
    /// The pool.
    #[prost(uint32, tag = "1")]
    pub pool: u32,
    /// The version, from 1.
    #[prost(uint64, tag = "2")]
    pub version: u64,
    /// Ids of its nodes; rows hold indices into these.
    #[prost(string, repeated, tag = "3")]
    pub nodes: Vec<String>,
    /// Nodes in a row.
    #[prost(uint32, tag = "4")]
    pub width: u32,
    /// Rows.
    #[prost(uint32, tag = "5")]
    pub partitions: u32,
}

impl PlacementRecord {
    /// The key of a pool's table.
    #[must_use]
    pub fn key_of(pool: u32) -> Key {
        KeyBuilder::new(KeyKind::Placement).u32(pool).key()
    }

    /// How many parts hold its rows.
    #[must_use]
    pub fn parts(&self) -> u16 {
        // At most 65 536 partitions: see `check`.
        (self.partitions as usize).div_ceil(PART_ROWS) as u16
    }
}

impl Record for PlacementRecord {
    const KIND: KeyKind = KeyKind::Placement;

    fn key(&self) -> Key {
        Self::key_of(self.pool)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.pool == 0 || self.version == 0 {
            return Err("an id or version is zero");
        }
        if !self.partitions.is_power_of_two() || self.partitions > 1 << 16 {
            return Err("no number of partitions");
        }
        if self.width == 0 || self.width as usize > POLICY_NODES_MAX {
            return Err("no number of nodes in a row");
        }
        if self.nodes.len() > TABLE_NODES_MAX || self.nodes.len() < self.width as usize {
            return Err("no number of nodes");
        }
        self.nodes.iter().try_for_each(|id| super::node::check_node_id(id))
    }
}

/// Rows of one version of a table. The rows never change; what they move from is taken away as their
/// data arrives.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PlacementPartRecord {
    /// The pool.
    #[prost(uint32, tag = "1")]
    pub pool: u32,
    /// The version of the table.
    #[prost(uint64, tag = "2")]
    pub version: u64,
    /// Which part: its first row is that many times [`PART_ROWS`].
    #[prost(uint32, tag = "3")]
    pub part: u32,
    /// Row after row, the indices of its nodes, first choice first; all rows of equal length.
    #[prost(uint32, repeated, tag = "4")]
    pub rows: Vec<u32>,
    /// The rows whose data has not all come to their nodes yet, in order.
    #[prost(message, repeated, tag = "5")]
    pub moving: Vec<MovingFrom>,
}

/// Who held a partition before, until its data has come to its row.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MovingFrom {
    /// Which row of the part.
    #[prost(uint32, tag = "1")]
    pub row: u32,
    /// Indices of the nodes, the latest last; none of them is in the row.
    #[prost(uint32, repeated, tag = "2")]
    pub nodes: Vec<u32>,
}

impl PlacementPartRecord {
    /// The key of a part.
    #[must_use]
    pub fn key_of(pool: u32, version: u64, part: u16) -> Key {
        KeyBuilder::new(KeyKind::PlacementPart).u32(pool).u64(version).u16(part).key()
    }
}

impl Record for PlacementPartRecord {
    const KIND: KeyKind = KeyKind::PlacementPart;

    fn key(&self) -> Key {
        Self::key_of(self.pool, self.version, u16::try_from(self.part).unwrap_or(u16::MAX))
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.pool == 0 || self.version == 0 || self.part >= 1 << 8 {
            return Err("an id, version or part is out of range");
        }
        if self.rows.len() > PART_ROWS * POLICY_NODES_MAX {
            return Err("too many rows");
        }
        let in_order = self.moving.is_sorted_by(|a, b| a.row < b.row);
        let bounded = |moving: &MovingFrom| {
            (moving.row as usize) < PART_ROWS
                && (1..=POLICY_NODES_MAX).contains(&moving.nodes.len())
                && moving.nodes.iter().all(|node| (*node as usize) < TABLE_NODES_MAX)
        };
        if !in_order || !self.moving.iter().all(bounded) {
            return Err("a row that moves is out of range");
        }
        if self.rows.iter().any(|node| *node as usize >= TABLE_NODES_MAX) {
            return Err("an index is out of range");
        }
        Ok(())
    }
}
