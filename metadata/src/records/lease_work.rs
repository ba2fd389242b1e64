//! Pending snapshots by lease, so that what a dead writer left is found without a search.

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// A pending snapshot under a lease.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseWorkRecord {
    /// The lease.
    #[prost(uint64, tag = "1")]
    pub lease_id: u64,
    /// The snapshot's image.
    #[prost(uint64, tag = "2")]
    pub image_id: u64,
    /// The snapshot's number.
    #[prost(uint64, tag = "3")]
    pub number: u64,
}

impl LeaseWorkRecord {
    /// What all work under a lease begins with.
    #[must_use]
    pub fn prefix_of(lease_id: u64) -> Key {
        KeyBuilder::new(KeyKind::LeaseWork).u64(lease_id).key()
    }
}

impl Record for LeaseWorkRecord {
    const KIND: KeyKind = KeyKind::LeaseWork;

    fn key(&self) -> Key {
        let Self { lease_id, image_id, number } = *self;
        KeyBuilder::new(KeyKind::LeaseWork).u64(lease_id).u64(image_id).u64(number).key()
    }

    fn check(&self) -> Result<(), &'static str> {
        let Self { lease_id, image_id, number } = *self;
        if lease_id == 0 || image_id == 0 || number == 0 { Err("an id is zero") } else { Ok(()) }
    }
}
