//! Checkpoint sets, without their members.

use blobcr_proto::name::GroupName;

use super::{KeyBuilder, KeyKind, Record, check_holder};
use crate::store::Key;

/// Holders of one set at most: people and jobs, not VMs.
pub const SET_HOLDERS_MAX: usize = 64;

/// What the holders of sets' own pins begin with. A group's name has no slash.
pub const SET_HOLDER_PREFIX: &str = "set ";

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
    /// Who keeps it, in order.
    #[prost(string, repeated, tag = "5")]
    pub holders: Vec<String>,
    /// It was given up, and what it kept is being let go.
    #[prost(bool, tag = "6")]
    pub obsolete: bool,
}

impl SetRecord {
    /// The key of a set.
    #[must_use]
    pub fn key_of(group: &str, sequence: u64) -> Key {
        KeyBuilder::new(KeyKind::Set).text(group).u8(0).u64(u64::MAX - sequence).key()
    }

    /// Under which name it pins the snapshots of its members.
    #[must_use]
    pub fn holder(&self) -> String {
        format!("{SET_HOLDER_PREFIX}{}/{}", self.group, self.sequence)
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
        if self.holders.len() > SET_HOLDERS_MAX {
            return Err("too many holders");
        }
        self.holders.iter().try_for_each(|holder| check_holder(holder))?;
        if self.expected_vms == 0 { Err("a set of no VMs") } else { Ok(()) }
    }
}
