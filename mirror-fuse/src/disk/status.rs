//! What a disk tells about itself.

use std::sync::atomic::Ordering;

use blobcr_proto::SECTOR_SIZE;
use blobcr_proto::v1::{self, SnapshotState};

use super::shared::Shared;
use super::{DiskError, Settled, UpstreamError};

impl Shared {
    pub(super) fn status(&self) -> v1::Disk {
        let generation = self.generation.load();
        let facts = generation.epochs.facts();
        let mut aside_bytes = 0;
        generation.stripes.each(|stripe| {
            let copies = stripe.asides.values().flatten();
            aside_bytes += copies.map(|aside| aside.memory_bytes()).sum::<u64>();
        });
        let sectors = generation.local_sectors.load(Ordering::Relaxed);
        v1::Disk {
            name: self.disk().to_owned(),
            image: self.spec.source.image.clone(),
            snapshot: self.spec.source.number,
            checkpoint_image: self.checkpoint.get().map(|i| i.name.clone()).unwrap_or_default(),
            path: String::new(),
            size_bytes: self.spec.size_bytes,
            // At most 4 MiB.
            chunk_size: self.common.shape.chunk_size.bytes() as u32,
            dirty_bytes: generation.listed_bytes(generation.epochs.listed()),
            local_bytes: sectors * SECTOR_SIZE,
            pending: facts.pending.iter().map(|pending| pending.number).collect(),
            last_stable: facts.last_stable.max(self.state.get().last_stable),
            created_unix_ms: self.spec.created_unix_ms,
            stalled: self.stalled().unwrap_or_default(),
            aside_bytes,
            spill_bytes: self.common.spill.used_bytes(),
            throttled_writes: self.throttled.load(Ordering::Relaxed),
            // As the path, for who knows what lies below.
            ..v1::Disk::default()
        }
    }

    pub(super) async fn wait_stable(&self, number: u64) -> Result<Settled, DiskError> {
        let mut changes = self.changes();
        loop {
            changes.borrow_and_update();
            if let Some(outcome) = self.outcome(number) {
                return Ok(outcome);
            }
            let generation = self.generation.load_full();
            let facts = generation.epochs.facts();
            if number == 0 || number >= facts.next_number {
                return Err(DiskError::NoSnapshot { disk: self.disk().to_owned(), number });
            }
            if facts.pending.iter().all(|pending| pending.number != number) {
                return self.earlier_outcome(number).await;
            }
            generation.check()?;
            self.persist_now();
            // The sender is in `self`.
            let _ = changes.changed().await;
        }
    }

    /// What became of a snapshot that this process did not persist.
    async fn earlier_outcome(&self, number: u64) -> Result<Settled, DiskError> {
        let image = self.checkpoint()?;
        let lost = || Settled::Failed { reason: "it was lost when the host stopped".into() };
        match self.common.deps.upstream.snapshot(image.id, number).await {
            Ok(snapshot) => Ok(match snapshot.state() {
                SnapshotState::Stable | SnapshotState::Obsolete => Settled::Stable,
                SnapshotState::Failed => Settled::Failed { reason: snapshot.reason },
                SnapshotState::Pending | SnapshotState::Unspecified => lost(),
            }),
            // Handed out, and never begun.
            Err(UpstreamError::NotFound(_)) => Ok(lost()),
            Err(error) => Err(self.upstream_error(error)),
        }
    }
}
