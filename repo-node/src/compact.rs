//! Winning back the room of what was deleted.
//!
//! A segment of which enough is of no use is emptied and unlinked: what is still wanted goes to
//! the end of the log, through the writer like everything else, a few MiB at a time. The writer
//! moves a record only if the index still points to the copy that was read, and gives it the
//! generation that it has by then; so whatever is put, touched or deleted meanwhile wins.
//!
//! The segment is unlinked only when everything carried over is durable. A crash before that
//! leaves copies in two places, of which the later counts.
//!
//! What must be carried over:
//! * a record that the index points to;
//! * a touch, if the record still has that generation and is in another segment (in this segment
//!   it is carried itself, with its generation);
//! * a tombstone, as long as a copy that it hides may be on the disk: its own segment is there, or
//!   an older segment that holds copies left over by an interrupted compaction.
//!
//! A segment with a record that cannot be read any more is left alone until the record is put
//! again or deleted: nothing is lost by compaction that was not lost before.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::core::Core;
use crate::error::StoreError;
use crate::format::listing::{self, Entry};
use crate::format::segment::{self, frame_len};
use crate::format::{Event, Location};
use crate::index::State;
use crate::queue::{Carried, Outcome, Work};
use crate::read::{ReadError, read_record};
use crate::recovery::entries_of;
use crate::segments::Segment;

/// Payload bytes that are carried over at a time: a guest's put waits for at most one such step.
const STEP_BYTES: u64 = 4 << 20;

/// Records that are carried over at a time.
const STEP_RECORDS: usize = 1024;

/// While the disk is full, a segment is worth compacting when an eighth of it is of no use.
const URGENT_DEAD_FRACTION: f64 = 0.125;

/// Listings that one round reads only to learn that their segments are not worth it.
const VAIN_LOOKS_MAX: usize = 8;

/// What compaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactionReport {
    /// Segments that were unlinked.
    pub segments: u32,
    /// Their bytes.
    pub unlinked_bytes: u64,
    /// Bytes that had to be carried over.
    pub carried_bytes: u64,
}

/// What a look at a segment told: true as long as these numbers stay.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Vain {
    live_bytes: u64,
    unlinked: u64,
    is_full: bool,
}

/// The compactor's memory between rounds.
pub(crate) struct Compactor {
    core: Arc<Core>,
    vain: HashMap<u32, Vain>,
    /// Segments unlinked so far: each may free tombstones elsewhere.
    unlinked: u64,
}

/// How compaction leaves room for others: told how many bytes were carried, waits, and says
/// whether to go on.
pub(crate) type Pace<'a> = &'a mut dyn FnMut(Duration) -> bool;

/// Has the writer do something, and waits for its answer.
pub(crate) type Ask<'a> = &'a mut dyn FnMut(Work) -> Result<Outcome, StoreError>;

