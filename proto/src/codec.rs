//! Plain bytes ↔ stored payload.

use crate::v1::Codec;

/// The largest plain record, in bytes: a 4 MiB chunk. Tree nodes are far smaller.
pub const PLAIN_LEN_MAX: usize = 4 << 20;

/// A payload that does not decode to what its record says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The record announces more plain bytes than any record has.
    #[error("a record of {0} plain bytes is longer than any record may be ({PLAIN_LEN_MAX})")]
    TooLong(usize),
    /// The codec's own check failed.
    #[error("the {codec:?} payload is damaged: {detail}")]
    Damaged {
        /// The codec that was named.
        codec: Codec,
        /// What its decoder said.
        detail: String,
    },
    /// It decoded to another length than the record says.
    #[error("the payload decoded to {actual} bytes instead of {expected}")]
    WrongLength {
        /// What the record says.
        expected: usize,
        /// What came out.
        actual: usize,
    },
}

/// CRC-32C (Castagnoli) of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm is 32 bits wide: the upper half of the result is zero.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Compresses `plain` with `codec`. `None` when the codec cannot make it smaller.
#[must_use]
pub fn compress(codec: Codec, plain: &[u8]) -> Option<Vec<u8>> {
    let payload = match codec {
        Codec::Plain => return None,
        Codec::Lz4 => lz4_flex::block::compress(plain),
        Codec::Zstd => zstd::bulk::compress(plain, ZSTD_LEVEL).ok()?,
    };
    (payload.len() < plain.len()).then_some(payload)
}

/// Level 1: 0.5 GB/s on real data; the higher ones cost more time than they save bytes here.
const ZSTD_LEVEL: i32 = 1;

/// Decodes `payload` into `plain`, whose length is the record's `plain_len`.
///
/// # Errors
/// When the payload is damaged or decodes to another length. `plain` then holds rubbish.
pub fn decode_into(codec: Codec, payload: &[u8], plain: &mut [u8]) -> Result<(), DecodeError> {
    if plain.len() > PLAIN_LEN_MAX {
        return Err(DecodeError::TooLong(plain.len()));
    }
    let damaged = |detail: String| DecodeError::Damaged { codec, detail };
    let actual =
        match codec {
            Codec::Plain => {
                if payload.len() == plain.len() {
                    plain.copy_from_slice(payload);
                }
                payload.len()
            }
            Codec::Lz4 => lz4_flex::block::decompress_into(payload, plain)
                .map_err(|e| damaged(e.to_string()))?,
            Codec::Zstd => zstd::bulk::decompress_to_buffer(payload, plain)
                .map_err(|e| damaged(e.to_string()))?,
        };
    if actual != plain.len() {
        return Err(DecodeError::WrongLength { expected: plain.len(), actual });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_published_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    proptest::proptest! {
        #[test]
        fn what_compresses_comes_back(seed in proptest::collection::vec(0u8..4, 1..5000)) {
            for codec in [Codec::Lz4, Codec::Zstd] {
                let Some(payload) = compress(codec, &seed) else { continue };
                let mut plain = vec![0; seed.len()];
                decode_into(codec, &payload, &mut plain).unwrap();
                assert_eq!(plain, seed);
                let mut short = vec![0; seed.len() - 1];
                assert!(decode_into(codec, &payload, &mut short).is_err());
                let mut long = vec![0; seed.len() + 1];
                assert!(decode_into(codec, &payload, &mut long).is_err());
            }
        }

        #[test]
        fn rubbish_never_panics(payload in proptest::collection::vec(0u8..=255, 0..300), len in 0usize..5000) {
            for codec in [Codec::Plain, Codec::Lz4, Codec::Zstd] {
                let _ = decode_into(codec, &payload, &mut vec![0; len]);
            }
        }
    }
}
