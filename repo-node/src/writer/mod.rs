//! The one thread that appends to the log.
//!
//! Jobs that arrive while a group is being written and synced make up the next group, so that the
//! more callers there are, the more of them share a sync. The index changes, and callers are
//! answered, only after the sync.
//!
//! When the disk is full, the part of the group that was written is cut off again, jobs that bring
//! records are refused, and the others (touches, deletes) are written alone, if need be into the
//! room that the `reserve` file holds for them. Any other failed write, and any failed sync,
//! poisons the store: after that nobody can tell what the disk holds, until a restart reads it.

mod group;

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::core::Core;
use crate::disk::{DiskFile, is_full};
use crate::format::listing::Summary;
use crate::format::segment::{self, SEGMENT_HEADER_LEN, encode_header, frame_len};
use crate::queue::Job;
use crate::recovery::{Tail, write_listing};
use crate::segments::Segment;
use group::{Effect, Finished, Group, Planned};

/// Name of the file that holds room for deletes and touches on a full disk.
pub(crate) const RESERVE_NAME: &str = "reserve";

/// Its size: the tombstones of one request with as many records as one may have.
const RESERVE_FILE_BYTES: u64 = 8 << 20;

/// At the most this part of the file system.
const RESERVE_FILE_DIVISOR: u64 = 64;

/// Compaction may use this part of the free bytes that puts must leave.
const CARRY_RESERVE_DIVISOR: u64 = 4;

/// The segment that is being appended to.
struct Active {
    segment: Arc<Segment>,
    /// What it holds, as its listing will have it.
    entries: Vec<u8>,
}

/// The writer's own state.
pub(crate) struct Writer {
    core: Arc<Core>,
    active: Option<Active>,
    next_segment: u32,
    /// The reserve file, while it holds room.
    reserve: Option<Arc<dyn DiskFile>>,
}

/// Why a group was not written.
enum Failure {
    /// No room. Nothing of it is in the segment.
    Full,
    /// The store is poisoned.
    Poisoned,
}

impl Writer {
    pub(crate) fn new(core: Arc<Core>, tail: Option<Tail>, next_segment: u32) -> Self {
        let active = tail.map(|Tail { segment, entries }| Active { segment, entries });
        let mut writer = Self { core, active, next_segment, reserve: None };
        let free = writer.core.disk.space().map_or(0, |space| space.free);
        writer.keep_reserve(free);
        writer
    }

    /// Works until the queue is closed and empty; then leaves a listing, for a quick start.
    pub(crate) fn run(mut self) {
        let core = Arc::clone(&self.core);
        let _abandon = AbandonOnDrop(&core);
        while let Some(jobs) = self.core.queue.take() {
            self.commit(jobs);
        }
        if self.core.poisoned().is_none()
            && let Some(active) = self.active.take()
        {
            self.list(&active);
        }
    }

    /// Writes the jobs that wait, if there are any, and answers them. Says whether there were.
    pub(crate) fn step(&mut self) -> bool {
        let Some(jobs) = self.core.queue.take_now() else { return false };
        self.commit(jobs);
        true
    }

    fn commit(&mut self, jobs: Vec<Job>) {
        if let Err(failure) = self.ensure_active() {
            let error = match failure {
                Failure::Full => self.core.full(),
                Failure::Poisoned => self.poisoned(),
            };
            jobs.into_iter().for_each(|job| job.answer(Err(error.clone())));
            return;
        }
        let core = Arc::clone(&self.core);
        let mut group = self.begin(&core);
        for job in jobs {
            if group.end() >= core.options.segment_bytes && core.poisoned().is_none() {
                self.write_group(group);
                self.roll();
                group = self.begin(&core);
            }
            if let Some(error) = core.poisoned() {
                job.answer(Err(error));
            } else if let Err(refused) = group.plan(job) {
                refused.answer(Err(core.full()));
            }
        }
        self.write_group(group);
    }

