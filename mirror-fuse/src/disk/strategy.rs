//! How a snapshot is kept as it was while the guest writes on: selective copy-on-write, and what
//! the paper compares it with. The others are there for that comparison only.
//!
//! | strategy | COMMIT | a write to a chunk of a pending snapshot |
//! |---|---|---|
//! | selective | cuts | copies what it overwrites to memory, when the persister has not read it yet |
//! | cow | cuts | copies the chunk to disk, whether or not the persister has read it |
//! | precopy | cuts, then copies every chunk to disk while writers wait | copies nothing |
//! | offline | cuts, then has it persisted while writers wait | there is none |
//!
//! The rest of the disk is the same for all of them, and so are its promises. `cow` copies what
//! copy-on-write would copy, in the path of the same writes. That it would also write the new bytes
//! to the new place, and so leave a fragmented file behind, is left out.

use super::aside::{Aside, Old, Room};
use super::epochs::Belongs;
use super::gate::Held;
use super::generation::Generation;
use super::map::Mark;
use super::shape::Sectors;
use super::shared::Shared;
use super::{DiskError, facts::Pending};

/// How a snapshot is kept as it was while the guest writes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// Sectors are copied aside before they are overwritten, if the snapshot still needs them: the
    /// best, and what a mirror is for.
    #[default]
    Selective,
    /// Every chunk of a pending snapshot is copied before it is overwritten.
    Cow,
    /// Every chunk of a snapshot is copied before COMMIT returns.
    Precopy,
    /// A snapshot is stable before COMMIT returns.
    Offline,
}

impl Strategy {
    /// Whether writers wait longer than for the cut.
    pub(super) const fn holds_writers(self) -> bool {
        matches!(self, Self::Precopy | Self::Offline)
    }

    /// Where a write's copy may go.
    const fn room(self, offered: Room) -> Room {
        match self {
            Self::Cow => Room::Spill,
            Self::Selective | Self::Precopy | Self::Offline => offered,
        }
    }
}

impl Generation {
    const fn strategy(&self) -> Strategy {
        self.common.deps.strategy
    }

    /// Copies what must be copied of a chunk before the sectors `touched` of it are changed; its lock
    /// must be held.
    pub(super) fn save(
        &self,
        chunk: u64,
        touched: Sectors,
        belongs: Belongs,
        room: Room,
    ) -> Result<Saved, DiskError> {
        let strategy = self.strategy();
        match belongs {
            Belongs::Scheduled => {
                let copy = self.copier().copy(chunk, touched, strategy.room(room))?;
                Ok(copy.map_or(Saved::NoRoom, Saved::Copy))
            }
            // Nobody needs this copy, so nobody waits for room either.
            Belongs::Captured if strategy == Strategy::Cow => {
                let copy = self.copier().copy_whole(chunk)?;
                Ok(copy.map_or(Saved::Nothing, Saved::Copy))
            }
            Belongs::Captured | Belongs::Dirty | Belongs::Free => Ok(Saved::Nothing),
        }
    }

    /// Copies the chunks of a pending snapshot aside, as far as there is room.
    fn precopy(&self, snapshot: &Pending) -> Result<(), DiskError> {
        for chunk in self.epochs.chunks(snapshot.number) {
            let mut stripe = self.stripes.lock(chunk);
            self.check()?;
            let mark = self.map.mark(chunk);
            // A write that came before the gate closed has made a copy itself.
            if mark.captured || !snapshot.covers(mark.epoch) {
                continue;
            }
            let Some(old) = self.copier().copy_whole(chunk)? else { return Ok(()) };
            let aside = Aside::new(mark.epoch, snapshot.last + 1, old);
            stripe.asides.entry(chunk).or_default().push(aside);
            self.map.set_mark(chunk, Mark { captured: true, ..mark });
        }
        Ok(())
    }
}

/// What was copied of a chunk that is about to be changed.
pub(super) enum Saved {
    /// There was nothing to copy.
    Nothing,
    Copy(Old),
    NoRoom,
}

impl Shared {
    pub(super) fn strategy(&self) -> Strategy {
        self.common.deps.strategy
    }

