//! Pools.

use blobcr_proto::{PoolName, v1};

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;
use blobcr_proto::policy::{Compression, Policy};

/// A set of repository nodes with one redundancy policy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PoolRecord {
    /// Its id.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// Its name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Its [`Policy`], as text.
    #[prost(string, tag = "3")]
    pub policy: String,
    /// Partitions of its placement table.
    #[prost(uint32, tag = "4")]
    pub partitions: u32,
    /// Its [`Compression`], as text.
    #[prost(string, tag = "5")]
    pub compression: String,
}

impl PoolRecord {
    /// The key of a pool.
    #[must_use]
    pub fn key_of(id: u32) -> Key {
        KeyBuilder::new(KeyKind::Pool).u32(id).key()
    }

    /// The wire form.
    #[must_use]
    pub fn to_wire(&self) -> v1::Pool {
        v1::Pool {
            id: self.id,
            name: self.name.clone(),
            policy: self.policy.clone(),
            partitions: self.partitions,
            compression: self.compression.clone(),
        }
    }
}

impl Record for PoolRecord {
    const KIND: KeyKind = KeyKind::Pool;

    fn key(&self) -> Key {
        Self::key_of(self.id)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.id == 0 {
            return Err("an id is zero");
        }
        if !self.partitions.is_power_of_two() || self.partitions > 1 << 16 {
            return Err("no number of partitions");
        }
        PoolName::new(self.name.as_str()).map_err(|_| "no pool name")?;
        self.policy.parse::<Policy>().map_err(|_| "no policy")?;
        self.compression.parse::<Compression>().map_err(|_| "no compression")?;
        Ok(())
    }
}
