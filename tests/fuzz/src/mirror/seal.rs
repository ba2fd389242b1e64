//! Makes the checksums of a mirror's files right, by their description in `docs/formats.md`.

use blobcr_proto::Hash;
use blobcr_proto::codec::crc32c;

/// Bytes before the body of a frame.
const FRAME_HEADER: usize = 16;

/// magic 4 · version 4 · length 4 · CRC 4 · body: here all that follows.
pub(super) fn frame(bytes: &mut [u8], magic: &[u8; 4]) {
    if let Some(body) = bytes.len().checked_sub(FRAME_HEADER) {
        frame_of(bytes, magic, body);
    }
}

/// As [`frame`], with a body of `len` bytes.
pub(super) fn frame_of(bytes: &mut [u8], magic: &[u8; 4], len: usize) {
    let Some(frame) = bytes.get_mut(..FRAME_HEADER + len) else { return };
    if magic == b"BCMI" {
        return;
    }
    frame[..4].copy_from_slice(magic);
    frame[4..8].copy_from_slice(&1u32.to_le_bytes());
    frame[8..12].copy_from_slice(&(len as u32).to_le_bytes());
    let crc = crc32c(&[&frame[..12], &frame[FRAME_HEADER..]].concat());
    frame[12..FRAME_HEADER].copy_from_slice(&crc.to_le_bytes());
}

/// As [`frame_of`], with the length that is there, when it fits.
pub(super) fn frame_at(bytes: &mut [u8], at: usize, magic: &[u8; 4]) {
    let Some(frame) = bytes.get_mut(at..) else { return };
    let Some(len) = frame.get(8..12) else { return };
    let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
    frame_of(frame, magic, len.min(frame.len().saturating_sub(FRAME_HEADER)));
}

/// magic 4 · version 4 · identity 16 · CRC 4.
pub(super) fn identity(bytes: &mut [u8]) {
    if bytes.len() >= 28 {
        bytes[..8].copy_from_slice(b"BCMI\x01\0\0\0");
        let crc = crc32c(&bytes[..24]);
        bytes[24..28].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Batches behind a head of 4096 bytes: magic 4 · entries 4 · number 8 · CRC 4 · zeros 4 · entries.
/// With `renumber`, they get the numbers 1, 2, … too.
pub(super) fn batches(bytes: &mut [u8], words: usize, renumber: bool) {
    let (mut at, mut next) = (4096, 1u64);
    while at + 24 <= bytes.len() {
        if !bytes[at..].starts_with(b"BCJB") {
            at += 8;
            continue;
        }
        if renumber {
            bytes[at + 8..at + 16].copy_from_slice(&next.to_le_bytes());
        }
        let count: [u8; 4] = std::array::from_fn(|n| bytes[at + 4 + n]);
        let len = (u32::from_le_bytes(count) as usize).saturating_mul((1 + words) * 8);
        let body = at + 24;
        if let Some(entries) = body.checked_add(len).and_then(|end| bytes.get(body..end)) {
            let crc = crc32c(&[&bytes[at..at + 16], entries].concat());
            bytes[at + 16..at + 20].copy_from_slice(&crc.to_le_bytes());
            next += 1;
            at = body + len;
        } else {
            at += 8;
        }
    }
}

/// Records behind a head of 8 bytes: identity 32 · length 4 · CRC 4 · encoding. With `identify`, they
/// get their identities too.
pub(super) fn nodes(bytes: &mut [u8], identify: bool) {
    const RECORD_HEADER: usize = 40;
    let mut at = 8;
    while at + RECORD_HEADER <= bytes.len() {
        let len: [u8; 4] = std::array::from_fn(|n| bytes[at + Hash::LEN + n]);
        let end = at + RECORD_HEADER + u32::from_le_bytes(len) as usize;
        let Some(record) = bytes.get_mut(at..end) else { return };
        if identify {
            let id = Hash::of(&record[RECORD_HEADER..]);
            record[..Hash::LEN].copy_from_slice(&id.0);
        }
        record[36..RECORD_HEADER].fill(0);
        let crc = crc32c(record);
        record[36..RECORD_HEADER].copy_from_slice(&crc.to_le_bytes());
        at = end;
    }
}
