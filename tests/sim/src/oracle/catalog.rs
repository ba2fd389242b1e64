//! What swaps of the metadata store must not do.

use std::sync::Arc;

use blobcr_metadata::records::{
    ImageRecord, KeyKind, LeaseRecord, PoolRecord, Record, SnapshotRecord, decode,
};
use blobcr_metadata::store::{Action, Op, Swap};
use blobcr_proto::v1::SnapshotState;

use super::{Oracle, Stable, State, tree};
use crate::trace::Trace;

impl Oracle {
    /// A swap has happened.
    pub fn swapped(&self, swap: &Swap) {
        let mut state = self.state();
        for op in swap.ops() {
            state.changed(op);
        }
        for op in swap.ops() {
            if let Some(snapshot) = record::<SnapshotRecord>(op) {
                state.snapshot(&self.trace, &snapshot);
            }
        }
        for op in swap.ops() {
            if let Some(image) = record::<ImageRecord>(op) {
                state.image(&self.trace, &image);
            }
        }
    }
}

/// The record that an operation writes, if it is one of that kind.
fn record<R: Record>(op: &Op) -> Option<R> {
    let Action::Put(value) = &op.action else { return None };
    let of_kind = op.key.as_slice().first() == Some(&(R::KIND as u8));
    if of_kind { decode(&op.key, value).ok() } else { None }
}

impl State {
    fn changed(&mut self, op: &Op) {
        if let Some(image) = record::<ImageRecord>(op) {
            self.images.insert(image.id, image.pool);
        } else if let Some(pool) = record::<PoolRecord>(op) {
            if let Ok(policy) = pool.policy.parse() {
                self.pools.insert(pool.id, policy);
            }
        } else if let Some(lease) = record::<LeaseRecord>(op) {
            self.leases.insert(lease.id, lease.generation);
        }
        let key = op.key.as_slice();
        if op.action == Action::Delete && key.first() == Some(&(KeyKind::Lease as u8)) {
            let id = key.get(1..9).and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
            id.and_then(|id| self.leases.remove(&id));
        }
    }

    fn snapshot(&mut self, trace: &Trace, snapshot: &SnapshotRecord) {
        let at = (snapshot.image_id, snapshot.number);
        trace.note(format_args!("{}@{} is {:?}", at.0, at.1, snapshot.state()));
        if snapshot.state() != SnapshotState::Stable {
            self.stable.remove(&at);
            return;
        }
        if self.stable.contains_key(&at) {
            return;
        }
        self.published += 1;
        if let Err(what) = self.publish(snapshot) {
            self.violation(trace, format!("{}@{} was published, but {what}", at.0, at.1));
        }
    }

    /// A snapshot has become stable: everything of it must be durable.
    fn publish(&mut self, snapshot: &SnapshotRecord) -> Result<(), String> {
        let SnapshotRecord { image_id: image, number, root, .. } = snapshot;
        let root = root.clone().unwrap_or_default();
        let content = self.roots.get(&tree::name(&root)).cloned();
        let content = content.ok_or("nobody has made its tree")?;
        let pool = self.images.get(image).copied().unwrap_or_default();
        let reaches = Arc::new(tree::reach(&self.tree_nodes, &root)?);
        let stable =
            Stable { image: *image, number: *number, pool, content, reaches: Arc::clone(&reaches) };
        self.stable.insert((*image, *number), stable);
        // What it shares with its base may have lost what a disk that lied has lost.
        let lost = self.nodes.values().filter(|facts| facts.tainted).count();
        for (kind, id) in reaches.iter() {
            let copies = self.copies(pool, (*kind, *id));
            let least = self.policy(pool, *kind).write_least().saturating_sub(lost);
            if copies < least {
                return Err(format!("{copies} nodes hold its {kind:?} {id}, not {least}"));
            }
        }
        Ok(())
    }

    fn image(&mut self, trace: &Trace, image: &ImageRecord) {
        let before = self.latest.insert(image.id, image.latest).unwrap_or_default();
        if image.latest < before {
            let what = format!("latest of {} went from {before} to {}", image.id, image.latest);
            self.violation(trace, what);
        }
        if image.latest > before && !self.stable.contains_key(&(image.id, image.latest)) {
            let what = format!("latest of {} is {}, which is not stable", image.id, image.latest);
            self.violation(trace, what);
        }
    }
}
