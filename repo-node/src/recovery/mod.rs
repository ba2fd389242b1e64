//! Opening a store: from the files of a directory to an index, whatever happened to them.
//!
//! Segments are read in order of their numbers, which is the order in which they were written. A
//! segment that has its listing is not read itself; the last segment has one only after a clean
//! stop. What was found wrong is told in a [`RecoveryReport`], and costs nothing but itself.

mod scan;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::disk::{Disk, DiskFile};
use crate::error::OpenError;
use crate::format::listing::{Entry, Summary};
use crate::format::segment::{self, SEGMENT_HEADER_LEN};
use crate::format::{Event, FormatError, Location, StoreId, identity, listing};
use crate::index::{Index, State};
use crate::segments::{Segment, Segments};
use scan::{Flaw, Scan, scan};

/// What the start of a store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// What was wrong, and what it means: a line each. Empty after a clean stop of a sound store.
    pub findings: Vec<Finding>,
    /// Segments that had to be read, because they had no good listing.
    pub segments_scanned: u32,
    /// All segments.
    pub segments: u32,
    /// Records in the index.
    pub records: u64,
}

/// One thing that the start of a store found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The last write before the stop was cut short. It had not been acknowledged.
    TornTail {
        /// File.
        segment: String,
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A stretch of a segment is not readable as records.
    UnreadableBytes {
        /// File.
        segment: String,
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A record's payload does not match its checksum.
    DamagedRecord {
        /// File.
        segment: String,
        /// Where it begins.
        offset: u64,
        /// Identity of the record.
        id: blobcr_proto::Hash,
    },
    /// A segment is shorter than when it was closed.
    TruncatedSegment {
        /// File.
        segment: String,
        /// Bytes that are missing.
        missing_bytes: u64,
        /// Records that are missing.
        missing_records: u64,
    },
    /// A segment is gone altogether.
    MissingSegment {
        /// File.
        segment: String,
        /// Records that are missing.
        missing_records: u64,
    },
    /// The listing of a segment was damaged, and has been made again from the segment.
    DamagedListing {
        /// File.
        listing: String,
        /// What was wrong with it.
        detail: String,
    },
    /// The header of a segment was damaged; its records are still found by their own headers.
    DamagedSegmentHeader {
        /// File.
        segment: String,
    },
    /// A file belongs to another store, and is not used.
    ForeignSegment {
        /// File.
        segment: String,
        /// The other store.
        store: StoreId,
    },
    /// The node's identity file was lost, and has been made again from the segments.
    IdentityRestored {
        /// The identity.
        store: StoreId,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TornTail { segment, offset, len } => write!(
                f,
                "{segment}: the last write, {len} bytes at {offset}, was cut short by the stop; \
                 nothing of it had been acknowledged: nothing to do"
            ),
            Self::UnreadableBytes { segment, offset, len } => write!(
                f,
                "{segment}: {len} bytes at {offset} are damaged and the records in them lost; run \
                 `blobcr scrub` to restore them from other nodes, and check the disk"
            ),
            Self::DamagedRecord { segment, offset, id } => write!(
                f,
                "{segment}: record {id} at {offset} is damaged; run `blobcr scrub` to restore it \
                 from other nodes, and check the disk"
            ),
            Self::TruncatedSegment { segment, missing_bytes, missing_records } => write!(
                f,
                "{segment}: its last {missing_bytes} bytes with {missing_records} records are \
                 missing; run `blobcr scrub` to restore them from other nodes, and check the disk"
            ),
            Self::MissingSegment { segment, missing_records } => write!(
                f,
                "{segment} with {missing_records} records is missing; put the file back and \
                 restart, or run `blobcr scrub` to restore them from other nodes"
            ),
            Self::DamagedListing { listing, detail } => write!(
                f,
                "{listing}: {detail}; it has been made again from its segment: nothing to do"
            ),
            Self::DamagedSegmentHeader { segment } => write!(
                f,
                "{segment}: its header is damaged; its records are still found by their own: check \
                 the disk"
            ),
            Self::ForeignSegment { segment, store } => write!(
                f,
                "{segment} belongs to store {store} and is not used; move it to that store's \
                 directory"
            ),
            Self::IdentityRestored { store } => write!(
                f,
                "the file {} was missing or damaged and has been made again from the segments: \
                 this is node {store}; check the disk",
                identity::NAME
            ),
        }
    }
}

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

