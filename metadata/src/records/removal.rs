//! Removed images whose snapshots are not all marked yet.

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// How far the removal of an image has come.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemovalRecord {
    /// The image.
    #[prost(uint64, tag = "1")]
    pub image_id: u64,
    /// Snapshots up to this number are marked.
    #[prost(uint64, tag = "2")]
    pub marked: u64,
}

impl RemovalRecord {
    /// The key of a removal.
    #[must_use]
    pub fn key_of(image_id: u64) -> Key {
        KeyBuilder::new(KeyKind::Removal).u64(image_id).key()
    }
}

impl Record for RemovalRecord {
    const KIND: KeyKind = KeyKind::Removal;

    fn key(&self) -> Key {
        Self::key_of(self.image_id)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.image_id == 0 { Err("an id is zero") } else { Ok(()) }
    }
}
