//! The `journal` file: the durable form of the map's presence bits. A flush appends what changed;
//! after a host crash the map is made from it.
//!
//! ```text
//! head     one frame (magic "BCDJ"): which disk and generation, padded to 4096 bytes
//! batches  offset  bytes
//!               0      4  magic "BCJB"
//!               4      4  entries in the batch
//!               8      8  number of the batch in this file: 1, 2, …
//!              16      4  CRC-32C of bytes 0..16 and of the entries
//!              20      4  zero
//!              24      …  entries: chunk index, then its presence words, each of 8 bytes
//! ```
//! All numbers are little endian. Presence bits are only ever added, so entries are combined by
//! *or* and their order does not matter. A flush writes the delta's fdatasync **before** the batch,
//! so an entry that can be read is about bytes that are durable.
//!
//! A batch is written only when all before it are durable. So one that does not check ends the
//! journal if nothing whole follows it: it was never acknowledged. If something does follow, the journal is damaged in the middle and the disk is
//! refused, for acknowledged writes would be missing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blobcr_proto::codec::crc32c;

use super::DiskError;
use super::files::Files;
use super::frame::{self, Kind};
use super::io::Which;
use super::map::Identity;

/// Versions: 1, the first.
const KIND: Kind = Kind { magic: *b"BCDJ", version: 1 };
const HEAD_BYTES: u64 = 4096;
const BATCH_MAGIC: [u8; 4] = *b"BCJB";
const BATCH_HEADER: usize = 24;
const CRC_AT: usize = 16;
/// Entries in a batch at most: bounds the memory of a writer and of a reader.
const BATCH_ENTRIES_MAX: usize = 4096;
/// A journal is rewritten when it is this many times as long as after the last rewrite, …
const GROWTH_FACTOR: u64 = 4;
/// … but not before it has this many bytes: a small one is read in no time.
const REWRITE_BYTES_MIN: u64 = 1 << 20;

/// The presence of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) chunk: u64,
    pub(super) presence: Vec<u64>,
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    files: Arc<Files>,
    path: PathBuf,
    file: File,
    identity: Identity,
    /// Words of an entry's presence.
    words: usize,
    /// Number of the next batch.
    next: u64,
    /// Where it goes.
    end: u64,
    /// The end after the last rewrite, as far as this process knows.
    compact_end: u64,
}

