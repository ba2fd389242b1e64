//! Checkpoint sets, without their members.

use blobcr_proto::name::GroupName;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// One snapshot per disk of a group of VMs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetRecord {
    /// The group.
    #[prost(string, tag = "1")]
    pub group: String,
    /// Which set of the group.
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    /// How many VMs make it complete.
    #[prost(uint32, tag = "3")]
    pub expected_vms: u32,
    /// When its first member came, in ms since 1970.
    #[prost(uint64, tag = "4")]
    pub created_unix_ms: u64,
}

impl SetRecord {
    /// The key of a set.
    #[must_use]
    pub fn key_of(group: &str, sequence: u64) -> Key {
        KeyBuilder::new(KeyKind::Set).text(group).u8(0).u64(u64::MAX - sequence).key()
    }

    /// What all sets of a group begin with; the newest comes first.
    #[must_use]
    pub fn prefix_of(group: &str) -> Key {
        KeyBuilder::new(KeyKind::Set).text(group).u8(0).key()
    }
}

impl Record for SetRecord {
    const KIND: KeyKind = KeyKind::Set;

    fn key(&self) -> Key {
        Self::key_of(&self.group, self.sequence)
    }

    fn check(&self) -> Result<(), &'static str> {
        GroupName::new(self.group.as_str()).map_err(|_| "no group name")?;
        if self.expected_vms == 0 { Err("a set of no VMs") } else { Ok(()) }
    }
}
