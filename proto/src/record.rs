//! Checks that a record is what it says it is, on whichever side of the wire it arrives.

use bytes::Bytes;

use crate::codec::{DecodeError, PLAIN_LEN_MAX, crc32c, decode_into};
use crate::hash::Hash;
use crate::v1;

/// Why a record is not what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A field is missing or outside its range.
    #[error("malformed record: {0}")]
    Malformed(&'static str),
    /// The payload was damaged on its way or on a disk.
    #[error("record {id}: payload checksum {actual:08x} instead of {expected:08x}")]
    Checksum {
        /// The record's identity.
        id: Hash,
        /// CRC-32C that the record carries.
        expected: u32,
        /// CRC-32C of its payload.
        actual: u32,
    },
    /// The payload does not decode.
    #[error("record {id}: {source}")]
    Decode {
        /// The record's identity.
        id: Hash,
        /// What the decoder said.
        source: DecodeError,
    },
    /// The plain bytes are those of another record.
    #[error("record {id}: its bytes have the identity {actual}")]
    Identity {
        /// What it says it is.
        id: Hash,
        /// What it is.
        actual: Hash,
    },
}

/// The key of a record within a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordKey {
    /// What the record holds.
    pub kind: v1::RecordKind,
    /// Identity of the whole record's plain bytes.
    pub id: Hash,
    /// 0: whole; otherwise which shard.
    pub shard: u8,
}

impl RecordKey {
    /// The key of a whole record.
    #[must_use]
    pub const fn whole(kind: v1::RecordKind, id: Hash) -> Self {
        Self { kind, id, shard: 0 }
    }

    /// The wire form.
    #[must_use]
    pub fn to_ref(self) -> v1::RecordRef {
        v1::RecordRef {
            kind: self.kind.into(),
            id: self.id.to_bytes(),
            shard: u32::from(self.shard),
        }
    }
}

impl TryFrom<&v1::RecordRef> for RecordKey {
    type Error = RecordError;
    fn try_from(wire: &v1::RecordRef) -> Result<Self, RecordError> {
        let kind = wire.kind();
        if kind == v1::RecordKind::Unspecified {
            return Err(RecordError::Malformed("unknown kind of record"));
        }
        let id = Hash::from_slice(&wire.id).ok_or(RecordError::Malformed("id is not 32 bytes"))?;
        let shard = u8::try_from(wire.shard)
            .map_err(|_| RecordError::Malformed("shard number above 255"))?;
        Ok(Self { kind, id, shard })
    }
}

/// Builds the wire form of a whole record. `payload` is `plain` or what `codec` made of it.
#[must_use]
pub fn whole(
    kind: v1::RecordKind,
    id: Hash,
    codec: v1::Codec,
    plain_len: usize,
    payload: Bytes,
) -> v1::Record {
    debug_assert!(plain_len <= PLAIN_LEN_MAX);
    v1::Record {
        r#ref: Some(RecordKey::whole(kind, id).to_ref()),
        codec: codec.into(),
        plain_len: plain_len as u32,
        payload_crc32c: crc32c(&payload),
        payload,
    }
}

/// Checks shape and checksum of a record, without decoding it. Returns its key.
///
/// # Errors
/// When a field is out of range or the payload's checksum does not match.
pub fn check_payload(record: &v1::Record) -> Result<RecordKey, RecordError> {
    let wire = record.r#ref.as_ref().ok_or(RecordError::Malformed("no ref"))?;
    let key = RecordKey::try_from(wire)?;
    v1::Codec::try_from(record.codec).map_err(|_| RecordError::Malformed("unknown codec"))?;
    if record.plain_len as usize > PLAIN_LEN_MAX || record.payload.len() > PLAIN_LEN_MAX {
        return Err(RecordError::Malformed("longer than any record may be"));
    }
    let actual = crc32c(&record.payload);
    if actual != record.payload_crc32c {
        let expected = record.payload_crc32c;
        return Err(RecordError::Checksum { id: key.id, expected, actual });
    }
    Ok(key)
}

/// Checks a whole record down to its identity and returns its plain bytes (without a copy when
/// they are stored plain).
///
/// # Errors
/// As [`check_payload`], and when the payload does not decode or is that of another identity.
pub fn open(record: &v1::Record) -> Result<(RecordKey, Bytes), RecordError> {
    let key = check_payload(record)?;
    if key.shard != 0 {
        return Err(RecordError::Malformed("a shard where a whole record is needed"));
    }
    let plain = match record.codec() {
        v1::Codec::Plain if record.payload.len() == record.plain_len as usize => {
            record.payload.clone()
        }
        codec => {
            let mut plain = vec![0; record.plain_len as usize];
            decode_into(codec, &record.payload, &mut plain)
                .map_err(|source| RecordError::Decode { id: key.id, source })?;
            plain.into()
        }
    };
    let actual = Hash::of(&plain);
    if actual != key.id {
        return Err(RecordError::Identity { id: key.id, actual });
    }
    Ok((key, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::compress;
    use crate::v1::{Codec, RecordKind};

    fn sample(codec: Codec) -> v1::Record {
        let plain = b"the same sixteen".repeat(300);
        let payload = compress(codec, &plain).unwrap_or_else(|| plain.clone());
        whole(RecordKind::Chunk, Hash::of(&plain), codec, plain.len(), payload.into())
    }

    #[test]
    fn every_codec_opens() {
        for codec in [Codec::Plain, Codec::Lz4, Codec::Zstd] {
            let (_, plain) = open(&sample(codec)).unwrap();
            assert_eq!(plain, b"the same sixteen".repeat(300));
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        for codec in [Codec::Plain, Codec::Lz4, Codec::Zstd] {
            let good = sample(codec);
            for bit in 0..good.payload.len() * 8 {
                let mut payload = good.payload.to_vec();
                payload[bit / 8] ^= 1 << (bit % 8);
                let bad = v1::Record { payload: payload.into(), ..good.clone() };
                assert!(matches!(open(&bad), Err(RecordError::Checksum { .. })));
            }
        }
    }

    #[test]
    fn a_record_under_another_identity_is_refused() {
        let mut record = sample(Codec::Plain);
        record.r#ref.as_mut().unwrap().id = Hash::of(b"other").to_bytes();
        assert!(matches!(open(&record), Err(RecordError::Identity { .. })));
    }
}
