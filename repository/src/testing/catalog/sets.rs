//! Checkpoint sets.

use std::collections::BTreeSet;

use blobcr_proto::v1::{self, SetState, SnapshotState};

use super::images::Images;
use super::{Answer, ById, invalid, not_found, page, precondition, unix_ms};

/// A member, and the id of its image: the name may go to another image later.
#[derive(Debug, Clone)]
struct Member {
    wire: v1::SetMember,
    image_id: u64,
}

#[derive(Debug)]
struct Set {
    wire: v1::CheckpointSet,
    members: Vec<Member>,
}

impl Set {
    fn vms(&self) -> BTreeSet<&str> {
        self.members.iter().map(|member| member.wire.vm.as_str()).collect()
    }

    fn read(&self, images: &Images) -> v1::CheckpointSet {
        let stable = |member: &Member| {
            let snapshots = images.by_id.get(&member.image_id).map(|record| &record.snapshots);
            let found = snapshots.and_then(|snapshots| snapshots.get(&member.wire.number));
            found.is_some_and(|found| found.wire.state() == SnapshotState::Stable)
        };
        let complete = self.vms().len() >= self.wire.expected_vms as usize;
        let stable = !self.members.is_empty() && self.members.iter().all(stable);
        let state = match (complete, stable) {
            (false, _) => SetState::Incomplete,
            (true, false) => SetState::Pending,
            (true, true) => SetState::Stable,
        };
        v1::CheckpointSet {
            members: self.members.iter().map(|member| member.wire.clone()).collect(),
            complete,
            stable,
            state: state.into(),
            ..self.wire.clone()
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Sets(ById<(String, u64), Set>);

impl Sets {
    pub(super) fn add(
        &mut self,
        r: v1::AddToSetRequest,
        images: &mut Images,
    ) -> Answer<v1::CheckpointSet> {
        blobcr_proto::name::GroupName::new(r.group.as_str()).map_err(invalid)?;
        if r.expected_vms == 0 {
            return Err(invalid("a set has at least one VM"));
        }
        let holder = format!("set {}/{}", r.group, r.sequence);
        let set = self.0.entry((r.group.clone(), r.sequence)).or_insert_with(|| Set {
            wire: v1::CheckpointSet {
                group: r.group,
                sequence: r.sequence,
                expected_vms: r.expected_vms,
                created_unix_ms: unix_ms(),
                ..v1::CheckpointSet::default()
            },
            members: Vec::new(),
        });
        if set.wire.expected_vms != r.expected_vms {
            return precondition(format!("the set expects {} VMs", set.wire.expected_vms));
        }
        let mut vms = set.vms();
        vms.extend(r.members.iter().map(|member| member.vm.as_str()));
        if vms.len() > r.expected_vms as usize {
            return precondition(format!("{} VMs in a set of {}", vms.len(), r.expected_vms));
        }
        for wire in r.members {
            let same = |m: &&Member| (&m.wire.vm, &m.wire.disk) == (&wire.vm, &wire.disk);
            match set.members.iter().find(same) {
                Some(there) if there.wire == wire => {}
                Some(_) => {
                    let text = format!("the set has another snapshot of disk {}", wire.disk);
                    return precondition(text);
                }
                None => {
                    let by_name = v1::ImageRef { name: wire.image.clone(), id: 0 };
                    let image_id = images.id_of(&by_name)?;
                    images.pin_member(image_id, &wire, &holder);
                    set.members.push(Member { wire, image_id });
                }
            }
        }
        set.members.sort_by(|a, b| (&a.wire.vm, &a.wire.disk).cmp(&(&b.wire.vm, &b.wire.disk)));
        Ok(set.read(images))
    }

    pub(super) fn begin(
        &mut self,
        r: v1::BeginSetRequest,
        images: &mut Images,
    ) -> Answer<v1::CheckpointSet> {
        let sequence = self.of_group(&r.group).next().map_or(0, |set| set.wire.sequence) + 1;
        let v1::BeginSetRequest { group, expected_vms } = r;
        let none = v1::AddToSetRequest { group, sequence, expected_vms, members: Vec::new() };
        self.add(none, images)
    }

    pub(super) fn get(&self, r: &v1::GetSetRequest, images: &Images) -> Answer<v1::CheckpointSet> {
        match self.0.get(&(r.group.clone(), r.sequence)) {
            Some(set) => Ok(set.read(images)),
            None => not_found(format!("no set {} of group {:?}", r.sequence, r.group)),
        }
    }

    /// Newest first.
    fn of_group<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a Set> {
        self.0.values().rev().filter(move |set| set.wire.group == group)
    }

    pub(super) fn list(
        &self,
        r: &v1::ListSetsRequest,
        images: &Images,
    ) -> Answer<v1::ListSetsResponse> {
        let (sets, _) = page(self.of_group(&r.group).map(|set| set.read(images)), r.limit);
        Ok(v1::ListSetsResponse { sets })
    }

    pub(super) fn latest(
        &self,
        r: &v1::LatestSetRequest,
        images: &Images,
    ) -> Answer<v1::CheckpointSet> {
        let mut sets = self.of_group(&r.group).map(|set| set.read(images));
        match sets.find(|set| set.complete && set.stable) {
            Some(set) => Ok(set),
            None => not_found(format!("no complete and stable set of group {:?}", r.group)),
        }
    }
}

/// This catalog has no retention.
pub(super) fn keeps_all<T>() -> Answer<T> {
    precondition("the catalog in memory keeps every set".to_owned())
}
