//! Which checkpoint sets are kept, and what becomes of the others.
//!
//! A set is given up in steps, each of which may be the last one that this process does: first the
//! set's record says so, and from then on nobody joins it or restarts from it; then, VM by VM, what
//! it kept is let go; then its record goes. [`VersionManager::retire_sets`] takes up what is left
//! of an earlier time.

use std::collections::VecDeque;

use blobcr_proto::v1;
use blobcr_proto::v1::SetState;

use super::sets::{check_group, describe};
use super::{Held, RecordSwap, VersionManager, list_limit, until_won};
use crate::error::Error;
use crate::records::{
    GroupRecord, KeyKind, PinRecord, Record, SET_HOLDER_PREFIX, SET_HOLDERS_MAX, SetDisk,
    SetRecord, SetVmRecord, check_holder, prefix_of,
};
use crate::store::{PAGE_ENTRIES_MAX, Swap};

/// Sets that one call gives up at most, so that it ends in reasonable time; the rest is for the
/// next call.
pub const RETIRE_SETS_MAX: usize = 100;

impl VersionManager {
    /// Keeps a complete and stable set until it is unpinned. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`Error::Precondition`] when the set is not stable or has too many holders.
    pub async fn pin_set(&self, r: v1::PinSetRequest) -> Result<v1::CheckpointSet, Error> {
        check_group(&r.group)?;
        check_holder(&r.holder).map_err(Error::invalid)?;
        let object = describe(&r.group, r.sequence);
        until_won!(self, object, self.try_pin_set(&r).await)
    }

    async fn try_pin_set(&self, r: &v1::PinSetRequest) -> Result<v1::CheckpointSet, Error> {
        let held = self.set_record(&r.group, r.sequence).await?;
        let set = self.read_set(held.value.clone()).await?;
        let Err(at) = held.value.holders.binary_search(&r.holder) else { return Ok(set) };
        let object = || describe(&r.group, r.sequence);
        if set.state() != SetState::Stable {
            let problem = "is not complete and stable; only such a set can be pinned";
            return Err(Error::precondition(object(), problem));
        }
        if held.value.holders.len() >= SET_HOLDERS_MAX {
            let problem = format!("has {SET_HOLDERS_MAX} pins; take one away");
            return Err(Error::precondition(object(), problem));
        }
        let mut pinned = held.value.clone();
        pinned.holders.insert(at, r.holder.clone());
        self.store.swap(Swap::new().update(&held, &pinned)).await?;
        Ok(v1::CheckpointSet { pins: pinned.holders, ..set })
    }

    /// Takes a pin of a set away. Nothing happens when there is none.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such set.
    pub async fn unpin_set(&self, r: v1::PinSetRequest) -> Result<v1::CheckpointSet, Error> {
        check_group(&r.group)?;
        let object = describe(&r.group, r.sequence);
        let set = until_won!(self, object, self.try_unpin_set(&r).await)?;
        self.read_set(set).await
    }

    async fn try_unpin_set(&self, r: &v1::PinSetRequest) -> Result<SetRecord, Error> {
        let held = self.set_record(&r.group, r.sequence).await?;
        let mut set = held.value.clone();
        set.holders.retain(|holder| *holder != r.holder);
        if set != held.value {
            self.store.swap(Swap::new().update(&held, &set)).await?;
        }
        Ok(set)
    }

    /// How many of the newest complete and stable sets of a group are kept from now on; 0: all.
    ///
    /// # Errors
    /// When the group's name is bad or the store cannot.
    pub async fn keep_sets(&self, r: v1::KeepSetsRequest) -> Result<v1::Group, Error> {
        check_group(&r.group)?;
        let object = format!("group {:?}", r.group);
        until_won!(self, object, self.try_keep_sets(&r).await)
    }

    async fn try_keep_sets(&self, r: &v1::KeepSetsRequest) -> Result<v1::Group, Error> {
        let held = self.load::<GroupRecord>(GroupRecord::key_of(&r.group)).await?;
        let last_sequence = held.as_ref().map_or(0, |held| held.value.last_sequence);
        let group = GroupRecord { name: r.group.clone(), last_sequence, keep_sets: r.keep_sets };
        let swap = match &held {
            Some(held) if held.value == group => return Ok(group.to_wire()),
            Some(held) => Swap::new().update(held, &group),
            None => Swap::new().create(&group),
        };
        self.store.swap(swap).await?;
        Ok(group.to_wire())
    }

