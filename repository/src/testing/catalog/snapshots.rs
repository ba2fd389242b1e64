//! Snapshots.

use blobcr_proto::v1::{self, SnapshotState};

use super::images::{ImageRecord, Images};
use super::leases::Leases;
use super::{Answer, invalid, not_found, page, precondition, unix_ms};
use crate::tree::Root;

#[derive(Debug)]
pub(super) struct SnapshotRecord {
    pub(super) wire: v1::Snapshot,
    /// Who began it, and under which lease.
    pub(super) writer: String,
    pub(super) lease_id: u64,
    /// The newest generation when it became obsolete.
    pub(super) obsolete_generation: u64,
}

impl SnapshotRecord {
    fn name(&self) -> String {
        format!("{}@{}", self.wire.image, self.wire.number)
    }

    pub(super) fn obsolete(&mut self, generation: u64) {
        if self.wire.state() != SnapshotState::Obsolete {
            self.wire.set_state(SnapshotState::Obsolete);
            self.obsolete_generation = generation;
        }
    }

    fn is_live(&self, since_generation: u64) -> bool {
        match self.wire.state() {
            SnapshotState::Stable => true,
            SnapshotState::Obsolete => {
                self.wire.root.is_some() && self.obsolete_generation >= since_generation
            }
            _ => false,
        }
    }

    fn fail(&mut self, reason: &str) {
        self.wire.set_state(SnapshotState::Failed);
        reason.clone_into(&mut self.wire.reason);
    }
}

fn owns(record: &ImageRecord, writer: &str) -> Answer<()> {
    if record.removed {
        return not_found(format!("no image with id {}", record.image.id));
    }
    if record.image.writer.is_empty() || record.image.writer == writer {
        return Ok(());
    }
    precondition(format!("{} belongs to another writer; clone it", record.image.name))
}

fn snapshot_of(record: &mut ImageRecord, number: u64) -> Answer<&mut SnapshotRecord> {
    let name = format!("{}@{number}", record.image.name);
    match record.snapshots.get_mut(&number) {
        Some(snapshot) => Ok(snapshot),
        None => not_found(format!("no snapshot {name}")),
    }
}

impl Images {
    pub(super) fn begin(
        &mut self,
        r: &v1::BeginSnapshotRequest,
        leases: &Leases,
    ) -> Answer<v1::Snapshot> {
        let record = self.record_mut(r.image_id)?;
        owns(record, &r.writer)?;
        leases.check_live(r.lease_id)?;
        let highest = record.image.highest_number;
        if r.number != 0 && r.number <= highest {
            return adopt(record, r);
        }
        let number = if r.number == 0 { highest + 1 } else { r.number };
        record.image.highest_number = number;
        let wire = v1::Snapshot {
            image_id: record.image.id,
            image: record.image.name.clone(),
            number,
            state: SnapshotState::Pending.into(),
            created_unix_ms: unix_ms(),
            ..v1::Snapshot::default()
        };
        let (writer, lease_id) = (r.writer.clone(), r.lease_id);
        let begun = SnapshotRecord { wire: wire.clone(), writer, lease_id, obsolete_generation: 0 };
        record.snapshots.insert(number, begun);
        Ok(wire)
    }

    pub(super) fn publish(
        &mut self,
        r: v1::PublishSnapshotRequest,
        leases: &Leases,
    ) -> Answer<v1::Snapshot> {
        let root = r.root.ok_or_else(|| invalid("a snapshot needs a root"))?;
        Root::try_from(&root).map_err(invalid)?;
        let record = self.record_mut(r.image_id)?;
        let chunk_size = record.image.chunk_size;
        let owned = owns(record, &r.writer);
        if record.removed {
            return not_found(format!("no image with id {}", r.image_id));
        }
        let snapshot = snapshot_of(record, r.number)?;
        match snapshot.wire.state() {
            SnapshotState::Pending => {}
            SnapshotState::Stable if snapshot.wire.root.as_ref() == Some(&root) => {
                return Ok(snapshot.wire.clone());
            }
            state => return precondition(format!("{} is {state:?}", snapshot.name())),
        }
        owned?;
        if snapshot.writer != r.writer {
            return precondition(format!("{} was begun by another writer", snapshot.name()));
        }
        if root.chunk_size != chunk_size {
            return Err(invalid(format!("{} has other chunks", snapshot.name())));
        }
        leases.check_live(r.lease_id)?;
        snapshot.wire.set_state(SnapshotState::Stable);
        snapshot.wire.root = Some(root);
        snapshot.wire.stats = r.stats;
        snapshot.wire.stable_unix_ms = unix_ms();
        let wire = snapshot.wire.clone();
        record.image.latest = record.image.latest.max(r.number);
        Ok(wire)
    }

