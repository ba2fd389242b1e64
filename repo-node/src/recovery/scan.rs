//! Reading a segment from end to end: what of it is whole, and what is not.

use blobcr_proto::codec::{PLAIN_LEN_MAX, crc32c};

use crate::disk::DiskFile;
use crate::format::listing::Entry;
use crate::format::segment::{
    ALIGN, HeaderEvent, Place, RECORD_HEADER_LEN, RECORD_MAGIC, RecordHeader, SEGMENT_HEADER_LEN,
    decode_tombstone,
};
use crate::format::{Event, FormatError, Location, StoreId};

/// Bytes read at a time: more than the largest record.
const WINDOW_BYTES: usize = 2 * PLAIN_LEN_MAX;

/// Bytes read at a time where a larger read failed: what a bad sector costs at the least.
const SALVAGE_BYTES: usize = 4096;

/// A stretch of a segment that is not a whole record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// A record whose payload is not what its header says (index into [`Scan::entries`]).
    Payload(usize),
    /// Bytes that are no record: (first, behind the last).
    Gap(u64, u64),
}

/// What a segment holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Its records, in order; those with a bad payload are marked.
    pub(super) entries: Vec<Entry>,
    /// What is not whole, in order.
    pub(super) flaws: Vec<Flaw>,
    /// The byte behind the last whole record and its padding. Of the padding the file may lack
    /// some.
    pub(super) end: u64,
    /// Every byte before this one had been synced before some record behind it was written.
    pub(super) durable: u64,
    /// Bytes that the disk could not read.
    pub(super) io_failed: u64,
}

/// Reads segment `number` of `store`, whose file is `len` bytes long.
///
/// # Errors
/// When it holds a record of a newer version.
pub(super) fn scan(
    file: &dyn DiskFile,
    len: u64,
    store: StoreId,
    number: u32,
) -> Result<Scan, FormatError> {
    let start = SEGMENT_HEADER_LEN as u64;
    let mut scan = Scan { end: start.min(len), durable: start, ..Scan::default() };
    let mut window = Window { file, len, base: 0, bytes: Vec::new(), io_failed: 0 };
    let mut at = start;
    while at < len {
        match read_record(&mut window, at, store, number)? {
            Read::Record { entry, durable, next } => {
                scan.durable = scan.durable.max(durable);
                let Some(entry) = entry else {
                    at = next;
                    continue;
                };
                if entry.damaged {
                    scan.flaws.push(Flaw::Payload(scan.entries.len()));
                } else {
                    scan.end = next;
                }
                scan.entries.push(entry);
                at = next;
            }
            Read::Nothing => {
                let next = find_record(&mut window, at + ALIGN, store, number)?;
                scan.flaws.push(Flaw::Gap(at, next));
                at = next;
            }
        }
    }
    scan.io_failed = window.io_failed;
    Ok(scan)
}

enum Read {
    /// A good header; a filler has no entry.
    Record {
        entry: Option<Entry>,
        durable: u64,
        next: u64,
    },
    Nothing,
}

/// The place of the next record with a good header at or behind `at`, or the end of the file.
fn find_record(
    window: &mut Window<'_>,
    mut at: u64,
    store: StoreId,
    number: u32,
) -> Result<u64, FormatError> {
    while at < window.len {
        let is_magic = window.bytes(at, RECORD_MAGIC.len()) == RECORD_MAGIC;
        if is_magic && matches!(read_record(window, at, store, number)?, Read::Record { .. }) {
            return Ok(at);
        }
        at += ALIGN;
    }
    Ok(window.len)
}

fn read_record(
    window: &mut Window<'_>,
    at: u64,
    store: StoreId,
    number: u32,
) -> Result<Read, FormatError> {
    let Ok(unit) = u32::try_from(at / ALIGN) else { return Ok(Read::Nothing) };
    let place = Place { store, location: Location { segment: number, unit } };
    let (header, durable) = match RecordHeader::decode(window.bytes(at, RECORD_HEADER_LEN), place) {
        Ok(read) => read,
        Err(newer @ FormatError::Newer { .. }) => return Err(newer),
        Err(_) => return Ok(Read::Nothing),
    };
    let next = at + header.frame_len();
    if at + RECORD_HEADER_LEN as u64 + u64::from(header.stored_len) > window.len {
        return Ok(Read::Nothing);
    }
    let payload = window.bytes(at + RECORD_HEADER_LEN as u64, header.stored_len as usize);
    let whole = crc32c(payload) == header.payload_crc;
    let event = match header.event {
        HeaderEvent::Put => Event::Put,
        HeaderEvent::Touch => Event::Touch,
        HeaderEvent::Tombstone => match decode_tombstone(payload) {
            Ok(target) if whole => Event::Tombstone(target),
            // Without its target it says nothing.
            _ => return Ok(Read::Nothing),
        },
        HeaderEvent::Filler => return Ok(Read::Record { entry: None, durable: 0, next }),
    };
    let entry = Entry {
        event,
        key: header.key,
        generation: header.generation,
        unit,
        stored_len: header.stored_len,
        damaged: !whole,
    };
    let entry = Some(entry);
    Ok(Read::Record { entry, durable: u64::from(durable) * ALIGN, next })
}

/// A file read in large pieces.
struct Window<'a> {
    file: &'a dyn DiskFile,
    len: u64,
    base: u64,
    bytes: Vec<u8>,
    io_failed: u64,
}

impl Window<'_> {
    /// `len` bytes from `at`: fewer at the end of the file.
    fn bytes(&mut self, at: u64, len: usize) -> &[u8] {
        let len = (self.len.saturating_sub(at)).min(len as u64) as usize;
        if at < self.base || at + len as u64 > self.base + self.bytes.len() as u64 {
            self.fill(at);
        }
        let start = (at - self.base) as usize;
        // A file that shrinks under the reader reads as cut off.
        let end = (start + len).min(self.bytes.len());
        &self.bytes[start.min(end)..end]
    }

    fn fill(&mut self, at: u64) {
        let want = (self.len - at).min(WINDOW_BYTES as u64) as usize;
        self.base = at;
        self.bytes = match self.file.read_at(at, want) {
            Ok(bytes) => bytes,
            Err(_) => self.salvage(at, want),
        };
    }

    /// Reads what can be read; the rest is zeros, which are no record.
    fn salvage(&mut self, at: u64, want: usize) -> Vec<u8> {
        let mut bytes = vec![0; want];
        for (n, piece) in bytes.chunks_mut(SALVAGE_BYTES).enumerate() {
            match self.file.read_at(at + (n * SALVAGE_BYTES) as u64, piece.len()) {
                Ok(read) => piece[..read.len()].copy_from_slice(&read),
                Err(_) => self.io_failed += piece.len() as u64,
            }
        }
        bytes
    }
}
