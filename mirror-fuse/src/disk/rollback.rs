//! Rollback: an empty generation over an older snapshot takes the place of the present one.
//!
//! The state file names the generation that counts, so one durable write of it decides: before it
//! the new directory is rubbish, after it the old one is. Costs the same however much was written.
//!
//! Snapshots that are pending were promised to whoever asked for them, and the newest of them is
//! what "newest stable" will mean. So a rollback waits until they are stable or have failed, and
//! keeps new COMMITs out meanwhile. A write that runs at the same time as the rollback may land
//! before or after it.

use std::sync::Arc;

use blobcr_proto::v1::SnapshotState;

use super::facts::Facts;
use super::generation::{Generation, generation_dir};
use super::recovery::fresh_facts;
use super::shared::Shared;
use super::upstreams::Source;
use super::{DiskError, UpstreamError};

impl Shared {
    pub(super) async fn rollback(self: &Arc<Self>, number: u64) -> Result<(), DiskError> {
        let _one = self.commit.lock().await;
        self.settle_all().await?;
        let source = self.rollback_source(number).await?;
        let shared = Arc::clone(self);
        self.common.blocking(move || shared.swap_generation(source)).await
    }

    /// Waits until nothing is pending, or the disk is stopped.
    pub(super) async fn settle_all(&self) -> Result<(), DiskError> {
        let mut changes = self.changes();
        loop {
            changes.borrow_and_update();
            let generation = self.generation.load_full();
            generation.check()?;
            if generation.epochs.pending().is_empty() {
                return Ok(());
            }
            // The sender is in `self`.
            let _ = changes.changed().await;
        }
    }

    async fn rollback_source(&self, number: u64) -> Result<Source, DiskError> {
        let none = || DiskError::NoSnapshot { disk: self.disk().to_owned(), number };
        let Some(image) = self.checkpoint.get() else {
            return if number == 0 { Ok(self.spec.source.clone()) } else { Err(none()) };
        };
        let snapshot = match self.common.deps.upstream.snapshot(image.id, number).await {
            Err(UpstreamError::NotFound(_)) => return Err(none()),
            answer => answer.map_err(|error| self.upstream_error(error))?,
        };
        let Some(root) = snapshot.root.filter(|_| snapshot.state == SnapshotState::Stable as i32)
        else {
            let text = format!("snapshot {}@{} is not stable", image.name, snapshot.number);
            return Err(self.upstream_error(UpstreamError::Refused(text)));
        };
        if u64::from(root.chunk_size) != self.common.shape.chunk_size.bytes()
            || root.size_bytes > self.spec.size_bytes
        {
            let text = format!("snapshot {}@{} has another shape", image.name, snapshot.number);
            return Err(self.upstream_error(UpstreamError::Refused(text)));
        }
        Ok(Source {
            image: image.name.clone(),
            image_id: image.id,
            number: snapshot.number,
            pool: self.spec.source.pool,
            root,
        })
    }

    fn swap_generation(&self, source: Source) -> Result<(), DiskError> {
        let old = self.generation.load_full();
        old.check()?;
        let before = old.epochs.facts();
        let number = old.number + 1;
        let facts = Facts {
            next_number: before.next_number,
            last_stable: before.last_stable,
            answer: before.answer,
            ..fresh_facts(&self.common.deps.boot_id)
        };
        let parts = self.common.create_files(number, &facts)?;
        let contents = super::generation::Contents::default();
        let new = Generation::new(
            self.common.clone(),
            number,
            source.clone(),
            parts,
            facts,
            contents,
        )?;
        self.state.update(|durable| {
            durable.generation = number;
            durable.source = source;
        })?;
        self.generation.store(Arc::new(new));
        let directory = generation_dir(&self.common.dir, old.number);
        let disk = self.disk().to_owned();
        self.common.deps.runtime.spawn_blocking(move || {
            if let Err(error) = std::fs::remove_dir_all(&directory) {
                // The next open tries again.
                tracing::warn!(disk, %error, "cannot delete what was rolled back");
            }
        });
        Ok(())
    }
}
