//! Segment files: the log itself.
//!
//! A segment is a 64-byte header and then records, each at a multiple of [`ALIGN`] bytes. A record
//! is an 80-byte header, its payload, and zeros up to the next multiple.
//!
//! * The header comes before the payload, so that one `pread` gets both, and so that a scan can
//!   step from record to record without reading payloads.
//! * Header and payload have checksums of their own: a payload that went bad still tells whose it
//!   was and where the next record begins.
//! * The header's checksum covers, besides the header, the store, the segment and the place in it.
//!   A scan that looks for the next good record after a damaged one therefore cannot take for a
//!   record what merely lies inside a payload: a guest's disk may well hold segments of another
//!   store, or a copy of this one.
//! * `durable` says up to where the segment had been synced before the record was written. So a
//!   scan after a crash can tell what tore in the last, unacknowledged write (at or beyond the
//!   greatest `durable` of any good record) from damage to what had been acknowledged.
//! * Segments are not preallocated. On ext4 and XFS the conversion of unwritten extents is
//!   journalled like a growing file is, so it saves no sync; and a file's length is then itself
//!   evidence of what was written.

use blobcr_proto::Hash;
use blobcr_proto::codec::{PLAIN_LEN_MAX, crc32c};
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{Codec, RecordKind};

use super::{Event, Fields, FormatError, Key, Location, StoreId, key_from, kind_code};

/// Records begin at multiples of this many bytes: places fit 32 bits up to 64 GiB, and a scan for
/// the next record looks at one place in sixteen.
pub(crate) const ALIGN: u64 = 16;

const MAGIC: [u8; 8] = *b"BLOBCRSG";
const VERSION: u32 = 1;
/// Bytes of a segment's header.
pub(crate) const SEGMENT_HEADER_LEN: usize = 64;

/// First bytes of every record.
pub(crate) const RECORD_MAGIC: [u8; 4] = *b"bcRr";
const RECORD_VERSION: u8 = 1;
/// Bytes of a record's header.
pub(crate) const RECORD_HEADER_LEN: usize = 80;
/// Payload of a tombstone: the place up to which it counts.
pub(crate) const TOMBSTONE_PAYLOAD_LEN: usize = 8;

/// The greatest number of a segment that a store starts with: at a segment a second, seventy years.
pub(crate) const NUMBER_MAX: u32 = u32::MAX / 2;

/// Bytes that a record with this payload takes in its segment.
pub(crate) fn frame_len(stored_len: u32) -> u64 {
    (RECORD_HEADER_LEN as u64 + u64::from(stored_len)).next_multiple_of(ALIGN)
}

/// Name of a segment's file.
pub(crate) fn name(segment: u32) -> String {
    format!("{segment:08x}.seg")
}

/// The segment whose file has this name.
pub(crate) fn number(file_name: &str) -> Option<u32> {
    let digits = file_name.get(..8)?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    (name(number) == file_name).then_some(number)
}

/// magic 8 · version 4 · segment 4 · store 16 · zeros 28 · CRC-32C of all before 4.
pub(crate) fn encode_header(store: StoreId, segment: u32) -> [u8; SEGMENT_HEADER_LEN] {
    let mut out = [0; SEGMENT_HEADER_LEN];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&segment.to_le_bytes());
    out[16..32].copy_from_slice(&store.0);
    let crc = crc32c(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Reads a segment's header: the store and the segment that it names.
pub(crate) fn decode_header(bytes: &[u8]) -> Result<(StoreId, u32), FormatError> {
    if bytes.len() < SEGMENT_HEADER_LEN || !bytes.starts_with(&MAGIC) {
        return Err(FormatError::Damaged("not a segment header"));
    }
    let mut fields = Fields(&bytes[8..SEGMENT_HEADER_LEN]);
    let (version, segment, store) = (fields.u32(), fields.u32(), fields.take());
    let reserved = fields.zeros::<28>();
    if fields.u32() != crc32c(&bytes[..60]) {
        return Err(FormatError::Damaged("wrong checksum"));
    }
    if version != VERSION {
        return Err(FormatError::Newer { found: version, known: VERSION });
    }
    reserved?;
    Ok((StoreId(store), segment))
}

/// The header of a record in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    /// What it says about its key. (A tombstone's place is in the payload, not in the header.)
    pub(crate) event: HeaderEvent,
    /// Whose record it is.
    pub(crate) key: Key,
    /// Generation of the writer that put or touched it; 0 in a tombstone.
    pub(crate) generation: u64,
    /// How the plain bytes were turned into the payload.
    pub(crate) codec: Codec,
    /// Plain bytes.
    pub(crate) plain_len: u32,
    /// Bytes of the payload.
    pub(crate) stored_len: u32,
    /// CRC-32C of the payload.
    pub(crate) payload_crc: u32,
}