    fn begin<'a>(&mut self, core: &'a Core) -> Group<'a> {
        let free = core.disk.space().map_or(u64::MAX, |space| space.free);
        self.keep_reserve(free);
        let room = free.saturating_sub(core.reserve);
        let carry_room = free.saturating_sub(core.reserve / CARRY_RESERVE_DIVISOR);
        let active = self.active().segment.as_ref();
        let at = (active.number, active.len());
        Group::new(&core.index, core.store, at, (room, carry_room))
    }

    fn active(&mut self) -> &mut Active {
        self.active.as_mut().expect("made before the first group and never taken while running")
    }

    fn poisoned(&self) -> crate::StoreError {
        self.core.poisoned().expect("the failure said so")
    }

    /// Writes a group and answers its jobs.
    fn write_group(&mut self, group: Group<'_>) {
        match self.append(&group) {
            Ok(()) => self.settle(group.finish()),
            Err(Failure::Poisoned) => self.fail(group.finish().planned),
            Err(Failure::Full) => {
                let (bulky, small): (Vec<_>, Vec<_>) =
                    group.finish().planned.into_iter().partition(|planned| planned.is_bulky);
                for planned in bulky {
                    planned.job.answer(Err(self.core.full()));
                }
                if !small.is_empty() {
                    self.write_small(small);
                }
            }
        }
    }

    /// Writes jobs that only touch and delete, using the reserve when nothing else is left.
    fn write_small(&mut self, small: Vec<Planned>) {
        let core = Arc::clone(&self.core);
        let mut group = self.begin(&core);
        for planned in small {
            // A put that found everything there may find it gone now: then it needs room.
            if let Err(refused) = group.plan(planned.job) {
                refused.answer(Err(core.full()));
            }
        }
        let mut written = self.append(&group);
        if matches!(written, Err(Failure::Full)) && self.release_reserve() {
            written = self.append(&group);
        }
        match written {
            Ok(()) => self.settle(group.finish()),
            Err(Failure::Poisoned) => self.fail(group.finish().planned),
            Err(Failure::Full) => {
                for planned in group.finish().planned {
                    planned.job.answer(Err(core.full()));
                }
            }
        }
    }

    /// Puts a group's bytes on the disk.
    fn append(&mut self, group: &Group<'_>) -> Result<(), Failure> {
        if group.is_empty() {
            return Ok(());
        }
        let core = Arc::clone(&self.core);
        core.groups.fetch_add(1, Ordering::Relaxed);
        let segment = Arc::clone(&self.active().segment);
        if let Err(error) = segment.file.write_at(group.start(), &mut group.slices()) {
            if !is_full(&error) {
                core.poison("writing to a segment", &error);
                return Err(Failure::Poisoned);
            }
            return match segment.file.truncate(group.start()) {
                Ok(()) => Err(Failure::Full),
                Err(error) => {
                    core.poison("cutting off a write that found the disk full", &error);
                    Err(Failure::Poisoned)
                }
            };
        }
        self.sync(&*segment.file)?;
        segment.set_len(group.end());
        Ok(())
    }

    fn sync(&self, file: &dyn DiskFile) -> Result<(), Failure> {
        self.core.syncs.fetch_add(1, Ordering::Relaxed);
        #[cfg(feature = "planted-bugs")]
        if blobcr_proto::planted::has(blobcr_proto::planted::Bug::AckUnsynced) {
            return Ok(());
        }
        file.sync().map_err(|error| {
            self.core.poison("syncing a segment", &error);
            Failure::Poisoned
        })
    }

    /// Lets the index and the callers know of what is durable now.
    fn settle(&mut self, finished: Finished) {
        let Finished { effects, entries, planned } = finished;
        self.active().entries.extend(entries);
        effects.into_iter().for_each(|effect| self.apply(effect));
        for Planned { job, outcome, is_bulky } in planned {
            if is_bulky {
                self.core.refusing.store(false, Ordering::Relaxed);
            }
            job.answer(Ok(outcome));
        }
    }

    fn apply(&self, effect: Effect) {
        let core = &self.core;
        let before = match effect {
            Effect::Put(key, state) => {
                if let Some(segment) = core.segments.get(state.location.segment) {
                    segment.add_live(frame_len(state.stored_len));
                }
                core.index.insert(&key, state)
            }
            Effect::Touch(key, generation) => {
                core.index
                    .update(&key, |state| state.generation = state.generation.max(generation));
                None
            }
            Effect::Remove(key) => core.index.remove(&key),
        };
        if let Some(before) = before
            && let Some(segment) = core.segments.get(before.location.segment)
        {
            segment.remove_live(frame_len(before.stored_len));
        }
    }

    fn fail(&self, planned: Vec<Planned>) {
        let error = self.poisoned();
        planned.into_iter().for_each(|planned| planned.job.answer(Err(error.clone())));
    }

    fn ensure_active(&mut self) -> Result<(), Failure> {
        if self.core.poisoned().is_some() {
            return Err(Failure::Poisoned);
        }
        if self.active.is_none() {
            self.active = Some(self.new_segment()?);
        }
        Ok(())
    }

    /// Closes the active segment and begins another. A segment may grow beyond its limit while
    /// there is no room for a new one.
    fn roll(&mut self) {
        if self.core.poisoned().is_some() {
            return;
        }
        if let Ok(next) = self.new_segment()
            && let Some(full) = self.active.replace(next)
        {
            self.list(&full);
        }
    }

    fn new_segment(&mut self) -> Result<Active, Failure> {
        let mut made = self.try_new_segment();
        if made.as_ref().is_err_and(is_full) && self.release_reserve() {
            made = self.try_new_segment();
        }
        let file = made.map_err(|error| {
            if is_full(&error) {
                return Failure::Full;
            }
            self.core.poison("making a segment", &error);
            Failure::Poisoned
        })?;
        let number = self.next_segment;
        self.next_segment += 1;
        let segment = Arc::new(Segment::new(number, file, SEGMENT_HEADER_LEN as u64, 0));
        self.core.segments.insert(Arc::clone(&segment));
        Ok(Active { segment, entries: Vec::new() })
    }

    fn try_new_segment(&self) -> io::Result<Arc<dyn DiskFile>> {
        let disk = &*self.core.disk;
        let name = segment::name(self.next_segment);
        let file = disk.create(&name)?;
        let header = encode_header(self.core.store, self.next_segment);
        let made = file
            .write_at(0, &mut [IoSlice::new(&header)])
            .and_then(|()| file.sync())
            // IMPORTANT: without this the whole segment may be gone after a power cut.
            .and_then(|()| disk.sync_dir());
        match made {
            Ok(()) => Ok(file),
            Err(error) => disk.unlink(&name).and(Err(error)),
        }
    }

    /// Writes the listing of a segment; without it the next start scans the segment.
    fn list(&self, active: &Active) {
        let Active { segment, entries } = active;
        let summary = Summary {
            segment: segment.number,
            segment_len: segment.len(),
            unreadable: segment.unreadable,
        };
        if let Err(error) = write_listing(&*self.core.disk, self.core.store, summary, entries) {
            let segment = segment.number;
            tracing::warn!(segment, %error, "cannot write the listing of a segment");
        }
    }

    /// Takes room for the time when the disk is full, once there is enough. Failing to is no harm
    /// now.
    fn keep_reserve(&mut self, free: u64) {
        let core = &self.core;
        let bytes = RESERVE_FILE_BYTES.min(core.capacity / RESERVE_FILE_DIVISOR);
        if self.reserve.is_some() || free < core.reserve.saturating_add(bytes) {
            return;
        }
        let disk = &*core.disk;
        let file = disk.create(RESERVE_NAME).or_else(|_| disk.open(RESERVE_NAME));
        self.reserve = file.and_then(|file| file.allocate(bytes).map(|()| file)).ok();
    }

    /// Gives the reserve's room back to the disk; says whether there was any.
    fn release_reserve(&mut self) -> bool {
        self.reserve.take().is_some_and(|file| file.truncate(0).is_ok())
    }
}

/// Tells everyone who waits when the writer ends, however it ends.
struct AbandonOnDrop<'a>(&'a Core);

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        self.0.queue.abandon();
    }
}
