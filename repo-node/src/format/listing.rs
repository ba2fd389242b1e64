//! The `.idx` file of a segment: what the segment holds, without the payloads.
//!
//! It is written when a segment is full, or at a clean stop, after the segment itself was synced.
//! A start then reads 64 bytes for each record instead of the whole segment. It counts only while
//! the segment is as long as it says; when it is missing, damaged or out of date, the segment is
//! scanned and it is written again. It is unlinked before its segment, so a listing without its
//! segment tells that a segment was lost.

use blobcr_proto::codec::{PLAIN_LEN_MAX, crc32c};

use super::{Event, Fields, FormatError, Key, Location, StoreId, key_from, kind_code};

const MAGIC: [u8; 8] = *b"BLOBCRSX";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
/// Bytes of an entry.
pub(crate) const ENTRY_LEN: usize = 64;

/// Name of a segment's listing.
pub(crate) fn name(segment: u32) -> String {
    format!("{segment:08x}.idx")
}

/// The segment whose listing has this name.
pub(crate) fn number(file_name: &str) -> Option<u32> {
    let digits = file_name.get(..8)?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    (name(number) == file_name).then_some(number)
}

/// One record of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What it says.
    pub(crate) event: Event,
    /// About which key.
    pub(crate) key: Key,
    /// Generation in its header.
    pub(crate) generation: u64,
    /// Where it begins, in units.
    pub(crate) unit: u32,
    /// Bytes of its payload.
    pub(crate) stored_len: u32,
    /// Its payload did not match its checksum when the segment was scanned.
    pub(crate) damaged: bool,
}

impl Entry {
    /// event 1 · kind 1 · shard 1 · damaged 1 · pool 4 · id 32 · generation 8 · unit 4 · `stored_len` 4 ·
    /// a tombstone's segment 4 and unit 4.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let record = self.key.record;
        let target = match self.event {
            Event::Tombstone(target) => target,
            Event::Put | Event::Touch => Location { segment: 0, unit: 0 },
        };
        let damaged = u8::from(self.damaged);
        out.extend([self.event.code(), kind_code(record.kind), record.shard, damaged]);
        out.extend(self.key.pool.to_le_bytes());
        out.extend(record.id.0);
        out.extend(self.generation.to_le_bytes());
        for field in [self.unit, self.stored_len, target.segment, target.unit] {
            out.extend(field.to_le_bytes());
        }
    }

    fn decode(bytes: &[u8; ENTRY_LEN]) -> Result<Self, FormatError> {
        let mut fields = Fields(bytes);
        let [event, kind, shard, damaged] = fields.take();
        let key = key_from(fields.u32(), kind, shard, fields.take())?;
        let (generation, unit, stored_len) = (fields.u64(), fields.u32(), fields.u32());
        if stored_len as usize > PLAIN_LEN_MAX {
            // A reader would ask for so much memory.
            return Err(FormatError::Damaged("longer than any record may be"));
        }
        let target = Location { segment: fields.u32(), unit: fields.u32() };
        let event = match event {
            1 => Event::Put,
            2 => Event::Touch,
            3 => Event::Tombstone(target),
            _ => return Err(FormatError::Damaged("unknown event")),
        };
        Ok(Self { event, key, generation, unit, stored_len, damaged: damaged != 0 })
    }
}

/// What a listing says of its segment as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Number of the segment.
    pub(crate) segment: u32,
    /// Its length in bytes.
    pub(crate) segment_len: u64,
    /// Bytes between its records that could not be read as records.
    pub(crate) unreadable: u64,
}

/// The whole file, from entries as [`Entry::encode`] wrote them:
/// magic 8 · version 4 · segment 4 · store 16 · segment's length 8 · unreadable 8 · entries 4 · zeros 4 ·
/// CRC-32C of the entries 4 · CRC-32C of all before 4 · entries.
pub(crate) fn encode(store: StoreId, summary: Summary, entries: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN + entries.len());
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(summary.segment.to_le_bytes());
    out.extend(store.0);
    out.extend(summary.segment_len.to_le_bytes());
    out.extend(summary.unreadable.to_le_bytes());
    out.extend(((entries.len() / ENTRY_LEN) as u32).to_le_bytes());
    out.extend([0; 4]);
    out.extend(crc32c(entries).to_le_bytes());
    out.extend(crc32c(&out).to_le_bytes());
    out.extend(entries);
    out
}

