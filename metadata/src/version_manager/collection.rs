//! What the collector must spare.
//!
//! Generations are the collector's clock: every lease has a higher one than all before it. The
//! *bound* is the oldest generation that a writer may still be storing under. A snapshot that
//! becomes obsolete is marked with the newest generation at that moment, by a swap that fails when
//! another lease is given meanwhile. So a collector which takes a lease before it asks for the bound
//! can tell what was a live root at any moment since: snapshots that are stable, and those that were
//! marked with the bound or later. Whatever order clones are made and their sources removed in while
//! it lists, it sees one of the two, because records of snapshots never go.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use super::{RecordSwap, VersionManager, list_limit};
use crate::error::Error;
use crate::records::{Counter, CounterRecord, ImageRecord, KeyKind, SnapshotRecord, prefix_of};
use crate::store::{Expect, Swap};

impl VersionManager {
    /// The generation from which on what was touched may be in use: that of the oldest lease that
    /// has not ended, whether it ran out or not, or else that of the next lease.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn get_collection_bound(
        &self,
        _: v1::CollectionBoundRequest,
    ) -> Result<v1::CollectionBound, Error> {
        // The counter first: a lease that the list does not show because it is given later has a
        // higher generation than this.
        let next = self.newest_generation(Swap::new()).await?.0 + 1;
        let oldest = self.oldest_generation().await?.unwrap_or(next);
        Ok(v1::CollectionBound { generation: oldest.min(next) })
    }

    /// The generation of the newest lease, and a swap that fails once there is a newer one.
    pub(super) async fn newest_generation(&self, swap: Swap) -> Result<(u64, Swap), Error> {
        let key = CounterRecord::key_of(Counter::Generation);
        Ok(match self.load::<CounterRecord>(key.clone()).await? {
            Some(held) => (held.value.given, swap.unchanged(&held)),
            None => (0, swap.keep(key, Expect::Absent)),
        })
    }

    /// The snapshots whose trees must be kept, in order of image id and number.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_roots(
        &self,
        r: v1::ListRootsRequest,
    ) -> Result<v1::ListRootsResponse, Error> {
        let after = r.after.map(|after| SnapshotRecord::key_of(after.image_id, after.number));
        let prefix = prefix_of(KeyKind::Snapshot);
        let (snapshots, more) =
            self.page::<SnapshotRecord>(&prefix, after.as_ref(), list_limit(r.limit)).await?;
        let last = snapshots.last().filter(|_| more);
        let next = last
            .map(|last| v1::RootPlace { image_id: last.value.image_id, number: last.value.number });
        let mut images: HashMap<u64, (String, u32)> = HashMap::new();
        let mut roots = Vec::new();
        for snapshot in snapshots {
            let SnapshotRecord { image_id, number, .. } = snapshot.value;
            let live = match snapshot.value.state() {
                SnapshotState::Stable => true,
                SnapshotState::Obsolete => snapshot.value.obsolete_generation >= r.since_generation,
                _ => false,
            };
            let Some(root) = snapshot.value.root.filter(|_| live) else { continue };
            let (image, pool) = match images.entry(image_id) {
                Entry::Occupied(known) => known.get().clone(),
                Entry::Vacant(unknown) => {
                    let image = self.load::<ImageRecord>(ImageRecord::key_of(image_id)).await?;
                    let lost = || Error::not_found(format!("image with the id {image_id}"), LOST);
                    let image = image.ok_or_else(lost)?.value;
                    unknown.insert((image.name, image.pool)).clone()
                }
            };
            roots.push(v1::LiveRoot { image_id, image, number, pool, root: Some(root) });
        }
        Ok(v1::ListRootsResponse { roots, next })
    }
}

const LOST: &str = "restore the metadata store from a copy: a snapshot of it is there";
