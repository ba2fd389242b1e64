//! Opening a store: from the files of a directory to an index, whatever happened to them.
//!
//! Segments are read in order of their numbers, which is the order in which they were written. A
//! segment that has its listing is not read itself; the last segment has one only after a clean
//! stop. What was found wrong is told in a [`RecoveryReport`], and costs nothing but itself.

mod finding;
mod judge;
mod scan;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::disk::{Disk, DiskFile};
use crate::error::OpenError;
use crate::format::listing::{Entry, Summary};
use crate::format::segment::{self, SEGMENT_HEADER_LEN};
use crate::format::{Event, FormatError, Location, StoreId, identity, listing};
use crate::index::{Index, State};
use crate::segments::{Segment, Segments};
pub use finding::{Finding, RecoveryReport};
use judge::{Contents, read_segment};
use scan::scan;

/// A store as it was found.
pub(crate) struct Recovered {
    pub(crate) store: StoreId,
    pub(crate) index: Index,
    pub(crate) segments: Segments,
    /// The segment to go on with, and its entries so far.
    pub(crate) tail: Option<Tail>,
    /// The number that the next segment gets.
    pub(crate) next_segment: u32,
    pub(crate) report: RecoveryReport,
}

/// The last segment, fit to be appended to.
pub(crate) struct Tail {
    pub(crate) segment: Arc<Segment>,
    /// Its entries, as a listing has them.
    pub(crate) entries: Vec<u8>,
}

pub(crate) fn io_error(what: &'static str, file: &str) -> impl FnOnce(std::io::Error) -> OpenError {
    let file = file.to_owned();
    move |source| OpenError::Io { what, file, source }
}

/// Reads a store, or makes an empty one with the identity `fresh`.
pub(crate) fn recover(disk: &dyn Disk, fresh: StoreId) -> Result<Recovered, OpenError> {
    let names = disk.list().map_err(io_error("list", "the directory"))?;
    check_numbers(&names)?;
    let numbers: BTreeSet<u32> = names.iter().filter_map(|name| segment::number(name)).collect();
    let mut report = RecoveryReport::default();
    let store = own_identity(disk, &names, &numbers, fresh, &mut report)?;
    let (index, segments) = (Index::new(), Segments::default());
    let mut recovery = Recovery { disk, store, index, segments, report, names: &names };
    let mut tail = None;
    for number in &numbers {
        let is_last = Some(number) == numbers.last();
        tail = recovery.segment(*number, is_last)?;
    }
    recovery.lost_segments(&numbers)?;
    // A name that was used is not used again: a stale listing must never meet a new segment.
    let listed = names.iter().filter_map(|name| listing::number(name)).max();
    let last = numbers.last().copied().max(listed);
    // What is here may be here only in memory, left by a process that was killed.
    disk.sync_dir().map_err(io_error("sync", "the directory"))?;
    let Recovery { index, segments, mut report, .. } = recovery;
    report.segments = segments.list().len() as u32;
    report.records = index.len();
    let next_segment = last.map_or(0, |last| last + 1);
    Ok(Recovered { store, index, segments, tail, next_segment, report })
}

/// Refuses numbers that leave none for the segments to come.
fn check_numbers(names: &[String]) -> Result<(), OpenError> {
    let number = |name: &str| segment::number(name).or_else(|| listing::number(name));
    match names.iter().find(|name| number(name).is_some_and(|n| n > segment::NUMBER_MAX)) {
        None => Ok(()),
        Some(name) => {
            let source = FormatError::Damaged("no store comes to its number: move it away");
            Err(OpenError::Format { file: name.clone(), source })
        }
    }
}

/// The identity on the disk, or that of the segments, or a new one, which is then written.
fn own_identity(
    disk: &dyn Disk,
    names: &[String],
    numbers: &BTreeSet<u32>,
    fresh: StoreId,
    report: &mut RecoveryReport,
) -> Result<StoreId, OpenError> {
    let format = |source| OpenError::Format { file: identity::NAME.to_owned(), source };
    if names.iter().any(|name| name == identity::NAME) {
        let file = disk.open(identity::NAME).map_err(io_error("open", identity::NAME))?;
        let bytes = file.read_at(0, identity::LEN + 1).map_err(io_error("read", identity::NAME))?;
        match identity::decode(&bytes) {
            Ok(store) => return Ok(store),
            Err(newer @ FormatError::Newer { .. }) => return Err(format(newer)),
            Err(damaged) if numbers.is_empty() => return Err(format(damaged)),
            Err(_) => {}
        }
    }
    let mut store = fresh;
    if !numbers.is_empty() {
        let from_segments = numbers.iter().find_map(|number| {
            let file = disk.open(&segment::name(*number)).ok()?;
            let header = segment::decode_header(&file.read_at(0, SEGMENT_HEADER_LEN).ok()?);
            header.ok().map(|(store, _)| store)
        });
        store = from_segments.ok_or_else(|| {
            format(FormatError::Damaged("it is lost, and no segment tells whose they are"))
        })?;
        report.findings.push(Finding::IdentityRestored { store });
    }
    write_identity(disk, names, store)?;
    Ok(store)
}

