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

/// The number of the snapshot that a clone begins with.
const CLONED: u64 = 1;

impl Shared {
    /// Goes on to its end when the caller goes away: were the lock given back while the generations
    /// are being swapped, a COMMIT could get a number that the new one hands out again.
    pub(super) async fn rollback(self: &Arc<Self>, number: u64) -> Result<(), DiskError> {
        let shared = Arc::clone(self);
        let whole = self.common.deps.runtime.spawn(async move { shared.roll_back(number).await });
        match whole.await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => Err(DiskError::Stopped(self.disk().to_owned())),
            },
        }
    }

    async fn roll_back(self: Arc<Self>, number: u64) -> Result<(), DiskError> {
        let _one = self.commit.lock().await;
        self.settle_all().await?;
        // A CLONE tells the generation its first number: not one that is about to be replaced.
        let _no_clone = self.clone.lock().await;
        let source = self.rollback_source(number).await?;
        let before = self.state.get().source;
        let after = (source.image_id, source.number);
        if !self.needed_pins().contains(&after) {
            let upstream = &self.common.deps.upstream;
            let pinned = upstream.pin(after.0, after.1, &self.pin_holder()).await;
            pinned.map_err(|error| self.upstream_error(error))?;
        }
        let shared = Arc::clone(&self);
        let swapped = self.common.blocking(move || shared.swap_generation(source)).await;
        // Whichever of the two is not needed now.
        self.unpin_unless_needed((before.image_id, before.number)).await;
        self.unpin_unless_needed(after).await;
        swapped
    }

    async fn unpin_unless_needed(&self, (image_id, number): (u64, u64)) {
        if self.needed_pins().contains(&(image_id, number)) {
            return;
        }
        let upstream = &self.common.deps.upstream;
        if let Err(error) = upstream.unpin(image_id, number, &self.pin_holder()).await {
            // The mirror's next start takes away what no disk needs.
            tracing::warn!(disk = self.disk(), %error, "a pin that is not needed any more stays");
        }
    }

    pub(super) async fn drop_pin_if_unneeded(&self, snapshot: (u64, u64)) {
        let _no_rollback = self.commit.lock().await;
        // A CLONE pins before it records that it needs the pin.
        let _no_clone = self.clone.lock().await;
        self.unpin_unless_needed(snapshot).await;
    }

    /// The snapshots that the repository must keep for the disk, by image and number: the one below
    /// it, the attached one, which is cloned at the first CHECKPOINT, and then the clone.
    pub(super) fn needed_pins(&self) -> Vec<(u64, u64)> {
        let durable = self.state.get();
        let mut needed = vec![(durable.source.image_id, durable.source.number)];
        match durable.checkpoint {
            Some(image) => needed.push((image.id, CLONED)),
            None => needed.push((self.spec.source.image_id, self.spec.source.number)),
        }
        needed.dedup();
        needed
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
            self.persist_now();
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
        let refused = |text| self.upstream_error(UpstreamError::Refused(text));
        self.common.shape.check_root(&root).map_err(refused)?;
        Ok(Source {
            image: image.name.clone(),
            image_id: image.id,
            number: snapshot.number,
            pool: self.spec.source.pool,
            root,
        })
    }

    fn swap_generation(&self, source: Source) -> Result<(), DiskError> {
        let _busy = self.common.busy();
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
        let new =
            Generation::new(self.common.clone(), number, source.clone(), parts, facts, contents)?;
        self.state.update(|durable| {
            durable.generation = number;
            durable.source = source;
        })?;
        self.generation.store(Arc::new(new));
        old.retire();
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::{Condvar, Mutex};
    use std::time::Duration;

    use super::*;
    use crate::disk::tests::support::{CHUNK, World, deps, pattern, spec_of};
    use crate::disk::{Disk, DiskDeps, FileIo, HostFiles, Settled};

    /// The host's files, on which the syncs of directories can be held up.
    #[derive(Default)]
    struct Held {
        /// Whether they are, and how many syncs wait.
        state: Mutex<(bool, usize)>,
        changed: Condvar,
    }

    impl Held {
        fn hold(&self, held: bool) {
            self.state.lock().unwrap().0 = held;
            self.changed.notify_all();
        }

        async fn somebody_waits(&self) {
            while self.state.lock().unwrap().1 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    impl FileIo for Held {
        fn sync_directory(&self, path: &Path) -> io::Result<()> {
            let mut state = self.state.lock().unwrap();
            state.1 += 1;
            while state.0 {
                state = self.changed.wait(state).unwrap();
            }
            state.1 -= 1;
            drop(state);
            HostFiles.sync_directory(path)
        }
    }

    fn setup() -> (tempfile::TempDir, Arc<Held>, Arc<Disk>) {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let size = 5 * CHUNK as u64;
        let spec = spec_of("disk", world.image("base", &pattern(1, size as usize)), size);
        let io = Arc::new(Held::default());
        let of_disk: Arc<dyn FileIo> = Arc::<Held>::clone(&io);
        let deps = DiskDeps { io: of_disk, ..deps(&world, (16, 16), "boot") };
        let disk = Disk::create(&dir.path().join("disk"), spec, deps).unwrap();
        (dir, io, disk)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_rollback_whose_caller_goes_away_keeps_commits_out_until_it_is_done() {
        let (_dir, io, disk) = setup();
        let first = disk.commit().await.unwrap();
        assert_eq!(disk.wait_stable(first.number).await.unwrap(), Settled::Stable);
        disk.put(0, b"to be thrown away").await;
        io.hold(true);
        let of_task = Arc::clone(&disk);
        let caller = tokio::spawn(async move { of_task.rollback(0).await });
        io.somebody_waits().await;
        caller.abort();
        let _ = caller.await;
        let during = disk.try_commit().unwrap();
        io.hold(false);
        while disk.shared.generation.load().number == 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let after = disk.commit().await.unwrap();
        assert_ne!(during.map(|committed| committed.number), Some(after.number), "used twice");
        assert_eq!(disk.wait_stable(after.number).await.unwrap(), Settled::Stable);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_clone_made_during_a_rollback_is_known_to_the_disk_after_it() {
        let (_dir, io, disk) = setup();
        io.hold(true);
        let of_task = Arc::clone(&disk);
        let rollback = tokio::spawn(async move { of_task.rollback(0).await });
        io.somebody_waits().await;
        let of_task = Arc::clone(&disk);
        let mut clone = tokio::spawn(async move { of_task.ensure_clone().await });
        // It may wait for the rollback.
        let early = tokio::time::timeout(Duration::from_millis(200), &mut clone).await;
        io.hold(false);
        rollback.await.unwrap().unwrap();
        match early {
            Ok(made) => made.unwrap().unwrap(),
            Err(_) => clone.await.unwrap().unwrap(),
        };
        let made = disk.commit().await.unwrap();
        assert_eq!(made.number, 2, "the clone is number 1");
        assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    }
}