/// As [`Event`], without what is in the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderEvent {
    /// See [`Event::Put`].
    Put,
    /// See [`Event::Touch`].
    Touch,
    /// See [`Event::Tombstone`].
    Tombstone,
    /// Bytes that mean nothing, where a write was torn; its payload's checksum does not count.
    Filler,
}

impl HeaderEvent {
    const fn code(self) -> u8 {
        match self {
            Self::Put => Event::Put.code(),
            Self::Touch => Event::Touch.code(),
            Self::Tombstone => 3,
            Self::Filler => 4,
        }
    }
}

/// Where a record's header stands, which its checksum covers too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) store: StoreId,
    pub(crate) location: Location,
}

impl RecordHeader {
    /// Bytes of the whole record in its segment.
    pub(crate) fn frame_len(&self) -> u64 {
        frame_len(self.stored_len)
    }

    /// Appends: magic 4 · version 1 · event 1 · kind 1 · codec 1 · shard 1 · zeros 3 · pool 4 · id 32 ·
    /// generation 8 · `plain_len` 4 · `stored_len` 4 · payload CRC-32C 4 · durable 4 (units) · zeros 4 ·
    /// CRC-32C of (store 16, segment 4, unit 4, all before) 4.
    pub(crate) fn encode(&self, place: Place, durable: u32, out: &mut Vec<u8>) {
        let start = out.len();
        let record = self.key.record;
        out.extend(RECORD_MAGIC);
        let codec = self.codec as i32 as u8;
        out.extend([RECORD_VERSION, self.event.code(), kind_code(record.kind), codec]);
        out.extend([record.shard, 0, 0, 0]);
        out.extend(self.key.pool.to_le_bytes());
        out.extend(record.id.0);
        out.extend(self.generation.to_le_bytes());
        out.extend(self.plain_len.to_le_bytes());
        out.extend(self.stored_len.to_le_bytes());
        out.extend(self.payload_crc.to_le_bytes());
        out.extend(durable.to_le_bytes());
        out.extend([0; 4]);
        let crc = header_crc(place, &out[start..]);
        out.extend(crc.to_le_bytes());
        debug_assert_eq!(out.len() - start, RECORD_HEADER_LEN);
    }

    /// Reads a header that stands at `place`; also its `durable`, in units.
    pub(crate) fn decode(bytes: &[u8], place: Place) -> Result<(Self, u32), FormatError> {
        if bytes.len() < RECORD_HEADER_LEN || !bytes.starts_with(&RECORD_MAGIC) {
            return Err(FormatError::Damaged("not a record header"));
        }
        let bytes = &bytes[..RECORD_HEADER_LEN];
        let mut fields = Fields(&bytes[RECORD_HEADER_LEN - 4..]);
        if fields.u32() != header_crc(place, &bytes[..RECORD_HEADER_LEN - 4]) {
            return Err(FormatError::Damaged("wrong checksum"));
        }
        let mut fields = Fields(&bytes[RECORD_MAGIC.len()..]);
        let version = fields.u8();
        if version != RECORD_VERSION {
            let known = u32::from(RECORD_VERSION);
            return Err(FormatError::Newer { found: version.into(), known });
        }
        let event = match fields.u8() {
            1 => HeaderEvent::Put,
            2 => HeaderEvent::Touch,
            3 => HeaderEvent::Tombstone,
            4 => HeaderEvent::Filler,
            _ => return Err(FormatError::Damaged("unknown event")),
        };
        let (kind, codec, shard) = (fields.u8(), fields.u8(), fields.u8());
        fields.zeros::<3>()?;
        let key = key_from(fields.u32(), kind, shard, fields.take())?;
        let codec =
            Codec::try_from(i32::from(codec)).map_err(|_| FormatError::Damaged("unknown codec"))?;
        let generation = fields.u64();
        let (plain_len, stored_len) = (fields.u32(), fields.u32());
        let (payload_crc, durable) = (fields.u32(), fields.u32());
        fields.zeros::<4>()?;
        if plain_len as usize > PLAIN_LEN_MAX || stored_len as usize > PLAIN_LEN_MAX {
            return Err(FormatError::Damaged("longer than any record may be"));
        }
        let header = Self { event, key, generation, codec, plain_len, stored_len, payload_crc };
        Ok((header, durable))
    }
}

