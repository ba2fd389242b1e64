//! The frame around every record in a disk's files.
//!
//! ```text
//! offset  bytes
//!      0      4  magic, one for each kind of record
//!      4      4  version
//!      8      4  bytes of the body
//!     12      4  CRC-32C of bytes 0..12 and of the body
//!     16      …  body: a protobuf message
//! ```
//! All numbers are little endian.

use blobcr_proto::codec::crc32c;
use prost::Message;

/// Bytes before the body.
const HEADER_BYTES: usize = 16;
const CRC_AT: usize = 12;

/// The greatest counter that a record may hold. They are counted up one by one, and shifted by a bit
/// for marks: none that was counted comes near it.
pub(super) const COUNTER_MAX: u64 = u64::MAX / 4;

/// A kind of record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) magic: [u8; 4],
    pub(super) version: u32,
}

fn crc(header: &[u8], body: &[u8]) -> u32 {
    // Both parts are short: one buffer is simpler than a running checksum.
    crc32c(&[header, body].concat())
}

/// The record's bytes.
pub(super) fn encode(kind: Kind, message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + message.encoded_len());
    let body = message.encode_to_vec();
    bytes.extend(kind.magic);
    bytes.extend(kind.version.to_le_bytes());
    // A few names and numbers: far below 4 GiB.
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(crc(&bytes, &body).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(four.try_into().ok()?))
}

/// Reads a record from the head of `bytes`. The error says what is wrong.
pub(super) fn decode<M: Message + Default>(kind: Kind, bytes: &[u8]) -> Result<M, String> {
    let short = || format!("it ends after {} bytes", bytes.len());
    let header = bytes.get(..HEADER_BYTES).ok_or_else(short)?;
    if header[..4] != kind.magic {
        return Err("it does not begin with its magic".into());
    }
    let version = u32_at(header, 4).ok_or_else(short)?;
    if version > kind.version {
        return Err(format!(
            "it has version {version} and this program reads up to {}; use a newer one",
            kind.version
        ));
    }
    let len = u32_at(header, 8).ok_or_else(short)? as usize;
    let body = bytes.get(HEADER_BYTES..).and_then(|rest| rest.get(..len)).ok_or_else(short)?;
    if u32_at(header, CRC_AT) != Some(crc(&header[..CRC_AT], body)) {
        return Err("its checksum does not match".into());
    }
    M::decode(body).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use blobcr_proto::v1::ImageRef;

    const KIND: Kind = Kind { magic: *b"TEST", version: 2 };

    #[test]
    fn any_flipped_bit_is_found() {
        let message = ImageRef { name: "image".into(), id: 7 };
        let good = encode(KIND, &message);
        assert_eq!(decode::<ImageRef>(KIND, &good), Ok(message.clone()));
        let mut padded = good.clone();
        padded.resize(4096, 0);
        assert_eq!(decode::<ImageRef>(KIND, &padded), Ok(message));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode::<ImageRef>(KIND, &bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(decode::<ImageRef>(KIND, &good[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn the_version_before_is_read_and_the_next_refused() {
        let message = ImageRef::default();
        let older = encode(Kind { version: 1, ..KIND }, &message);
        assert!(decode::<ImageRef>(KIND, &older).is_ok());
        let newer = encode(Kind { version: 3, ..KIND }, &message);
        assert!(decode::<ImageRef>(KIND, &newer).unwrap_err().contains("newer"));
    }

    proptest::proptest! {
        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(0u8..=255, 0..100)) {
            let _ = decode::<ImageRef>(KIND, &bytes);
        }
    }
}