impl Compactor {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core, vain: HashMap::new(), unlinked: 0 }
    }

    /// Compacts until nothing is worth it or `pace` says stop. The writer is a thread.
    pub(crate) fn run(&mut self, pace: Pace<'_>) -> Result<CompactionReport, StoreError> {
        let core = Arc::clone(&self.core);
        self.run_by(&mut |work| core.queue.push(work).wait(), pace)
    }

    /// The same, whatever the writer is.
    pub(crate) fn run_by(
        &mut self,
        ask: Ask<'_>,
        pace: Pace<'_>,
    ) -> Result<CompactionReport, StoreError> {
        let mut report = CompactionReport::default();
        let mut looks = 0;
        while looks < VAIN_LOOKS_MAX {
            let Some(segment) = self.candidate() else { break };
            let vain = self.vain_now(&segment);
            if !self.worth_it(&segment) {
                looks += 1;
                self.vain.insert(segment.number, vain);
                continue;
            }
            match self.compact(&segment, ask, pace, &mut report) {
                Ok(Compacted::Unlinked) => {
                    self.unlinked += 1;
                    self.vain.remove(&segment.number);
                    report.segments += 1;
                    report.unlinked_bytes += segment.len();
                }
                // Another one may need less room.
                Ok(Compacted::Unreadable) | Err(StoreError::Full { .. }) => {
                    looks += 1;
                    let vain = self.vain_now(&segment);
                    self.vain.insert(segment.number, vain);
                }
                Ok(Compacted::Stopped) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(report)
    }

    fn vain_now(&self, segment: &Segment) -> Vain {
        let (live_bytes, unlinked) = (segment.live_bytes(), self.unlinked);
        Vain { live_bytes, unlinked, is_full: self.core.is_full() }
    }

    fn threshold(&self) -> f64 {
        let wanted = self.core.options.compact_dead_fraction;
        if self.core.is_full() { wanted.min(URGENT_DEAD_FRACTION) } else { wanted }
    }

    /// The closed segment of which the greatest part may be of no use, if that is enough.
    fn candidate(&self) -> Option<Arc<Segment>> {
        let mut segments = self.core.segments.list();
        // The last one is being appended to.
        segments.pop();
        let threshold = self.threshold();
        segments
            .into_iter()
            .filter(|segment| self.vain.get(&segment.number) != Some(&self.vain_now(segment)))
            .map(|segment| (dead_fraction(segment.len(), segment.live_bytes()), segment))
            .filter(|(dead, _)| *dead >= threshold)
            .max_by(|(a, _), (b, _)| a.total_cmp(b))
            .map(|(_, segment)| segment)
    }

    /// Looks at what would have to be carried over besides the records.
    fn worth_it(&self, segment: &Segment) -> bool {
        let Some(entries) = self.entries(segment) else { return false };
        let kept: u64 = entries
            .iter()
            .filter(|entry| entry.event != Event::Put && self.is_wanted(segment, entry))
            .map(|entry| frame_len(entry.stored_len))
            .sum();
        dead_fraction(segment.len(), segment.live_bytes() + kept) >= self.threshold()
    }

    fn entries(&self, segment: &Segment) -> Option<Vec<Entry>> {
        let core = &self.core;
        entries_of(&*core.disk, core.store, segment)
            .inspect_err(|error| {
                tracing::warn!(segment = segment.number, %error, "cannot compact a segment");
            })
            .ok()
    }

    /// Whether the segment may not go before this is carried over.
    fn is_wanted(&self, segment: &Segment, entry: &Entry) -> bool {
        let held = self.core.index.get(&entry.key);
        match entry.event {
            Event::Put => {
                let here = Location { segment: segment.number, unit: entry.unit };
                held.is_some_and(|held| held.location == here)
            }
            Event::Touch => held.is_some_and(|held| {
                held.generation == entry.generation && held.location.segment != segment.number
            }),
            Event::Tombstone(target) => {
                self.core.segments.hides_something(target.segment, segment.number)
            }
        }
    }

    fn compact(
        &self,
        segment: &Segment,
        ask: Ask<'_>,
        pace: Pace<'_>,
        report: &mut CompactionReport,
    ) -> Result<Compacted, StoreError> {
        let Some(entries) = self.entries(segment) else { return Ok(Compacted::Unreadable) };
        // From the first record carried over until the segment is gone.
        self.core.segments.mark_leftover(segment.number);
        let (mut step, mut bytes, mut unreadable) = (Vec::new(), 0, false);
        for entry in &entries {
            if !self.is_wanted(segment, entry) {
                continue;
            }
            match self.read(segment, entry) {
                Some(item) => step.push(item),
                None => unreadable = true,
            }
            bytes += frame_len(entry.stored_len);
            if bytes >= STEP_BYTES || step.len() >= STEP_RECORDS {
                carry(ask, std::mem::take(&mut step))?;
                report.carried_bytes += bytes;
                let rate = self.core.options.compact_bytes_per_second.max(1);
                if !pace(Duration::from_secs_f64(bytes as f64 / rate as f64)) {
                    return Ok(Compacted::Stopped);
                }
                bytes = 0;
            }
        }
        carry(ask, step)?;
        report.carried_bytes += bytes;
        if unreadable || segment.live_records() > 0 {
            return Ok(Compacted::Unreadable);
        }
        self.unlink(segment)?;
        Ok(Compacted::Unlinked)
    }

    /// What is to be carried over for `entry`; `None` when it cannot be read (any more).
    fn read(&self, segment: &Segment, entry: &Entry) -> Option<Carried> {
        let key = entry.key;
        let generation = entry.generation;
        match entry.event {
            Event::Touch => return Some(Carried::Touch { key, generation }),
            Event::Tombstone(target) => return Some(Carried::Tombstone { key, target }),
            Event::Put => {}
        }
        let from = Location { segment: segment.number, unit: entry.unit };
        let stored_len = entry.stored_len;
        let state = State { location: from, stored_len, generation, damaged: false };
        match read_record(segment, self.core.store, &key, state) {
            Ok((header, payload)) => Some(Carried::Record { from, header, payload }),
            Err(error) => {
                self.core.mark_damaged(&key, from, &error);
                None
            }
        }
    }

    /// Removes a segment of which nothing is wanted: first its listing, so that a listing without
    /// a segment always means that the segment was lost. Each step is durable before the next.
    fn unlink(&self, segment: &Segment) -> Result<(), StoreError> {
        let core = &self.core;
        let number = segment.number;
        let name = segment::name(number);
        let fail = |source| StoreError::Io {
            what: format!("remove segment {name}"),
            source: Arc::new(source),
        };
        match core.disk.unlink(&listing::name(number)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
            _ => core.sync_dir()?,
        }
        let removed = if segment.unreadable > 0 {
            // Who wants to look at what could not be read still can.
            core.disk.rename(&name, &format!("{name}.damaged"))
        } else {
            core.disk.unlink(&name)
        };
        removed.map_err(fail)?;
        // IMPORTANT: a segment that came back after tombstones were dropped would bring deleted
        // records back.
        core.sync_dir()?;
        core.segments.remove(number);
        Ok(())
    }
}

enum Compacted {
    Unlinked,
    /// Something in it cannot be read.
    Unreadable,
    Stopped,
}

fn carry(ask: Ask<'_>, step: Vec<Carried>) -> Result<(), StoreError> {
    if step.is_empty() {
        return Ok(());
    }
    match ask(Work::Carry(step))? {
        Outcome::Carried => Ok(()),
        other => unreachable!("a carry is answered by {other:?}"),
    }
}

fn dead_fraction(len: u64, used: u64) -> f64 {
    let room = len.saturating_sub(segment::SEGMENT_HEADER_LEN as u64);
    if room == 0 { 1.0 } else { room.saturating_sub(used) as f64 / room as f64 }
}

impl Core {
    /// Notes that the copy of `key` at `location` cannot be read, if the index still points there.
    pub(crate) fn mark_damaged(&self, key: &crate::Key, location: Location, error: &ReadError) {
        let mut marked = false;
        self.index.update(key, |state| {
            if state.location == location && !state.damaged {
                state.damaged = true;
                marked = true;
            }
        });
        if marked {
            let (id, segment) = (key.record.id, segment::name(location.segment));
            tracing::error!(%id, segment, offset = location.offset(), %error, "damaged record");
        }
    }

    /// Makes unlinks durable, or poisons the store.
    fn sync_dir(&self) -> Result<(), StoreError> {
        self.disk.sync_dir().map_err(|error| {
            self.poison("syncing the directory", &error);
            self.poisoned().expect("just poisoned")
        })
    }
}