    /// Groups in order of name.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_groups(
        &self,
        r: v1::ListGroupsRequest,
    ) -> Result<v1::ListGroupsResponse, Error> {
        let after = (!r.after.is_empty()).then(|| GroupRecord::key_of(&r.after));
        let prefix = prefix_of(KeyKind::Group);
        let (groups, more) =
            self.page::<GroupRecord>(&prefix, after.as_ref(), list_limit(r.limit)).await?;
        let groups = groups.iter().map(|group| group.value.to_wire()).collect();
        Ok(v1::ListGroupsResponse { groups, more })
    }

    /// Gives up the sets that are older than those to keep and that nobody has pinned, with the
    /// snapshots that nothing else needs. A set that is newer than the oldest one to keep stays,
    /// whatever its state: it may become complete yet.
    ///
    /// # Errors
    /// When the group's name is bad or the store cannot; what was not done is left to another call.
    pub async fn retire_sets(
        &self,
        r: v1::RetireSetsRequest,
    ) -> Result<v1::RetireSetsResponse, Error> {
        check_group(&r.group)?;
        let keep = match r.keep_sets {
            0 => {
                let group = self.load::<GroupRecord>(GroupRecord::key_of(&r.group)).await?;
                group.map_or(0, |group| group.value.keep_sets)
            }
            keep => keep,
        };
        let mut done = v1::RetireSetsResponse::default();
        // Oldest first: the latest snapshot of an image goes when it is all that is left.
        for (set, wire) in self.sets_to_retire(&r.group, keep).await?.into_iter().rev() {
            if r.dry_run {
                done.sets.push(wire);
                continue;
            }
            let object = || describe(&r.group, set.sequence);
            if !until_won!(self, object(), self.try_give_up(set.sequence, &r.group).await)? {
                continue;
            }
            done.snapshots_removed += self.let_go(&set).await?;
            done.sets.push(v1::CheckpointSet { state: SetState::Obsolete.into(), ..wire });
        }
        done.sets.reverse();
        if !done.sets.is_empty() && !r.dry_run {
            self.sweep_pins(&r.group).await?;
        }
        Ok(done)
    }

    /// Those that an earlier call has not finished, and those to give up now, newest first; when there
    /// are too many for one call, the oldest.
    async fn sets_to_retire(
        &self,
        group: &str,
        keep: u32,
    ) -> Result<VecDeque<(SetRecord, v1::CheckpointSet)>, Error> {
        let prefix = SetRecord::prefix_of(group);
        let (mut kept, mut after, mut retired) = (0, None, VecDeque::new());
        loop {
            let (found, more) =
                self.page::<SetRecord>(&prefix, after.as_ref(), PAGE_ENTRIES_MAX).await?;
            after = found.last().map(|set| set.value.key());
            for set in found {
                let set = set.value;
                let wire = self.read_set(set.clone()).await?;
                let goes = set.obsolete || (keep > 0 && kept >= keep && set.holders.is_empty());
                if goes {
                    retired.push_back((set, wire));
                } else if wire.state() == SetState::Stable {
                    kept += 1;
                }
                if retired.len() > RETIRE_SETS_MAX {
                    retired.pop_front();
                }
            }
            if !more {
                return Ok(retired);
            }
        }
    }

    /// Has the set say that it is given up; false when it was pinned, or is gone.
    async fn try_give_up(&self, sequence: u64, group: &str) -> Result<bool, Error> {
        let key = SetRecord::key_of(group, sequence);
        let Some(held) = self.load::<SetRecord>(key).await? else { return Ok(false) };
        if held.value.obsolete {
            return Ok(true);
        }
        if !held.value.holders.is_empty() {
            return Ok(false);
        }
        let obsolete = SetRecord { obsolete: true, ..held.value.clone() };
        self.store.swap(Swap::new().update(&held, &obsolete)).await?;
        Ok(true)
    }

    /// Lets go what an obsolete set kept. Returns how many snapshots were removed.
    async fn let_go(&self, set: &SetRecord) -> Result<u64, Error> {
        let object = || describe(&set.group, set.sequence);
        let mut removed = 0;
        for vm in self.vms_of(set).await? {
            for disk in &vm.disks {
                let pin = PinRecord::key_of(disk.image_id, disk.number, &set.holder());
                until_won!(self, object(), self.try_unpin(&pin).await)?;
                removed += u64::from(self.remove_member(disk).await?);
            }
            let key = SetVmRecord::key_of(&vm.group, vm.sequence, &vm.vm);
            until_won!(self, object(), self.try_drop::<SetVmRecord>(key.clone()).await)?;
        }
        let key = SetRecord::key_of(&set.group, set.sequence);
        until_won!(self, object(), self.try_drop::<SetRecord>(key.clone()).await)?;
        Ok(removed)
    }

    /// Removes a snapshot, unless something else needs it. A restart goes on in images of its own: the
    /// latest snapshot of an image that was left behind goes with the image.
    async fn remove_member(&self, disk: &SetDisk) -> Result<bool, Error> {
        let image = Some(super::snapshots::id_ref(disk.image_id));
        match self.remove_snapshot(v1::SnapshotRef { image, number: disk.number }).await {
            Ok(_) => Ok(true),
            // The latest of its image, pending or pinned.
            Err(Error::Precondition { .. }) => {
                self.remove_left_behind(disk.image_id, disk.number).await
            }
            // It is gone with its image.
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn try_drop<R: Record>(&self, key: crate::store::Key) -> Result<(), Error> {
        if let Some(held) = self.load::<R>(key).await? {
            self.store.swap(Swap::new().remove(&held)).await?;
        }
        Ok(())
    }

    /// Takes away the pins of VMs that died before their set named them, once the set is gone.
    async fn sweep_pins(&self, group: &str) -> Result<(), Error> {
        let of_group = format!("{SET_HOLDER_PREFIX}{group}/");
        let mut after = None;
        loop {
            let prefix = prefix_of(KeyKind::Pin);
            let (pins, more): (Vec<Held<PinRecord>>, bool) =
                self.page(&prefix, after.as_ref(), PAGE_ENTRIES_MAX).await?;
            after = pins.last().map(|pin| pin.value.key());
            for pin in pins {
                let sequence = pin.value.holder.strip_prefix(&of_group);
                let Some(Ok(sequence)) = sequence.map(str::parse) else { continue };
                if self.load::<SetRecord>(SetRecord::key_of(group, sequence)).await?.is_none() {
                    let object = describe(group, sequence);
                    until_won!(self, object, self.try_unpin(&pin.value.key()).await)?;
                }
            }
            if !more {
                return Ok(());
            }
        }
    }
}