fn encode_batch(number: u64, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BATCH_HEADER + entries.len() * 16);
    bytes.extend(BATCH_MAGIC);
    bytes.extend((entries.len() as u32).to_le_bytes());
    bytes.extend(number.to_le_bytes());
    let mut body = Vec::with_capacity(entries.len() * 16);
    for entry in entries {
        body.extend(entry.chunk.to_le_bytes());
        body.extend(entry.presence.iter().flat_map(|word| word.to_le_bytes()));
    }
    let crc = crc32c(&[&bytes[..CRC_AT], &body[..]].concat());
    bytes.extend(crc.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The batch at the head of `bytes`: its number, its entries' bytes, and its length.
fn decode_batch(bytes: &[u8], words: usize) -> Option<(u64, &[u8], usize)> {
    let header = bytes.get(..BATCH_HEADER)?;
    if header[..4] != BATCH_MAGIC {
        return None;
    }
    let count = u32::from_le_bytes(header[4..8].try_into().ok()?) as usize;
    if count == 0 || count > BATCH_ENTRIES_MAX {
        return None;
    }
    let len = BATCH_HEADER + count * (1 + words) * 8;
    let body = bytes.get(BATCH_HEADER..len)?;
    let crc = u32::from_le_bytes(header[CRC_AT..CRC_AT + 4].try_into().ok()?);
    if crc32c(&[&header[..CRC_AT], body].concat()) != crc {
        return None;
    }
    Some((word(header, 8)?, body, len))
}

impl Journal {
    /// Makes an empty journal, durable after [`Self::sync`] but for its name.
    pub(super) fn create(
        files: &Arc<Files>,
        path: &Path,
        words: usize,
        identity: &Identity,
    ) -> Result<Self, DiskError> {
        let file = files.create(Which::Journal, path)?;
        let mut head = frame::encode(KIND, identity);
        head.resize(HEAD_BYTES as usize, 0);
        files.write_all_at(Which::Journal, &file, &head, 0)?;
        Ok(Self {
            files: Arc::clone(files),
            path: path.to_owned(),
            file,
            identity: identity.clone(),
            words,
            next: 1,
            end: HEAD_BYTES,
            compact_end: HEAD_BYTES,
        })
    }

    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.files.sync_data(Which::Journal, &self.file)
    }

    /// Opens a journal, shows every entry, and cuts off a batch that was never acknowledged.
    pub(super) fn open(
        files: &Arc<Files>,
        path: &Path,
        words: usize,
        identity: &Identity,
        mut visit: impl FnMut(u64, &[u64]) -> Result<(), DiskError>,
    ) -> Result<Self, DiskError> {
        let file = files.open(Which::Journal, path)?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut &file, &mut bytes)
            .map_err(|error| files.error(Which::Journal, "read", error))?;
        let damaged = |detail: String| files.damaged(Which::Journal, detail);
        let head: Identity = frame::decode(KIND, &bytes).map_err(damaged)?;
        if head != *identity {
            return Err(damaged("it belongs to another disk".into()));
        }
        let mut at = HEAD_BYTES as usize;
        let mut next = 1;
        let mut presence = vec![0; words];
        while let Some((number, body, len)) =
            bytes.get(at..).and_then(|rest| decode_batch(rest, words))
        {
            if number != next {
                return Err(damaged(format!("batch {number} is in the place of batch {next}")));
            }
            for entry in body.chunks_exact((1 + words) * 8) {
                let mut fields = entry.chunks_exact(8).filter_map(|field| word(field, 0));
                let chunk = fields.next().unwrap_or(u64::MAX);
                presence.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
                visit(chunk, &presence)?;
            }
            at += len;
            next += 1;
        }
        if let Some(number) = whole_batch_behind(&bytes, at, words, next) {
            let detail = format!("batch {next} does not check but batch {number} behind it does");
            return Err(damaged(detail));
        }
        let end = (at as u64).max(HEAD_BYTES);
        if end != bytes.len() as u64 {
            // Durably: what was cut off must not come back behind what is appended next.
            files.set_len(Which::Journal, &file, end)?;
            files.sync_data(Which::Journal, &file)?;
        }
        Ok(Self {
            files: Arc::clone(files),
            path: path.to_owned(),
            file,
            identity: identity.clone(),
            words,
            next,
            end,
            compact_end: end,
        })
    }

    /// Whether most of the journal is likely to have been superseded.
    pub(super) const fn wants_rewrite(&self) -> bool {
        self.end > REWRITE_BYTES_MIN && self.end > GROWTH_FACTOR * self.compact_end
    }

    /// Appends entries and makes them durable. When that fails for want of space, the call can be
    /// repeated: what was written of the entries until then does no harm.
    pub(super) fn append(&mut self, entries: impl Iterator<Item = Entry>) -> Result<(), DiskError> {
        let mut entries = entries.peekable();
        while entries.peek().is_some() {
            let (next, end) = (self.next, self.end);
            if let Err(error) = self.write_batch(&mut entries) {
                (self.next, self.end) = (next, end);
                // Should this fail too, the next append overwrites the rest: numbers are the same.
                let _ = self.file.set_len(end);
                return Err(error);
            }
            // Before the next one is written: of two batches that are not durable yet, a host crash
            // may leave the second alone, and that would be taken for damage to the first.
            self.files.sync_data(Which::Journal, &self.file)?;
        }
        Ok(())
    }

    fn write_batch(&mut self, entries: &mut impl Iterator<Item = Entry>) -> Result<(), DiskError> {
        let batch: Vec<_> = entries.take(BATCH_ENTRIES_MAX).collect();
        debug_assert!(batch.iter().all(|entry| entry.presence.len() == self.words));
        let bytes = encode_batch(self.next, &batch);
        self.files.write_all_at(Which::Journal, &self.file, &bytes, self.end)?;
        self.next += 1;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Replaces the journal by one that holds just `entries`, durably and at once.
    pub(super) fn rewrite(
        &mut self,
        entries: impl Iterator<Item = Entry>,
    ) -> Result<(), DiskError> {
        let temporary = self.path.with_extension("tmp");
        let mut new = match self.written_anew(&temporary, entries) {
            Ok(new) => new,
            Err(error) => {
                // It must not take space for nothing.
                let _ = std::fs::remove_file(&temporary);
                return Err(error);
            }
        };
        new.compact_end = new.end;
        self.files.rename(Which::Journal, &temporary, &self.path)?;
        new.path.clone_from(&self.path);
        *self = new;
        Ok(())
    }

    fn written_anew(
        &self,
        path: &Path,
        entries: impl Iterator<Item = Entry>,
    ) -> Result<Self, DiskError> {
        let mut new = Self::create(&self.files, path, self.words, &self.identity)?;
        let mut entries = entries.peekable();
        while entries.peek().is_some() {
            new.write_batch(&mut entries)?;
        }
        // One sync for all of it: nobody reads it before it has its name.
        self.files.sync_data(Which::Journal, &new.file)?;
        Ok(new)
    }
}

