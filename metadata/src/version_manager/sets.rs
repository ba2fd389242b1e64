//! Checkpoint sets: one snapshot per disk of a group of VMs.
//!
//! Each VM's part is a record of its own, so VMs that check in at the same time do not meet.
//! Whether a set is complete and stable is found when it is read.

use std::collections::BTreeMap;

use blobcr_proto::name::GroupName;
use blobcr_proto::{DiskName, ImageName, VmName, v1};

use super::{Held, RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{
    ImageNameRecord, SetDisk, SetRecord, SetVmRecord, SnapshotRecord, VM_DISKS_MAX,
};
use crate::store::{PAGE_ENTRIES_MAX, Swap};

/// Members in one request at most.
pub const MEMBERS_PER_REQUEST_MAX: usize = 1024;
/// VMs in one set at most: reading a set reads the snapshots of all of them.
pub const SET_VMS_MAX: u32 = 16_384;
/// Sets in one reply that the request does not limit, and at most: each is read with its members.
pub const LIST_SETS_MAX: u32 = 100;

fn describe(group: &str, sequence: u64) -> String {
    format!("set {sequence} of group {group:?}")
}

fn invalid(what: &str) -> impl Fn(blobcr_proto::name::NameError) -> Error {
    move |error| Error::invalid(format!("{what}: {error}"))
}

fn check_member(member: &v1::SetMember) -> Result<(), Error> {
    VmName::new(member.vm.as_str()).map_err(invalid("VM"))?;
    DiskName::new(member.disk.as_str()).map_err(invalid("disk"))?;
    ImageName::new(member.image.as_str()).map_err(invalid("image"))?;
    if member.number == 0 {
        return Err(Error::invalid(format!("disk {}: snapshot numbers begin at 1", member.disk)));
    }
    Ok(())
}

impl VersionManager {
    /// Adds members to a set, which is made when it is not there. A member that is there already,
    /// with the same snapshot, stays as it is.
    ///
    /// # Errors
    /// [`Error::Precondition`] when the set expects another number of VMs, has them all, or has
    /// another snapshot of the same disk; [`Error::NotFound`] when a member's image is not there.
    pub async fn add_to_set(&self, r: v1::AddToSetRequest) -> Result<v1::CheckpointSet, Error> {
        GroupName::new(r.group.as_str()).map_err(invalid("group"))?;
        if !(1..=SET_VMS_MAX).contains(&r.expected_vms) {
            return Err(Error::invalid(format!("a set has from 1 to {SET_VMS_MAX} VMs")));
        }
        if r.members.len() > MEMBERS_PER_REQUEST_MAX {
            return Err(Error::invalid(format!(
                "{} members at once; at most {MEMBERS_PER_REQUEST_MAX}, add the rest after them",
                r.members.len()
            )));
        }
        let mut by_vm: BTreeMap<&str, Vec<&v1::SetMember>> = BTreeMap::new();
        for member in &r.members {
            check_member(member)?;
            by_vm.entry(&member.vm).or_default().push(member);
        }
        let object = || describe(&r.group, r.sequence);
        let mut set = until_won!(self, object(), self.set_or_new(&r).await)?;
        self.room_for(&set.value, by_vm.keys().copied()).await?;
        for (vm, members) in by_vm {
            until_won!(self, object(), self.try_add_vm(&mut set, vm, &members).await)?;
        }
        self.read_set(set.value).await
    }

    async fn set_or_new(&self, r: &v1::AddToSetRequest) -> Result<Held<SetRecord>, Error> {
        let key = SetRecord::key_of(&r.group, r.sequence);
        if let Some(set) = self.load::<SetRecord>(key).await? {
            if set.value.expected_vms != r.expected_vms {
                let problem =
                    format!("expects {} VMs, not {}", set.value.expected_vms, r.expected_vms);
                return Err(Error::precondition(describe(&r.group, r.sequence), problem));
            }
            return Ok(set);
        }
        let set = SetRecord {
            group: r.group.clone(),
            sequence: r.sequence,
            expected_vms: r.expected_vms,
            created_unix_ms: self.now(),
        };
        let version = self.store.swap(Swap::new().create(&set)).await?;
        Ok(Held { value: set, version })
    }

    /// Refuses VMs that the set does not expect. VMs that come at the very same moment may still
    /// both get in; the set is complete all the same.
    async fn room_for<'a>(
        &self,
        set: &SetRecord,
        vms: impl Iterator<Item = &'a str>,
    ) -> Result<(), Error> {
        let mut all: std::collections::BTreeSet<String> =
            self.vms_of(set).await?.into_iter().map(|vm| vm.vm).collect();
        all.extend(vms.map(str::to_owned));
        if all.len() > set.expected_vms as usize {
            let problem = format!("expects {} VMs and would have {}", set.expected_vms, all.len());
            return Err(Error::precondition(describe(&set.group, set.sequence), problem));
        }
        Ok(())
    }

    async fn try_add_vm(
        &self,
        set: &mut Held<SetRecord>,
        vm: &str,
        members: &[&v1::SetMember],
    ) -> Result<(), Error> {
        let SetRecord { group, sequence, .. } = &set.value;
        let held = self.load::<SetVmRecord>(SetVmRecord::key_of(group, *sequence, vm)).await?;
        let mut part = held.as_ref().map_or_else(
            || SetVmRecord {
                group: group.clone(),
                sequence: *sequence,
                vm: vm.to_owned(),
                disks: Vec::new(),
            },
            |held| held.value.clone(),
        );
        for member in members {
            self.merge(&mut part, member).await?;
        }
        if part.disks.len() > VM_DISKS_MAX {
            return Err(Error::invalid(format!("VM {vm:?} has more than {VM_DISKS_MAX} disks")));
        }
        let swap = Swap::new().unchanged(set);
        let swap = match &held {
            Some(held) if held.value == part => return Ok(()),
            Some(held) => swap.update(held, &part),
            None => swap.create(&part),
        };
        self.store.swap(swap).await?;
        Ok(())
    }

    async fn merge(&self, part: &mut SetVmRecord, member: &v1::SetMember) -> Result<(), Error> {
        let at = part.disks.binary_search_by(|disk| disk.disk.as_str().cmp(&member.disk));
        match at {
            Ok(at) => {
                let there = part.disks.get(at).map(|disk| (disk.image.as_str(), disk.number));
                if there == Some((member.image.as_str(), member.number)) {
                    return Ok(());
                }
                let (image, number) = there.unwrap_or_default();
                Err(Error::precondition(
                    describe(&part.group, part.sequence),
                    format!(
                        "has {image}@{number} of disk {:?} of VM {:?}, not {}@{}; \
                         a new checkpoint needs a new sequence number",
                        member.disk, member.vm, member.image, member.number
                    ),
                ))
            }
            Err(at) => {
                let name = ImageNameRecord::key_of(&member.image);
                let name = self.load::<ImageNameRecord>(name).await?.ok_or_else(|| {
                    Error::not_found(
                        format!("image {:?}", member.image),
                        "checkpoint the disk first",
                    )
                })?;
                let disk = SetDisk {
                    disk: member.disk.clone(),
                    image: member.image.clone(),
                    image_id: name.value.image_id,
                    number: member.number,
                };
                part.disks.insert(at, disk);
                Ok(())
            }
        }
    }

    async fn vms_of(&self, set: &SetRecord) -> Result<Vec<SetVmRecord>, Error> {
        let prefix = SetVmRecord::prefix_of(&set.group, set.sequence);
        let vms = self.all::<SetVmRecord>(&prefix).await?;
        Ok(vms.into_iter().map(|vm| vm.value).collect())
    }

    /// A set with its members, and what follows from their snapshots.
    async fn read_set(&self, set: SetRecord) -> Result<v1::CheckpointSet, Error> {
        let vms = self.vms_of(&set).await?;
        let complete = vms.len() >= set.expected_vms as usize;
        let mut stable = !vms.is_empty();
        let mut members = Vec::new();
        for vm in vms {
            for disk in vm.disks {
                // What is known to be unstable needs no further look.
                stable = stable && self.is_stable(&disk).await?;
                members.push(v1::SetMember {
                    vm: vm.vm.clone(),
                    disk: disk.disk,
                    image: disk.image,
                    number: disk.number,
                });
            }
        }
        Ok(v1::CheckpointSet {
            group: set.group,
            sequence: set.sequence,
            expected_vms: set.expected_vms,
            members,
            created_unix_ms: set.created_unix_ms,
            complete,
            stable,
        })
    }

    async fn is_stable(&self, disk: &SetDisk) -> Result<bool, Error> {
        let key = SnapshotRecord::key_of(disk.image_id, disk.number);
        let snapshot = self.load::<SnapshotRecord>(key).await?;
        Ok(snapshot.is_some_and(|held| held.value.state() == v1::SnapshotState::Stable))
    }

    /// The newest sets of a group, newest first.
    ///
    /// # Errors
    /// When the group's name is bad or the store cannot tell.
    pub async fn list_sets(&self, r: v1::ListSetsRequest) -> Result<v1::ListSetsResponse, Error> {
        GroupName::new(r.group.as_str()).map_err(invalid("group"))?;
        let limit = if r.limit == 0 { LIST_SETS_MAX } else { r.limit.min(LIST_SETS_MAX) };
        let prefix = SetRecord::prefix_of(&r.group);
        let (found, _) = self.page::<SetRecord>(&prefix, None, limit as usize).await?;
        let mut sets = Vec::with_capacity(found.len());
        for set in found {
            sets.push(self.read_set(set.value).await?);
        }
        Ok(v1::ListSetsResponse { sets })
    }

    /// The newest set of a group that is complete and stable: what a restart may use.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn latest_set(&self, r: v1::LatestSetRequest) -> Result<v1::CheckpointSet, Error> {
        GroupName::new(r.group.as_str()).map_err(invalid("group"))?;
        let prefix = SetRecord::prefix_of(&r.group);
        let mut after = None;
        loop {
            let (found, more) =
                self.page::<SetRecord>(&prefix, after.as_ref(), PAGE_ENTRIES_MAX).await?;
            after = found.last().map(|set| crate::records::Record::key(&set.value));
            for set in found {
                let set = self.read_set(set.value).await?;
                if set.complete && set.stable {
                    return Ok(set);
                }
            }
            if !more {
                let object = format!("complete and stable set of group {:?}", r.group);
                return Err(Error::not_found(object, "`blobcr set list` shows what there is"));
            }
        }
    }
}
