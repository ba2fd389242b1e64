//! Telling the torn end of a log, which nobody was promised, from damage to what was.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};

use crate::disk::{DiskFile, is_full};
use crate::error::OpenError;
use crate::format::StoreId;
use crate::format::listing::Entry;
use crate::format::segment::{self, ALIGN, encode_filler, frame_len};

use super::finding::{Finding, RecoveryReport};
use super::io_error;
use super::scan::{Flaw, Scan, scan};

/// Bytes that are written again at a time.
const REWRITE_BYTES: u64 = 4 << 20;

/// What one segment holds, from its listing or a scan.
pub(super) struct Contents {
    pub(super) entries: Vec<Entry>,
    /// Bytes that are no records.
    pub(super) unreadable: u64,
    /// Bytes of the segment that stay.
    pub(super) len: u64,
    /// Nothing may be appended: something before its end is not whole.
    pub(super) closed: bool,
    /// They come from a good listing.
    pub(super) listed: bool,
}

/// Reads a segment that has no listing that is right, mends its end, and makes what is left
/// durable. `listed_len` is what a listing that is out of date says.
pub(super) fn read_segment(
    file: &dyn DiskFile,
    (store, number): (StoreId, u32),
    (is_last, listed_len): (bool, u64),
    report: &mut RecoveryReport,
) -> Result<Contents, OpenError> {
    let name = segment::name(number);
    let len = file.length().map_err(io_error("measure", &name))?;
    let mut scan = scan(file, len, store, number)
        .map_err(|source| OpenError::Format { file: name.clone(), source })?;
    if scan.io_failed > 0 {
        tracing::error!(segment = name, bytes = scan.io_failed, "the disk cannot read a segment");
    }
    // Any segment but the last was synced to its end before the next was begun.
    let promised = if is_last { scan.durable.max(listed_len) } else { u64::MAX };
    let torn = take_torn(&mut scan, promised);
    let unreadable = tell(&scan, &name, report);
    let mut contents = Contents {
        entries: scan.entries,
        unreadable,
        // With all of the last record's padding, so that the next begins where it may.
        len: len.max(scan.end),
        closed: !scan.flaws.is_empty(),
        listed: false,
    };
    if let Some((offset, _)) = torn.first() {
        // What had been promised stays, even if it is damaged: a header tells whose it was.
        contents.len = scan.end.max(promised.min(len));
        let finding =
            Finding::TornTail { segment: name.clone(), offset: *offset, len: len - offset };
        report.findings.push(finding);
        let mended = mend(file, (store, number), &torn, contents.len);
        match mended {
            Err(error) if is_full(&error) => contents.closed = true,
            mended => mended.map_err(io_error("mend", &name))?,
        }
    } else if contents.len > len {
        file.truncate(contents.len).map_err(io_error("pad", &name))?;
    }
    // A killed process may have left whole records that are only in memory. They count from now
    // on, so they must be on the disk. Had it been a sync that failed, the kernel would take them
    // for written: so they are written again.
    rewrite(file, promised, contents.len).map_err(io_error("write again the end of", &name))?;
    file.sync().map_err(io_error("sync", &name))?;
    Ok(contents)
}

/// Writes the bytes from `at` to `end` over themselves. That is the last group at the most.
fn rewrite(file: &dyn DiskFile, mut at: u64, end: u64) -> io::Result<()> {
    while at < end {
        let bytes = file.read_at(at, (end - at).min(REWRITE_BYTES) as usize)?;
        if bytes.is_empty() {
            break;
        }
        file.write_at(at, &mut [IoSlice::new(&bytes)])?;
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Takes out what lies behind everything promised and is not whole: (first, behind the last).
fn take_torn(scan: &mut Scan, promised: u64) -> Vec<(u64, u64)> {
    let mut torn = Vec::new();
    let mut torn_units = BTreeSet::new();
    let entries = &scan.entries;
    scan.flaws.retain(|flaw| {
        let (offset, end) = extent(entries, *flaw);
        if offset >= promised {
            torn.push((offset, end));
            torn_units.insert(offset / ALIGN);
        }
        offset < promised
    });
    let is_torn = |entry: &Entry| entry.damaged && torn_units.contains(&u64::from(entry.unit));
    // Those that stay lie before those that go, so the flaws' numbers stay right.
    scan.entries.retain(|entry| !is_torn(entry));
    torn
}

fn extent(entries: &[Entry], flaw: Flaw) -> (u64, u64) {
    match flaw {
        Flaw::Gap(offset, end) => (offset, end),
        Flaw::Payload(at) => {
            let offset = u64::from(entries[at].unit) * ALIGN;
            (offset, offset + frame_len(entries[at].stored_len))
        }
    }
}

/// Reports damage to what had been promised; returns the bytes that are no records.
fn tell(scan: &Scan, name: &str, report: &mut RecoveryReport) -> u64 {
    let mut unreadable = 0;
    for flaw in &scan.flaws {
        let segment = name.to_owned();
        let (offset, end) = extent(&scan.entries, *flaw);
        report.findings.push(match flaw {
            Flaw::Payload(at) => {
                let id = scan.entries[*at].key.record.id;
                Finding::DamagedRecord { segment, offset, id }
            }
            Flaw::Gap(..) => {
                unreadable += end - offset;
                Finding::UnreadableBytes { segment, offset, len: end - offset }
            }
        });
    }
    unreadable
}

/// Cuts a segment to `len`, and writes fillers over what is torn before that, so that it will not
/// be taken for damage once more has been written behind it.
fn mend(
    file: &dyn DiskFile,
    (store, number): (StoreId, u32),
    torn: &[(u64, u64)],
    len: u64,
) -> io::Result<()> {
    file.truncate(len)?;
    for (offset, end) in torn.iter().filter(|(offset, _)| *offset < len) {
        for (at, bytes) in encode_filler(store, number, *offset, *end) {
            file.write_at(at, &mut [IoSlice::new(&bytes)])?;
        }
    }
    Ok(())
}