fn write_identity(disk: &dyn Disk, names: &[String], store: StoreId) -> Result<(), OpenError> {
    let name = identity::TEMPORARY_NAME;
    if names.iter().any(|found| found == name) {
        disk.unlink(name).map_err(io_error("remove", name))?;
    }
    let file = disk.create(name).map_err(io_error("create", name))?;
    let bytes = identity::encode(store);
    file.write_at(0, &mut [std::io::IoSlice::new(&bytes)]).map_err(io_error("write", name))?;
    file.sync().map_err(io_error("sync", name))?;
    disk.rename(name, identity::NAME).map_err(io_error("rename", name))?;
    disk.sync_dir().map_err(io_error("sync", "the directory"))
}

struct Recovery<'a> {
    disk: &'a dyn Disk,
    store: StoreId,
    index: Index,
    segments: Segments,
    report: RecoveryReport,
    names: &'a [String],
}

impl Recovery<'_> {
    /// Takes in one segment; says whether the store can go on with it.
    fn segment(&mut self, number: u32, is_last: bool) -> Result<Option<Tail>, OpenError> {
        let name = segment::name(number);
        let file = self.disk.open(&name).map_err(io_error("open", &name))?;
        let len = file.length().map_err(io_error("measure", &name))?;
        let Some(good_header) = self.check_header(&*file, &name)? else {
            return Ok(None);
        };
        let listing = self.listing(number)?;
        let contents = match listing {
            Some((summary, entries)) if summary.segment_len == len => {
                let unreadable = summary.unreadable;
                let damaged = entries.iter().any(|entry| entry.damaged);
                let closed = !good_header || unreadable > 0 || damaged;
                Contents { entries, unreadable, len, closed, listed: true }
            }
            outdated => {
                self.report.segments_scanned += 1;
                let listed_len = outdated.as_ref().map_or(0, |(summary, _)| summary.segment_len);
                let place = (self.store, number);
                let mut contents =
                    read_segment(&*file, place, (is_last, listed_len), &mut self.report)?;
                contents.closed |= !good_header;
                if let Some((summary, entries)) = outdated {
                    self.compare(&name, &contents, summary, &entries);
                }
                contents
            }
        };
        if contents.unreadable > 0 && contents.listed {
            let (offset, len) = (0, contents.unreadable);
            self.report.findings.push(Finding::UnreadableBytes { segment: name, offset, len });
        }
        let segment = Segment::new(number, file, contents.len, contents.unreadable);
        let segment = Arc::new(segment);
        self.segments.insert(Arc::clone(&segment));
        contents.entries.iter().for_each(|entry| self.apply(&segment, entry));
        let mut entries = Vec::with_capacity(contents.entries.len() * listing::ENTRY_LEN);
        contents.entries.iter().for_each(|entry| entry.encode(&mut entries));
        // Behind an end that is no place of a record, nothing could be found again.
        let fit = !contents.closed && contents.len.is_multiple_of(segment::ALIGN);
        if is_last && fit {
            return Ok(Some(Tail { segment, entries }));
        }
        if !contents.listed {
            let summary = Summary {
                segment: number,
                segment_len: contents.len,
                unreadable: contents.unreadable,
            };
            // Without it the next start scans the segment again; a full disk must not stop this one.
            if let Err(error) = write_listing(self.disk, self.store, summary, &entries) {
                tracing::warn!(segment = number, %error, "cannot write the listing of a segment");
            }
        }
        Ok(None)
    }

    /// Whether a segment's header is good; `None` when the file is not to be used.
    fn check_header(&mut self, file: &dyn DiskFile, name: &str) -> Result<Option<bool>, OpenError> {
        let bytes = file.read_at(0, SEGMENT_HEADER_LEN).unwrap_or_default();
        match segment::decode_header(&bytes) {
            Ok((store, _)) if store != self.store => {
                let segment = name.to_owned();
                self.report.findings.push(Finding::ForeignSegment { segment, store });
                Ok(None)
            }
            Ok((_, number)) => Ok(Some(segment::number(name) == Some(number))),
            Err(source @ FormatError::Newer { .. }) => {
                Err(OpenError::Format { file: name.to_owned(), source })
            }
            Err(_) => {
                // One that was made just before a power cut holds nothing.
                let len = file.length().map_err(io_error("measure", name))?;
                if len > SEGMENT_HEADER_LEN as u64 {
                    let segment = name.to_owned();
                    self.report.findings.push(Finding::DamagedSegmentHeader { segment });
                }
                Ok(Some(false))
            }
        }
    }

    /// The listing of a segment, when it has a good one.
    fn listing(&mut self, number: u32) -> Result<Option<(Summary, Vec<Entry>)>, OpenError> {
        let name = listing::name(number);
        if !self.names.contains(&name) {
            return Ok(None);
        }
        match read_listing(self.disk, self.store, number) {
            Ok(read) => Ok(Some(read)),
            Err(detail) => {
                // Made just before a power cut, or damaged since: in either case it is made again.
                self.disk.unlink(&name).map_err(io_error("remove", &name))?;
                self.report.findings.push(Finding::DamagedListing { listing: name, detail });
                Ok(None)
            }
        }
    }

    /// A segment that is not as long as its listing says: cut off since, or appended to since.
    fn compare(&mut self, name: &str, found: &Contents, summary: Summary, listed: &[Entry]) {
        let Some(missing_bytes) = summary.segment_len.checked_sub(found.len).filter(|n| *n > 0)
        else {
            return;
        };
        let lost = |entry: &&Entry| {
            let start = u64::from(entry.unit) * segment::ALIGN;
            entry.event == Event::Put && start + segment::frame_len(entry.stored_len) > found.len
        };
        let missing_records = listed.iter().filter(lost).count() as u64;
        let segment = name.to_owned();
        let finding = Finding::TruncatedSegment { segment, missing_bytes, missing_records };
        self.report.findings.push(finding);
    }

    /// What a record of the log does to the index.
    fn apply(&self, segment: &Segment, entry: &Entry) {
        let Entry { key, generation, stored_len, damaged, .. } = *entry;
        let location = Location { segment: segment.number, unit: entry.unit };
        let before = self.index.get(&key);
        match entry.event {
            Event::Put => {
                segment.add_live(segment::frame_len(stored_len));
                // Its own generation counts alone: a copy made by compaction has the latest, and an
                // older copy may be one whose tombstone was carried further on.
                let state = State { location, stored_len, generation, damaged };
                self.index.insert(&key, state);
                if let Some(before) = before {
                    self.retire(before, segment.number);
                }
            }
            Event::Touch => {
                self.index.update(&key, |state| {
                    state.generation = state.generation.max(generation);
                });
            }
            Event::Tombstone(target) => {
                let Some(before) = before.filter(|before| before.location <= target) else {
                    return;
                };
                self.index.remove(&key);
                self.retire(before, target.segment);
            }
        }
    }

    /// A copy that counts no more because of something in segment `successor`.
    fn retire(&self, copy: State, successor: u32) {
        let number = copy.location.segment;
        if let Some(segment) = self.segments.get(number) {
            segment.remove_live(segment::frame_len(copy.stored_len));
        }
        if number != successor {
            self.segments.mark_leftover(number);
        }
    }

    /// Listings whose segments are gone.
    fn lost_segments(&mut self, numbers: &BTreeSet<u32>) -> Result<(), OpenError> {
        for name in self.names {
            let Some(number) = listing::number(name).filter(|n| !numbers.contains(n)) else {
                continue;
            };
            if let Ok((_, entries)) = read_listing(self.disk, self.store, number) {
                let is_put = |entry: &&Entry| entry.event == Event::Put;
                let missing_records = entries.iter().filter(is_put).count() as u64;
                let segment = segment::name(number);
                let finding = Finding::MissingSegment { segment, missing_records };
                self.report.findings.push(finding);
            } else {
                self.disk.unlink(name).map_err(io_error("remove", name))?;
            }
        }
        Ok(())
    }
}