    /// Keeps writers away from the cut on until it is dropped, where the strategy wants it.
    pub(super) fn hold_writers(&self) -> Option<Held<'_>> {
        self.strategy().holds_writers().then(|| self.gate.hold())
    }

    /// Returns when the persister may begin a snapshot: a copy is made first, undisturbed.
    pub(super) async fn may_persist(&self) {
        if self.strategy() == Strategy::Precopy {
            self.gate.released().await;
        }
    }

    /// What there is to do between the cut of a snapshot and the moment when writers go on.
    pub(super) async fn before_writers_go_on(&self, number: u64) -> Result<(), DiskError> {
        match self.strategy() {
            Strategy::Selective | Strategy::Cow => Ok(()),
            Strategy::Offline => self.wait_stable(number).await.map(drop),
            Strategy::Precopy => {
                let generation = self.generation.load_full();
                let pending = generation.epochs.pending();
                let Some(snapshot) = pending.into_iter().find(|s| s.number == number) else {
                    return Ok(());
                };
                self.common.blocking(move || generation.precopy(&snapshot)).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::disk::tests::support::{CHUNK, World, deps, pattern, spec_of};
    use crate::disk::{Attempt, Disk, DiskDeps, Settled};

    const SIZE: usize = 4 * CHUNK;

    /// A disk whose every chunk has changed, before a COMMIT that nobody persists yet.
    async fn changed(strategy: Strategy) -> (tempfile::TempDir, Arc<World>, Arc<Disk>) {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let source = world.image("base", &vec![0; SIZE]);
        let deps = DiskDeps { strategy, ..deps(&world, (16, 16), "boot") };
        let spec = spec_of("disk", source, SIZE as u64);
        let disk = Disk::create(&dir.path().join("disk"), spec, deps).unwrap();
        disk.put(0, &pattern(1, SIZE)).await;
        disk.ensure_clone().await.unwrap();
        world.hold();
        (dir, world, disk)
    }

    async fn until(mut condition: impl FnMut() -> bool) {
        while !condition() {
            tokio::task::yield_now().await;
        }
    }

    fn copied(disk: &Disk) -> (u64, u64) {
        let status = disk.status();
        (status.aside_bytes, status.spill_bytes)
    }

    #[tokio::test]
    async fn cow_copies_what_was_read_already() {
        for (strategy, spilled) in [(Strategy::Selective, 0), (Strategy::Cow, CHUNK as u64)] {
            let (_dir, world, disk) = changed(strategy).await;
            let made = disk.try_commit().unwrap().unwrap();
            // It is begun, and the first chunk is read.
            world.take_step().await;
            world.take_step().await;
            until(|| world.waiting.load(Ordering::SeqCst) == 1).await;
            disk.put(0, &pattern(2, 512)).await;
            assert_eq!(copied(&disk), (0, spilled), "{strategy:?}");
            world.release();
            disk.settle().await.unwrap();
            assert!(world.bytes(made.image_id, made.number) == pattern(1, SIZE));
            assert_eq!(copied(&disk), (0, 0));
        }
    }

    #[tokio::test]
    async fn precopy_copies_everything_before_it_returns_and_nothing_after() {
        let (_dir, world, disk) = changed(Strategy::Precopy).await;
        assert_eq!(disk.try_commit().unwrap(), None, "it takes long");
        let made = disk.commit().await.unwrap();
        assert_eq!(copied(&disk), (0, SIZE as u64));
        disk.put(0, &pattern(2, SIZE)).await;
        assert_eq!(copied(&disk), (0, SIZE as u64));
        world.release();
        disk.settle().await.unwrap();
        assert!(world.bytes(made.image_id, made.number) == pattern(1, SIZE));
        assert_eq!(copied(&disk), (0, 0));
    }

    #[tokio::test]
    async fn offline_is_stable_when_it_returns_and_writers_wait() {
        let (_dir, world, disk) = changed(Strategy::Offline).await;
        let committing = Arc::clone(&disk);
        let commit = tokio::spawn(async move { committing.commit().await.unwrap() });
        until(|| world.waiting.load(Ordering::SeqCst) == 1).await;
        assert_eq!(disk.try_write(0, &[2]).unwrap(), Attempt::NeedsAsync { done: 0 });
        let writing = Arc::clone(&disk);
        let writer = tokio::spawn(async move { writing.put(0, &pattern(2, SIZE)).await });
        while disk.status().last_stable < 2 {
            assert!(!writer.is_finished() && !commit.is_finished());
            world.take_step().await;
            tokio::task::yield_now().await;
        }
        let made = commit.await.unwrap();
        assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
        writer.await.unwrap();
        assert!(world.bytes(made.image_id, made.number) == pattern(1, SIZE));
        assert!(disk.all().await == pattern(2, SIZE));
    }
}
