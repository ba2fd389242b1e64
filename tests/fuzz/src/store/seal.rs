//! Makes the checksums of a store's files right, by their description in `docs/formats.md`.

use std::collections::BTreeMap;

use blobcr_proto::codec::crc32c;

/// The store that all sealed files belong to.
pub(super) const STORE: [u8; 16] = *b"sixteen bytes id";

const HEADER: usize = 64;
const RECORD_HEADER: usize = 80;
const ENTRY: usize = 64;
/// Pools that sealed records are in, so that they are found again.
pub(super) const POOLS: u8 = 3;

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// magic 8 · version 4 · segment 4 · store 16 · zeros 28 · CRC 4; then records.
pub(super) fn segment(bytes: &mut [u8], number: u32) {
    if bytes.len() >= HEADER {
        put(bytes, 0, b"BLOBCRSG\x01\0\0\0");
        put(bytes, 12, &number.to_le_bytes());
        put(bytes, 16, &STORE);
        put(bytes, 32, &[0; 28]);
        let crc = crc32c(&bytes[..60]);
        put(bytes, 60, &crc.to_le_bytes());
    }
    let mut at = HEADER;
    while at + RECORD_HEADER <= bytes.len() {
        if bytes[at..].starts_with(b"bcRr") {
            record(bytes, at, number);
        }
        at += 16;
    }
}

/// magic 4 · version 1 · event 1 · kind 1 · codec 1 · shard 1 · zeros 3 · pool 4 · id 32 ·
/// generation 8 · plain 4 · stored 4 · payload's CRC 4 · durable 4 · zeros 4 · CRC 4.
fn record(bytes: &mut [u8], at: usize, segment: u32) {
    bytes[at + 4] = 1;
    put(bytes, at + 9, &[0; 3]);
    bytes[at + 12] %= POOLS;
    put(bytes, at + 13, &[0; 3]);
    put(bytes, at + 72, &[0; 4]);
    let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[at + n]));
    let (stored, behind) = (number(at + 60) as usize, at + RECORD_HEADER);
    // An odd checksum stays: a record whose payload is damaged is a case of its own.
    if let Some(payload) = bytes.get(behind..behind + stored).filter(|_| bytes[at + 64] & 1 == 0) {
        let crc = crc32c(payload);
        put(bytes, at + 64, &crc.to_le_bytes());
    }
    let unit = (at / 16) as u32;
    let place = [&STORE[..], &segment.to_le_bytes(), &unit.to_le_bytes()].concat();
    let crc = crc32c(&[&place[..], &bytes[at..at + RECORD_HEADER - 4]].concat());
    put(bytes, at + RECORD_HEADER - 4, &crc.to_le_bytes());
}

/// magic 8 · version 4 · segment 4 · store 16 · segment's length 8 · unreadable 8 · entries 4 · zeros 4 ·
/// CRC of the entries 4 · CRC 4; then entries.
pub(super) fn listing(bytes: &mut Vec<u8>, number: u32, segment_len: Option<u64>) {
    if bytes.len() < HEADER {
        return;
    }
    let entries = (bytes.len() - HEADER) / ENTRY;
    bytes.truncate(HEADER + entries * ENTRY);
    for entry in bytes[HEADER..].chunks_exact_mut(ENTRY) {
        // event 1 · kind 1 · shard 1 · damaged 1 · pool 4 · …
        entry[4] %= POOLS;
        put(entry, 5, &[0; 3]);
    }
    put(bytes, 0, b"BLOBCRSX\x01\0\0\0");
    put(bytes, 12, &number.to_le_bytes());
    put(bytes, 16, &STORE);
    if let Some(len) = segment_len {
        put(bytes, 32, &len.to_le_bytes());
    }
    put(bytes, 48, &(entries as u32).to_le_bytes());
    put(bytes, 52, &[0; 4]);
    let crc = crc32c(&bytes[HEADER..]);
    put(bytes, 56, &crc.to_le_bytes());
    let crc = crc32c(&bytes[..60]);
    put(bytes, 60, &crc.to_le_bytes());
}

/// All files of a directory, each by its name.
pub(super) fn all(files: &mut BTreeMap<String, Vec<u8>>) {
    let lengths: BTreeMap<String, u64> =
        files.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect();
    for (name, bytes) in files {
        let number = name.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
        match (number, name.get(8..)) {
            (Some(number), Some(".seg")) => segment(bytes, number),
            (Some(number), Some(".idx")) => {
                // An odd length stays: a listing may be out of date.
                let fits = bytes.get(32).is_some_and(|byte| byte & 1 == 0);
                let segment_len = lengths.get(&format!("{number:08x}.seg")).copied();
                listing(bytes, number, segment_len.filter(|_| fits));
            }
            _ => {}
        }
    }
}
