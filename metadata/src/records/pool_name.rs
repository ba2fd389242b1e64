//! Which pool has a name.

use blobcr_proto::PoolName;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// A name in use.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PoolNameRecord {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The pool that has it.
    #[prost(uint32, tag = "2")]
    pub pool_id: u32,
}

impl PoolNameRecord {
    /// The key of a name.
    #[must_use]
    pub fn key_of(name: &str) -> Key {
        KeyBuilder::new(KeyKind::PoolName).text(name).key()
    }
}

impl Record for PoolNameRecord {
    const KIND: KeyKind = KeyKind::PoolName;

    fn key(&self) -> Key {
        Self::key_of(&self.name)
    }

    fn check(&self) -> Result<(), &'static str> {
        PoolName::new(self.name.as_str()).map_err(|_| "no pool name")?;
        if self.pool_id == 0 { Err("an id is zero") } else { Ok(()) }
    }
}