/// What a closed segment holds: from its listing, or else from the segment itself.
pub(crate) fn entries_of(
    disk: &dyn Disk,
    store: StoreId,
    segment: &Segment,
) -> Result<Vec<Entry>, FormatError> {
    match read_listing(disk, store, segment.number) {
        Ok((summary, entries)) if summary.segment_len == segment.len() => Ok(entries),
        _ => Ok(scan(&*segment.file, segment.len(), store, segment.number)?.entries),
    }
}

/// Reads the listing of a segment; the error says what is wrong with it.
pub(crate) fn read_listing(
    disk: &dyn Disk,
    store: StoreId,
    number: u32,
) -> Result<(Summary, Vec<Entry>), String> {
    let read = || {
        let file = disk.open(&listing::name(number))?;
        file.read_at(0, file.length()? as usize)
    };
    let bytes = read().map_err(|error| error.to_string())?;
    let (summary, entries) = listing::decode(&bytes, store).map_err(|error| error.to_string())?;
    if summary.segment != number {
        return Err(format!("it is the listing of segment {:08x}", summary.segment));
    }
    Ok((summary, entries))
}

/// Writes the listing of a segment whose bytes are durable.
pub(crate) fn write_listing(
    disk: &dyn Disk,
    store: StoreId,
    summary: Summary,
    entries: &[u8],
) -> std::io::Result<()> {
    let name = listing::name(summary.segment);
    match disk.unlink(&name) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.create(&name)?;
    let bytes = listing::encode(store, summary, entries);
    let written = file
        .write_at(0, &mut [std::io::IoSlice::new(&bytes)])
        .and_then(|()| file.sync())
        .and_then(|()| disk.sync_dir());
    if written.is_err() {
        disk.unlink(&name)?;
    }
    written
}