/// The entries of one segment, from its listing or a scan.
struct Contents {
    entries: Vec<Entry>,
    unreadable: u64,
    /// Bytes of the segment that stay.
    len: u64,
    /// Nothing may be appended: something before its end is not whole.
    closed: bool,
    /// They come from a good listing.
    listed: bool,
}

impl Recovery<'_> {
    /// Takes in one segment; says whether the store can go on with it.
    fn segment(&mut self, number: u32, is_last: bool) -> Result<Option<Tail>, OpenError> {
        let name = segment::name(number);
        let file = self.disk.open(&name).map_err(io_error("open", &name))?;
        let len = file.length().map_err(io_error("measure", &name))?;
        let Some(good_header) = self.check_header(&*file, &name, is_last)? else {
            return Ok(None);
        };
        let listing = self.listing(number)?;
        let contents = match listing {
            Some((summary, entries)) if summary.segment_len == len => {
                let unreadable = summary.unreadable;
                let closed = !good_header || unreadable > 0;
                Contents { entries, unreadable, len, closed, listed: true }
            }
            outdated => {
                self.report.segments_scanned += 1;
                let mut contents = self.scanned(&*file, &name, number, is_last)?;
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
        if is_last && !contents.closed {
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
    fn check_header(
        &mut self,
        file: &dyn DiskFile,
        name: &str,
        is_last: bool,
    ) -> Result<Option<bool>, OpenError> {
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
                // The last one may have been made just before a power cut; then it holds nothing.
                let len = file.length().map_err(io_error("measure", name))?;
                if !is_last || len > SEGMENT_HEADER_LEN as u64 {
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

    fn scanned(
        &mut self,
        file: &dyn DiskFile,
        name: &str,
        number: u32,
        is_last: bool,
    ) -> Result<Contents, OpenError> {
        let len = file.length().map_err(io_error("measure", name))?;
        let scan = scan(file, len, self.store, number)
            .map_err(|source| OpenError::Format { file: name.to_owned(), source })?;
        let contents = self.judge(scan, name, len, is_last);
        if contents.len < len {
            file.truncate(contents.len).map_err(io_error("truncate", name))?;
        }
        // A killed process may have left whole records that are only in memory. They count from
        // now on, so they must be on the disk.
        file.sync().map_err(io_error("sync", name))?;
        Ok(contents)
    }

    /// Tells the torn end of a log, which nobody was promised, from damage to what was.
    fn judge(&mut self, scan: Scan, name: &str, len: u64, is_last: bool) -> Contents {
        let promised = if is_last { scan.durable } else { u64::MAX };
        // What had been synced stays, even if it is damaged: a header tells whose it was.
        let end = if is_last { scan.end.max(scan.durable.min(len)) } else { len };
        let segment = || name.to_owned();
        let mut torn = BTreeSet::new();
        let mut torn_at = None;
        let (mut unreadable, mut closed) = (0, false);
        for flaw in scan.flaws {
            let (offset, flaw_end) = match flaw {
                Flaw::Payload(at) => {
                    let entry = &scan.entries[at];
                    let offset = u64::from(entry.unit) * segment::ALIGN;
                    (offset, offset + segment::frame_len(entry.stored_len))
                }
                Flaw::Gap(offset, end) => (offset, end),
            };
            closed |= offset < end;
            match flaw {
                _ if offset >= promised => {
                    torn_at.get_or_insert(offset);
                    if let Flaw::Payload(at) = flaw {
                        torn.insert(at);
                    }
                }
                Flaw::Payload(at) => {
                    let id = scan.entries[at].key.record.id;
                    let segment = segment();
                    self.report.findings.push(Finding::DamagedRecord { segment, offset, id });
                }
                Flaw::Gap(..) => {
                    let len = flaw_end - offset;
                    unreadable += len;
                    let segment = segment();
                    self.report.findings.push(Finding::UnreadableBytes { segment, offset, len });
                }
            }
        }
        if let Some(offset) = torn_at {
            let (segment, len) = (segment(), len - offset);
            self.report.findings.push(Finding::TornTail { segment, offset, len });
        }
        let numbered = scan.entries.into_iter().enumerate();
        let entries = numbered.filter(|(at, _)| !torn.contains(at)).map(|(_, entry)| entry);
        let entries = entries.collect();
        Contents { entries, unreadable, len: end, closed, listed: false }
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
                let generation = before.map_or(generation, |b| b.generation.max(generation));
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