/// Reads a listing of `store`.
pub(crate) fn decode(bytes: &[u8], store: StoreId) -> Result<(Summary, Vec<Entry>), FormatError> {
    if bytes.len() < HEADER_LEN || !bytes.starts_with(&MAGIC) {
        return Err(FormatError::Damaged("not a listing"));
    }
    let (header, entries) = bytes.split_at(HEADER_LEN);
    let mut fields = Fields(&header[8..]);
    let (version, segment, owner) = (fields.u32(), fields.u32(), StoreId(fields.take()));
    let (segment_len, unreadable, count) = (fields.u64(), fields.u64(), fields.u32());
    let reserved = fields.zeros::<4>();
    let entries_crc = fields.u32();
    if fields.u32() != crc32c(&header[..HEADER_LEN - 4]) {
        return Err(FormatError::Damaged("wrong checksum"));
    }
    if version != VERSION {
        return Err(FormatError::Newer { found: version, known: VERSION });
    }
    reserved?;
    if owner != store {
        return Err(FormatError::Foreign(owner));
    }
    if entries.len() != count as usize * ENTRY_LEN || entries_crc != crc32c(entries) {
        return Err(FormatError::Damaged("its entries are cut off or have the wrong checksum"));
    }
    let (entries, rest) = entries.as_chunks::<ENTRY_LEN>();
    debug_assert!(rest.is_empty(), "the length was checked");
    let entries = entries.iter().map(Entry::decode).collect::<Result<_, _>>()?;
    Ok((Summary { segment, segment_len, unreadable }, entries))
}

#[cfg(test)]
mod tests {
    use blobcr_proto::record::RecordKey;
    use blobcr_proto::v1::RecordKind;
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &[u8] = include_bytes!("../../tests/golden/listing.v1");
    const STORE: StoreId = StoreId(*b"sixteen bytes id");

    fn counted(first: u8) -> blobcr_proto::Hash {
        blobcr_proto::Hash(std::array::from_fn(|n| first + n as u8))
    }

    fn golden_entries() -> Vec<Entry> {
        let record = RecordKey { kind: RecordKind::Chunk, id: counted(0), shard: 3 };
        let put = Entry {
            event: Event::Put,
            key: Key { pool: 2, record },
            generation: 0x11_2233_4455,
            unit: 4,
            stored_len: 20,
            damaged: false,
        };
        let generation = 0x11_2233_4456;
        let touch = Entry { event: Event::Touch, generation, unit: 11, stored_len: 0, ..put };
        let record = RecordKey::whole(RecordKind::TreeNode, counted(100));
        let target = Location { segment: 5, unit: 0x99 };
        let tombstone = Entry {
            event: Event::Tombstone(target),
            key: Key { pool: 9, record },
            generation: 0,
            unit: 16,
            stored_len: 8,
            damaged: false,
        };
        vec![put, touch, tombstone]
    }

    #[test]
    fn golden() {
        let mut entries = Vec::new();
        golden_entries().iter().for_each(|entry| entry.encode(&mut entries));
        let segment_len = include_bytes!("../../tests/golden/segment.v1").len() as u64;
        let summary = Summary { segment: 7, segment_len, unreadable: 0 };
        assert_eq!(encode(STORE, summary, &entries), GOLDEN);
        assert_eq!(decode(GOLDEN, STORE), Ok((summary, golden_entries())));
        let other = StoreId([1; 16]);
        assert_eq!(decode(GOLDEN, other), Err(FormatError::Foreign(STORE)));
    }

    #[test]
    fn an_entry_longer_than_any_record_is_refused() {
        let summary = Summary { segment: 7, segment_len: 64, unreadable: 0 };
        for (stored_len, good) in [(PLAIN_LEN_MAX as u32, true), (u32::MAX, false)] {
            let mut entries = Vec::new();
            Entry { stored_len, ..golden_entries()[0] }.encode(&mut entries);
            assert_eq!(decode(&encode(STORE, summary, &entries), STORE).is_ok(), good);
        }
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_found() {
        for bit in 0..GOLDEN.len() * 8 {
            let mut bad = GOLDEN.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode(&bad, STORE), Err(FormatError::Damaged(_))), "bit {bit}");
        }
        for len in 0..GOLDEN.len() {
            assert!(decode(&GOLDEN[..len], STORE).is_err());
        }
    }

    proptest! {
        #[test]
        fn rubbish_entries_never_panic(bytes in prop::array::uniform32(0u8..=255), more in prop::array::uniform32(0u8..=255)) {
            let bytes = [bytes, more].concat();
            let summary = Summary { segment: 1, segment_len: 2, unreadable: 3 };
            if let Ok((_, entries)) = decode(&encode(STORE, summary, &bytes), STORE) {
                prop_assert_eq!(entries.len(), 1);
            }
        }
    }
}
