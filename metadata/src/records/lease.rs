//! Leases of writers.

use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// A writer's promise to be alive. The collector spares what was touched with the generation of any
/// lease that has a record, so a lease ends only when its record goes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseRecord {
    /// Its id: random, so that nobody holds another's by mistake.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Grows with every lease ever given.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// Who asked for it, for people.
    #[prost(string, tag = "3")]
    pub holder: String,
    /// How long it lives after each renewal, in ms.
    #[prost(uint64, tag = "4")]
    pub ttl_ms: u64,
    /// When it runs out unless renewed, in ms since 1970.
    #[prost(uint64, tag = "5")]
    pub expires_unix_ms: u64,
    /// It has run out or was released: nothing can be done under it any more, and its pending
    /// snapshots are being failed.
    #[prost(bool, tag = "6")]
    pub closed: bool,
}

impl LeaseRecord {
    /// The key of a lease.
    #[must_use]
    pub fn key_of(id: u64) -> Key {
        KeyBuilder::new(KeyKind::Lease).u64(id).key()
    }

    /// The wire form.
    #[must_use]
    pub const fn to_wire(&self) -> v1::Lease {
        v1::Lease { id: self.id, generation: self.generation, ttl_ms: self.ttl_ms }
    }
}

impl Record for LeaseRecord {
    const KIND: KeyKind = KeyKind::Lease;

    fn key(&self) -> Key {
        Self::key_of(self.id)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.id == 0 || self.generation == 0 { Err("an id is zero") } else { Ok(()) }
    }
}
