//! Groups of VMs whose checkpoints make sets.

use blobcr_proto::name::GroupName;
use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// What outlives the sets of a group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GroupRecord {
    /// The group.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The largest number that was given to a set of it.
    #[prost(uint64, tag = "2")]
    pub last_sequence: u64,
    /// So many of the newest complete and stable sets are kept; 0: all.
    #[prost(uint32, tag = "3")]
    pub keep_sets: u32,
}

impl GroupRecord {
    /// The key of a group.
    #[must_use]
    pub fn key_of(name: &str) -> Key {
        KeyBuilder::new(KeyKind::Group).text(name).key()
    }

    /// The wire form.
    #[must_use]
    pub fn to_wire(&self) -> v1::Group {
        v1::Group {
            name: self.name.clone(),
            last_sequence: self.last_sequence,
            keep_sets: self.keep_sets,
        }
    }
}

impl Record for GroupRecord {
    const KIND: KeyKind = KeyKind::Group;

    fn key(&self) -> Key {
        Self::key_of(&self.name)
    }

    fn check(&self) -> Result<(), &'static str> {
        GroupName::new(self.name.as_str()).map(|_| ()).map_err(|_| "no group name")
    }
}