fn header_crc(place: Place, header: &[u8]) -> u32 {
    let mut covered = [0; 24 + RECORD_HEADER_LEN - 4];
    covered[..16].copy_from_slice(&place.store.0);
    covered[16..20].copy_from_slice(&place.location.segment.to_le_bytes());
    covered[20..24].copy_from_slice(&place.location.unit.to_le_bytes());
    covered[24..].copy_from_slice(header);
    crc32c(&covered)
}

/// segment 4 · unit 4.
pub(crate) fn encode_tombstone(target: Location) -> [u8; TOMBSTONE_PAYLOAD_LEN] {
    let mut out = [0; TOMBSTONE_PAYLOAD_LEN];
    out[..4].copy_from_slice(&target.segment.to_le_bytes());
    out[4..].copy_from_slice(&target.unit.to_le_bytes());
    out
}

/// Reads the payload of a tombstone.
pub(crate) fn decode_tombstone(payload: &[u8]) -> Result<Location, FormatError> {
    if payload.len() != TOMBSTONE_PAYLOAD_LEN {
        return Err(FormatError::Damaged("not a tombstone's payload"));
    }
    let mut fields = Fields(payload);
    Ok(Location { segment: fields.u32(), unit: fields.u32() })
}

/// Headers that cover `offset..end` of a segment, which nobody was promised: (place, header).
/// Both are multiples of [`ALIGN`], and there is room for at least one header between them.
pub(crate) fn encode_filler(
    store: StoreId,
    segment: u32,
    mut offset: u64,
    end: u64,
) -> Vec<(u64, Vec<u8>)> {
    debug_assert!(offset.is_multiple_of(ALIGN) && end.is_multiple_of(ALIGN));
    // No piece leaves less than a header for the next.
    let most = PLAIN_LEN_MAX as u64 / 2;
    let mut out = Vec::new();
    while end - offset >= RECORD_HEADER_LEN as u64 {
        let len = if end - offset <= 2 * most { end - offset } else { most };
        let stored_len = (len - RECORD_HEADER_LEN as u64) as u32;
        let record = RecordKey::whole(RecordKind::Chunk, Hash([0; Hash::LEN]));
        let header = RecordHeader {
            event: HeaderEvent::Filler,
            key: Key { pool: 0, record },
            generation: 0,
            codec: Codec::Plain,
            plain_len: stored_len,
            stored_len,
            payload_crc: 0,
        };
        let unit = (offset / ALIGN) as u32;
        let place = Place { store, location: Location { segment, unit } };
        let mut bytes = Vec::with_capacity(RECORD_HEADER_LEN);
        header.encode(place, 0, &mut bytes);
        out.push((offset, bytes));
        offset += len;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &[u8] = include_bytes!("../../tests/golden/segment.v1");
    const STORE: StoreId = StoreId(*b"sixteen bytes id");

    fn place(unit: u32) -> Place {
        Place { store: STORE, location: Location { segment: 7, unit } }
    }

    fn counted(first: u8) -> Hash {
        Hash(std::array::from_fn(|n| first + n as u8))
    }

    fn golden_records() -> [(u32, u32, RecordHeader, Vec<u8>); 3] {
        let record = RecordKey { kind: RecordKind::Chunk, id: counted(0), shard: 3 };
        let put = RecordHeader {
            event: HeaderEvent::Put,
            key: Key { pool: 2, record },
            generation: 0x11_2233_4455,
            codec: Codec::Lz4,
            plain_len: 40,
            stored_len: 20,
            payload_crc: crc32c(b"twenty bytes payload"),
        };
        let touch = RecordHeader {
            event: HeaderEvent::Touch,
            generation: 0x11_2233_4456,
            codec: Codec::Plain,
            plain_len: 0,
            stored_len: 0,
            payload_crc: 0,
            ..put
        };
        let target = encode_tombstone(Location { segment: 5, unit: 0x99 });
        let tombstone = RecordHeader {
            event: HeaderEvent::Tombstone,
            key: Key { pool: 9, record: RecordKey::whole(RecordKind::TreeNode, counted(100)) },
            generation: 0,
            plain_len: 8,
            stored_len: 8,
            payload_crc: crc32c(&target),
            ..touch
        };
        [
            (4, 4, put, b"twenty bytes payload".to_vec()),
            (11, 11, touch, vec![]),
            (16, 11, tombstone, target.to_vec()),
        ]
    }

    #[test]
    fn golden() {
        let mut written = encode_header(STORE, 7).to_vec();
        for (unit, durable, header, payload) in golden_records() {
            assert_eq!(written.len() as u64, u64::from(unit) * ALIGN);
            header.encode(place(unit), durable, &mut written);
            written.extend(payload);
            written.resize(written.len().next_multiple_of(ALIGN as usize), 0);
        }
        let [(at, filler)] = &encode_filler(STORE, 7, 352, 352 + 96)[..] else { panic!("one") };
        assert_eq!(*at, written.len() as u64);
        written.extend(filler);
        written.resize(written.len() + 16, 0);
        assert_eq!(written, GOLDEN);
        assert_eq!(decode_header(GOLDEN), Ok((STORE, 7)));
        for (unit, durable, header, _) in golden_records() {
            let at = unit as usize * ALIGN as usize;
            assert_eq!(RecordHeader::decode(&GOLDEN[at..], place(unit)), Ok((header, durable)));
        }
        let target = decode_tombstone(&GOLDEN[336..344]);
        assert_eq!(target, Ok(Location { segment: 5, unit: 0x99 }));
    }

    #[test]
    fn a_record_counts_only_in_its_own_place() {
        let bytes = &GOLDEN[SEGMENT_HEADER_LEN..];
        assert!(RecordHeader::decode(bytes, place(4)).is_ok());
        let elsewhere = [
            place(5),
            Place { store: StoreId([0; 16]), ..place(4) },
            Place { location: Location { segment: 8, unit: 4 }, ..place(4) },
        ];
        for place in elsewhere {
            assert!(matches!(RecordHeader::decode(bytes, place), Err(FormatError::Damaged(_))));
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        for bit in 0..SEGMENT_HEADER_LEN * 8 {
            let mut bad = GOLDEN[..SEGMENT_HEADER_LEN].to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode_header(&bad), Err(FormatError::Damaged(_))));
        }
        for bit in 0..RECORD_HEADER_LEN * 8 {
            let mut bad = GOLDEN[SEGMENT_HEADER_LEN..][..RECORD_HEADER_LEN].to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(RecordHeader::decode(&bad, place(4)), Err(FormatError::Damaged(_))));
        }
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage() {
        let mut header = GOLDEN[..SEGMENT_HEADER_LEN].to_vec();
        header[8] = 2;
        let crc = crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode_header(&header), Err(FormatError::Newer { found: 2, known: 1 }));
        let mut record = GOLDEN[SEGMENT_HEADER_LEN..][..RECORD_HEADER_LEN].to_vec();
        record[4] = 3;
        let crc = header_crc(place(4), &record[..76]);
        record[76..].copy_from_slice(&crc.to_le_bytes());
        let newer = FormatError::Newer { found: 3, known: 1 };
        assert_eq!(RecordHeader::decode(&record, place(4)), Err(newer));
    }

    #[test]
    fn fillers_cover_any_length_without_a_gap() {
        let most = PLAIN_LEN_MAX as u64;
        for len in [80, 96, 4096, most, most + 80, 2 * most + 16, 5 * most - 16] {
            let mut at = 64;
            for (offset, bytes) in encode_filler(STORE, 7, 64, 64 + len) {
                assert_eq!(offset, at);
                let read = RecordHeader::decode(&bytes, place((at / ALIGN) as u32));
                at += read.unwrap().0.frame_len();
            }
            assert_eq!(at, 64 + len);
        }
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(name(0x2f), "0000002f.seg");
        assert_eq!(number("0000002f.seg"), Some(0x2f));
        for other in
            ["2f.seg", "0000002f.idx", "0000002f.seg.damaged", "+000002f.seg", "zzzzzzzz.seg"]
        {
            assert_eq!(number(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(bytes in prop::collection::vec(0u8..=255, 0..200), fix: bool) {
            let mut bytes = bytes;
            if fix && bytes.len() >= RECORD_HEADER_LEN {
                // Past the checksum, so that the fields behind it are reached.
                bytes[..5].copy_from_slice(b"bcRr\x01");
                let crc = header_crc(place(1), &bytes[..RECORD_HEADER_LEN - 4]);
                bytes[RECORD_HEADER_LEN - 4..RECORD_HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
            }
            if let Ok((header, durable)) = RecordHeader::decode(&bytes, place(1)) {
                let mut again = Vec::new();
                header.encode(place(1), durable, &mut again);
                prop_assert_eq!(&again[..], &bytes[..RECORD_HEADER_LEN]);
            }
            let _ = decode_header(&bytes);
            let _ = decode_tombstone(&bytes);
        }
    }
}
