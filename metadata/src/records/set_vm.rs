//! What one VM contributed to a checkpoint set. A record of its own, so that a thousand VMs that
//! check in at once do not wait for each other.

use blobcr_proto::name::GroupName;
use blobcr_proto::{DiskName, ImageName, VmName};

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// Disks of one VM in one set at most; with the longest names they fit one record.
pub const VM_DISKS_MAX: usize = 64;

/// The disks of one VM.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetVmRecord {
    /// The set's group.
    #[prost(string, tag = "1")]
    pub group: String,
    /// Which set of the group.
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    /// The VM.
    #[prost(string, tag = "3")]
    pub vm: String,
    /// Its disks, by name.
    #[prost(message, repeated, tag = "4")]
    pub disks: Vec<SetDisk>,
}

/// One disk's snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetDisk {
    /// The disk.
    #[prost(string, tag = "1")]
    pub disk: String,
    /// The name of its checkpoint image, as it was.
    #[prost(string, tag = "2")]
    pub image: String,
    /// The image itself: its name may have gone to another.
    #[prost(uint64, tag = "3")]
    pub image_id: u64,
    /// The snapshot.
    #[prost(uint64, tag = "4")]
    pub number: u64,
}

impl SetVmRecord {
    /// The key of a VM's part of a set.
    #[must_use]
    pub fn key_of(group: &str, sequence: u64, vm: &str) -> Key {
        Self::builder(group, sequence).text(vm).key()
    }

    /// What all parts of a set begin with.
    #[must_use]
    pub fn prefix_of(group: &str, sequence: u64) -> Key {
        Self::builder(group, sequence).key()
    }

    fn builder(group: &str, sequence: u64) -> KeyBuilder {
        KeyBuilder::new(KeyKind::SetVm).text(group).u8(0).u64(u64::MAX - sequence)
    }
}

impl Record for SetVmRecord {
    const KIND: KeyKind = KeyKind::SetVm;

    fn key(&self) -> Key {
        Self::key_of(&self.group, self.sequence, &self.vm)
    }

    fn check(&self) -> Result<(), &'static str> {
        GroupName::new(self.group.as_str()).map_err(|_| "no group name")?;
        VmName::new(self.vm.as_str()).map_err(|_| "no VM name")?;
        if !(1..=VM_DISKS_MAX).contains(&self.disks.len()) {
            return Err("no number of disks");
        }
        for disk in &self.disks {
            DiskName::new(disk.disk.as_str()).map_err(|_| "no disk name")?;
            ImageName::new(disk.image.as_str()).map_err(|_| "no image name")?;
            if disk.image_id == 0 || disk.number == 0 {
                return Err("an id or number is zero");
            }
        }
        Ok(())
    }
}