    pub(super) fn fail(
        &mut self,
        r: v1::FailSnapshotRequest,
        leases: &Leases,
    ) -> Answer<v1::Snapshot> {
        let snapshot = snapshot_of(self.record_mut(r.image_id)?, r.number)?;
        match snapshot.wire.state() {
            SnapshotState::Failed | SnapshotState::Obsolete => {}
            SnapshotState::Pending => {
                if snapshot.writer != r.writer && leases.check_live(snapshot.lease_id).is_ok() {
                    let name = snapshot.name();
                    return precondition(format!("{name} is being written by another writer"));
                }
                snapshot.fail(&r.reason);
            }
            state => return precondition(format!("{} is {state:?}", snapshot.name())),
        }
        Ok(snapshot.wire.clone())
    }

    /// What was begun under a lease fails when it ends.
    pub(super) fn lease_ended(&mut self, lease_id: u64, reason: &str) {
        let all = self.by_id.values_mut().flat_map(|record| record.snapshots.values_mut());
        for snapshot in all {
            let pending = snapshot.wire.state() == SnapshotState::Pending;
            if pending && snapshot.lease_id == lease_id {
                snapshot.fail(reason);
            }
        }
    }

    pub(super) fn snapshot(&self, wanted: &v1::SnapshotRef) -> Answer<v1::Snapshot> {
        let record = self.record(&wanted.image.clone().unwrap_or_default())?;
        let number = if wanted.number == 0 { record.image.latest } else { wanted.number };
        match record.snapshots.get(&number) {
            Some(snapshot) => Ok(snapshot.wire.clone()),
            None if wanted.number == 0 => {
                not_found(format!("{} has no stable snapshot yet", record.image.name))
            }
            None => not_found(format!("no snapshot {}@{number}", record.image.name)),
        }
    }

    pub(super) fn list_snapshots(
        &self,
        r: &v1::ListSnapshotsRequest,
    ) -> Answer<v1::ListSnapshotsResponse> {
        let record = self.record(&r.image.clone().unwrap_or_default())?;
        let later = record.snapshots.range(r.after_number.saturating_add(1)..);
        let (snapshots, more) = page(later.map(|(_, snapshot)| snapshot.wire.clone()), r.limit);
        Ok(v1::ListSnapshotsResponse { snapshots, more })
    }

    pub(super) fn list_roots(&self, r: &v1::ListRootsRequest) -> v1::ListRootsResponse {
        let after = r.after.map_or((0, 0), |after| (after.image_id, after.number));
        let live = self.by_id.values().flat_map(|record| {
            record.snapshots.values().map(|snapshot| v1::LiveRoot {
                image_id: record.image.id,
                image: record.image.name.clone(),
                number: snapshot.wire.number,
                pool: record.image.pool,
                root: snapshot.wire.root.clone().filter(|_| snapshot.is_live(r.since_generation)),
            })
        });
        let live = live.filter(|root| root.root.is_some());
        let (roots, more) = page(live.filter(|at| (at.image_id, at.number) > after), r.limit);
        let place =
            |root: &v1::LiveRoot| v1::RootPlace { image_id: root.image_id, number: root.number };
        let next = roots.last().filter(|_| more).map(place);
        v1::ListRootsResponse { roots, next }
    }

    pub(super) fn remove_snapshot(
        &mut self,
        wanted: &v1::SnapshotRef,
        generation: u64,
    ) -> Answer<v1::Snapshot> {
        let found = self.snapshot(wanted)?;
        self.check_unpinned(|id, number| (id, number) == (found.image_id, found.number))?;
        let record = self.record_mut(found.image_id)?;
        let latest = record.image.latest;
        let snapshot = snapshot_of(record, found.number)?;
        if found.number == latest {
            return precondition(format!("{} is the latest of its image", snapshot.name()));
        }
        if found.state() == SnapshotState::Pending {
            return precondition(format!("{} is being persisted", snapshot.name()));
        }
        snapshot.obsolete(generation);
        let removed = snapshot.wire.clone();
        self.traces.remove(&(removed.image_id, removed.number));
        Ok(removed)
    }
}

/// Hands a pending snapshot to its (named) writer again, under the new lease.
fn adopt(record: &mut ImageRecord, r: &v1::BeginSnapshotRequest) -> Answer<v1::Snapshot> {
    let name = format!("{}@{}", record.image.name, r.number);
    match record.snapshots.get_mut(&r.number) {
        Some(snapshot)
            if !r.writer.is_empty()
                && snapshot.writer == r.writer
                && snapshot.wire.state() == SnapshotState::Pending =>
        {
            snapshot.lease_id = r.lease_id;
            Ok(snapshot.wire.clone())
        }
        _ => precondition(format!("{name} was begun before; take a higher number")),
    }
}