/// The number of a whole batch of this file behind byte `at`, if there is any. Batches are
/// multiples of 8 bytes long.
fn whole_batch_behind(bytes: &[u8], at: usize, words: usize, next: u64) -> Option<u64> {
    let places = (at..bytes.len()).step_by(8);
    places
        .filter_map(|at| decode_batch(&bytes[at..], words))
        .map(|(number, ..)| number)
        .find(|number| *number > next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::HostFiles;
    use std::collections::BTreeMap;

    fn identity() -> Identity {
        Identity { uid: vec![1; 16], generation: 1, size_bytes: 1 << 30, chunk_size: 65536 }
    }

    fn files() -> Arc<Files> {
        Files::new("d".into(), Arc::new(HostFiles))
    }

    fn entry(chunk: u64, bits: u64) -> Entry {
        Entry { chunk, presence: vec![bits] }
    }

    fn read(path: &Path) -> Result<(Journal, BTreeMap<u64, u64>), DiskError> {
        let mut seen = BTreeMap::new();
        let journal = Journal::open(&files(), path, 1, &identity(), |chunk, presence| {
            *seen.entry(chunk).or_default() |= presence[0];
            Ok(())
        })?;
        Ok((journal, seen))
    }

    #[test]
    fn golden_batch_of_version_1() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&files(), &path, 1, &identity()).unwrap();
        journal.append([entry(1, 3), entry(700, u64::MAX)].into_iter()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let (head, batch) = (&whole[..80], &whole[HEAD_BYTES as usize..]);
        let hex: String = [head, batch].concat().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, include_str!("golden/journal-v1.hex").trim());
        let (_, seen) = read(&path).unwrap();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(1, 3), (700, u64::MAX)]);
    }

    #[test]
    fn entries_come_back_and_are_combined() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&files(), &path, 1, &identity()).unwrap();
        journal.append((0..10_000).map(|chunk| entry(chunk, 1))).unwrap();
        journal.append(std::iter::empty()).unwrap();
        journal.append([entry(5, 2), entry(20_000, 4)].into_iter()).unwrap();
        let (mut journal, seen) = read(&path).unwrap();
        assert_eq!(seen.len(), 10_001);
        assert_eq!((seen[&5], seen[&6], seen[&20_000]), (3, 1, 4));
        journal.append([entry(6, 8)].into_iter()).unwrap();
        assert_eq!(read(&path).unwrap().1[&6], 9);
    }

    #[test]
    fn a_rewrite_keeps_what_it_is_given_and_can_be_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&files(), &path, 1, &identity()).unwrap();
        assert!(!journal.wants_rewrite());
        for _ in 0..100 {
            journal.append((0..1000).map(|chunk| entry(chunk, 1))).unwrap();
        }
        assert!(journal.wants_rewrite());
        journal.rewrite((0..1000).map(|chunk| entry(chunk, 7))).unwrap();
        assert!(!journal.wants_rewrite());
        journal.append([entry(3, 8)].into_iter()).unwrap();
        let (_, seen) = read(&path).unwrap();
        assert_eq!((seen.len(), seen[&2], seen[&3]), (1000, 7, 15));
    }

    #[test]
    fn a_torn_tail_is_cut_and_damage_in_the_middle_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&files(), &path, 1, &identity()).unwrap();
        for chunk in 0..4 {
            journal.append([entry(chunk, 1)].into_iter()).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        let batch = BATCH_HEADER + 16;
        let last = whole.len() - batch;
        for cut in last..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, seen) = read(&path).unwrap();
            assert_eq!(seen.len(), 3, "cut at {cut}");
            journal.append([entry(9, 1)].into_iter()).unwrap();
            assert!(read(&path).unwrap().1.contains_key(&9));
        }
        for at in HEAD_BYTES as usize..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            let padding = (at - HEAD_BYTES as usize) % batch / 4 == 5;
            match read(&path) {
                Ok((_, seen)) if padding => assert_eq!(seen.len(), 4),
                Ok((_, seen)) => assert!(at >= last && seen.len() == 3, "byte {at}"),
                Err(DiskError::Damaged { .. }) => assert!(at < last, "byte {at}"),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The host goes down in the first sync of a journal after the head's.
    #[derive(Default)]
    struct DiesInSync(std::sync::atomic::AtomicUsize);

    impl crate::disk::FileIo for DiesInSync {
        fn sync_data(&self, _: Which, file: &File) -> std::io::Result<()> {
            match self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0 => file.sync_data(),
                _ => Err(std::io::Error::other("the host went down")),
            }
        }
    }

    #[test]
    fn a_crash_in_a_long_append_is_no_damage_whatever_part_of_it_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let dying = Files::new("d".into(), Arc::new(DiesInSync::default()));
        let mut journal = Journal::create(&dying, &path, 1, &identity()).unwrap();
        journal.sync().unwrap();
        let many = 3 * BATCH_ENTRIES_MAX as u64;
        assert!(journal.append((0..many).map(|chunk| entry(chunk, 1))).is_err());
        // The last pages made it to the disk, the first one did not.
        let mut left = std::fs::read(&path).unwrap();
        left[HEAD_BYTES as usize..][..4096].fill(0);
        std::fs::write(&path, &left).unwrap();
        let (_, seen) = read(&path).expect("nothing of it had been acknowledged");
        assert!(seen.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(0u8..=255, 0..200), cut in 0usize..200) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            let mut journal = Journal::create(&files(), &path, 1, &identity()).unwrap();
            journal.append([entry(1, 1)].into_iter()).unwrap();
            let mut whole = std::fs::read(&path).unwrap();
            whole.truncate(whole.len() - cut.min(40));
            whole.extend(bytes);
            std::fs::write(&path, &whole).unwrap();
            let _ = read(&path);
        }
    }
}
