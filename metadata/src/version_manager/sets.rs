//! Checkpoint sets: one snapshot per disk of a group of VMs.
//!
//! Each VM's part is a record of its own, so VMs that check in at the same time do not meet.
//! Whether a set is complete and stable is found when it is read.
//!
//! # Invariant
//! A snapshot that a set names is pinned by the set (see [`super::pins`]) from before the set names
//! it until after it is given up (see [`super::retire`]). A pin that is left by a VM which died in
//! between goes when the set does.

use std::collections::{BTreeMap, BTreeSet};

use blobcr_proto::name::GroupName;
use blobcr_proto::v1::{SetState, SnapshotState};
use blobcr_proto::{DiskName, ImageName, VmName, v1};

use super::{Held, RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{
    GroupRecord, ImageNameRecord, PinRecord, Record, SetDisk, SetRecord, SetVmRecord,
    SnapshotRecord, VM_DISKS_MAX,
};
use crate::store::{PAGE_ENTRIES_MAX, Swap};

/// Pins made in one swap: each also writes its image's record, and what names them comes with the
/// last ones.
const PINS_PER_SWAP: usize = 24;

/// Members in one request at most.
pub const MEMBERS_PER_REQUEST_MAX: usize = 1024;
/// VMs in one set at most: reading a set reads the snapshots of all of them.
pub const SET_VMS_MAX: u32 = 16_384;
/// Sets in one reply that the request does not limit, and at most: each is read with its members.
pub const LIST_SETS_MAX: u32 = 100;

pub(super) fn describe(group: &str, sequence: u64) -> String {
    format!("set {sequence} of group {group:?}")
}

pub(super) fn check_group(group: &str) -> Result<(), Error> {
    GroupName::new(group).map(|_| ()).map_err(invalid("group"))
}

fn check_vms(expected: u32) -> Result<(), Error> {
    if (1..=SET_VMS_MAX).contains(&expected) {
        return Ok(());
    }
    Err(Error::invalid(format!("a set has from 1 to {SET_VMS_MAX} VMs")))
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
    /// Makes a new set, with a number larger than that of any set of the group before.
    ///
    /// # Errors
    /// When the group's name or the number of VMs is bad, or the store cannot.
    pub async fn begin_set(&self, r: v1::BeginSetRequest) -> Result<v1::CheckpointSet, Error> {
        check_group(&r.group)?;
        check_vms(r.expected_vms)?;
        let object = format!("a new set of group {:?}", r.group);
        let set = until_won!(self, object, self.try_begin_set(&r).await)?;
        self.read_set(set).await
    }

    async fn try_begin_set(&self, r: &v1::BeginSetRequest) -> Result<SetRecord, Error> {
        let group = self.load::<GroupRecord>(GroupRecord::key_of(&r.group)).await?;
        // Whoever adds to a set that is not there chooses its number alone.
        let newest = self.page::<SetRecord>(&SetRecord::prefix_of(&r.group), None, 1).await?.0;
        let newest = newest.first().map_or(0, |set| set.value.sequence);
        let last = group.as_ref().map_or(0, |group| group.value.last_sequence).max(newest);
        let sequence = last.checked_add(1).ok_or_else(|| {
            let problem = "has no numbers left for sets; use another group";
            Error::precondition(format!("group {:?}", r.group), problem)
        })?;
        let set = SetRecord {
            group: r.group.clone(),
            sequence,
            expected_vms: r.expected_vms,
            created_unix_ms: self.now(),
            ..SetRecord::default()
        };
        let keep_sets = group.as_ref().map_or(0, |group| group.value.keep_sets);
        let next = GroupRecord { name: r.group.clone(), last_sequence: sequence, keep_sets };
        let swap = Swap::new().create(&set);
        let swap = match &group {
            Some(group) => swap.update(group, &next),
            None => swap.create(&next),
        };
        self.store.swap(swap).await?;
        Ok(set)
    }

    /// Adds members to a set, which is made when it is not there. A member that is there already,
    /// with the same snapshot, stays as it is.
    ///
    /// # Errors
    /// [`Error::Precondition`] when the set expects another number of VMs, has them all, was given
    /// up, or has another snapshot of the same disk; [`Error::NotFound`] when a member's image is not there.
    pub async fn add_to_set(&self, r: v1::AddToSetRequest) -> Result<v1::CheckpointSet, Error> {
        check_group(&r.group)?;
        check_vms(r.expected_vms)?;
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
        let set = until_won!(self, object(), self.set_or_new(&r).await)?.value;
        self.room_for(&set, by_vm.keys().copied()).await?;
        for (vm, members) in by_vm {
            until_won!(self, object(), self.try_add_vm(&r, vm, &members).await)?;
        }
        self.read_set(set).await
    }

    async fn set_or_new(&self, r: &v1::AddToSetRequest) -> Result<Held<SetRecord>, Error> {
        let key = SetRecord::key_of(&r.group, r.sequence);
        if let Some(set) = self.load::<SetRecord>(key).await? {
            if set.value.expected_vms != r.expected_vms {
                let problem =
                    format!("expects {} VMs, not {}", set.value.expected_vms, r.expected_vms);
                return Err(Error::precondition(describe(&r.group, r.sequence), problem));
            }
            if set.value.obsolete {
                let problem = "was given up; begin a new one";
                return Err(Error::precondition(describe(&r.group, r.sequence), problem));
            }
            return Ok(set);
        }
        let set = SetRecord {
            group: r.group.clone(),
            sequence: r.sequence,
            expected_vms: r.expected_vms,
            created_unix_ms: self.now(),
            ..SetRecord::default()
        };
        let mut swap = Swap::new().create(&set);
        if self.load::<GroupRecord>(GroupRecord::key_of(&r.group)).await?.is_none() {
            let last_sequence = r.sequence;
            swap = swap.create(&GroupRecord { name: r.group.clone(), last_sequence, keep_sets: 0 });
        }
        let version = self.store.swap(swap).await?;
        Ok(Held { value: set, version })
    }

    /// Refuses VMs that the set does not expect. VMs that come at the very same moment may still
    /// both get in; the set is complete all the same.
    async fn room_for<'a>(
        &self,
        set: &SetRecord,
        vms: impl Iterator<Item = &'a str>,
    ) -> Result<(), Error> {
        let mut all: BTreeSet<String> =
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
        r: &v1::AddToSetRequest,
        vm: &str,
        members: &[&v1::SetMember],
    ) -> Result<(), Error> {
        let set = &self.set_or_new(r).await?;
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
        if held.as_ref().is_some_and(|held| held.value == part) {
            return Ok(());
        }
        let there = held.as_ref().map_or(&[][..], |held| &held.value.disks);
        let new: Vec<&SetDisk> = part.disks.iter().filter(|disk| !there.contains(disk)).collect();
        let (first, last) = new.split_at(new.len().saturating_sub(PINS_PER_SWAP));
        for disks in first.chunks(PINS_PER_SWAP) {
            let swap = self.pin_members(&set.value, disks, Swap::new()).await?;
            self.store.swap(swap.unchanged(set)).await?;
        }
        let swap = self.pin_members(&set.value, last, Swap::new().unchanged(set)).await?;
        let swap = match &held {
            Some(held) => swap.update(held, &part),
            None => swap.create(&part),
        };
        self.store.swap(swap).await?;
        Ok(())
    }

    /// Pins snapshots for their set. They may be pending still, or not have begun.
    async fn pin_members(
        &self,
        set: &SetRecord,
        disks: &[&SetDisk],
        mut swap: Swap,
    ) -> Result<Swap, Error> {
        let mut images = BTreeSet::new();
        for disk in disks {
            let key = PinRecord::key_of(disk.image_id, disk.number, &set.holder());
            if self.load::<PinRecord>(key).await?.is_some() {
                continue;
            }
            if images.insert(disk.image_id) {
                let by_id = super::snapshots::id_ref(disk.image_id);
                let image = self.image_record(&by_id).await?;
                // As any pin is made: a removal that runs at the same time is lost, or wins.
                swap = swap.update(&image, &image.value);
            }
            swap = swap.create(&PinRecord {
                image_id: disk.image_id,
                number: disk.number,
                holder: set.holder(),
                image: disk.image.clone(),
                created_unix_ms: self.now(),
            });
        }
        Ok(swap)
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

    pub(super) async fn vms_of(&self, set: &SetRecord) -> Result<Vec<SetVmRecord>, Error> {
        let prefix = SetVmRecord::prefix_of(&set.group, set.sequence);
        let vms = self.all::<SetVmRecord>(&prefix).await?;
        Ok(vms.into_iter().map(|vm| vm.value).collect())
    }

    /// A set with its members, and what follows from their snapshots.
    pub(super) async fn read_set(&self, set: SetRecord) -> Result<v1::CheckpointSet, Error> {
        let vms = self.vms_of(&set).await?;
        let complete = vms.len() >= set.expected_vms as usize;
        let mut worst = if vms.is_empty() { SetState::Pending } else { SetState::Stable };
        let mut members = Vec::new();
        for vm in vms {
            for disk in vm.disks {
                // What is known to have failed needs no further look.
                if worst != SetState::Failed {
                    worst = worse(worst, self.state_of(&disk).await?);
                }
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
            stable: worst == SetState::Stable,
            state: match worst {
                _ if set.obsolete => SetState::Obsolete,
                SetState::Failed => SetState::Failed,
                _ if !complete => SetState::Incomplete,
                state => state,
            }
            .into(),
            pins: set.holders,
        })
    }

    /// What a member's snapshot makes of its set.
    async fn state_of(&self, disk: &SetDisk) -> Result<SetState, Error> {
        let key = SnapshotRecord::key_of(disk.image_id, disk.number);
        // It may not have begun when it is named.
        let Some(snapshot) = self.load::<SnapshotRecord>(key).await? else {
            return Ok(SetState::Pending);
        };
        Ok(match snapshot.value.state() {
            SnapshotState::Stable => SetState::Stable,
            SnapshotState::Pending | SnapshotState::Unspecified => SetState::Pending,
            SnapshotState::Failed | SnapshotState::Obsolete => SetState::Failed,
        })
    }

    /// One set.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is not there.
    pub async fn get_set(&self, r: v1::GetSetRequest) -> Result<v1::CheckpointSet, Error> {
        check_group(&r.group)?;
        let set = self.set_record(&r.group, r.sequence).await?;
        self.read_set(set.value).await
    }

    pub(super) async fn set_record(
        &self,
        group: &str,
        sequence: u64,
    ) -> Result<Held<SetRecord>, Error> {
        let set = self.load::<SetRecord>(SetRecord::key_of(group, sequence)).await?;
        let advice = "`blobcr set list` shows what there is";
        set.ok_or_else(|| Error::not_found(describe(group, sequence), advice))
    }

    /// The newest sets of a group, newest first.
    ///
    /// # Errors
    /// When the group's name is bad or the store cannot tell.
    pub async fn list_sets(&self, r: v1::ListSetsRequest) -> Result<v1::ListSetsResponse, Error> {
        check_group(&r.group)?;
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
        check_group(&r.group)?;
        let prefix = SetRecord::prefix_of(&r.group);
        let mut after = None;
        loop {
            let (found, more) =
                self.page::<SetRecord>(&prefix, after.as_ref(), PAGE_ENTRIES_MAX).await?;
            after = found.last().map(|set| set.value.key());
            for set in found {
                let set = self.read_set(set.value).await?;
                if set.state() == SetState::Stable {
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

/// The state of a set of which one part is in one state and the rest in another.
fn worse(a: SetState, b: SetState) -> SetState {
    let rank = |state| match state {
        SetState::Stable => 0,
        SetState::Pending => 1,
        _ => 2,
    };
    if rank(a) < rank(b) { b } else { a }
}
