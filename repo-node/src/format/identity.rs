//! The `node` file: who this store is.

use blobcr_proto::codec::crc32c;

use super::{Fields, FormatError, StoreId};

pub(crate) const NAME: &str = "node";
/// Written first and then renamed to [`NAME`], so that a crash leaves no half of it.
pub(crate) const TEMPORARY_NAME: &str = "node.new";

const MAGIC: [u8; 8] = *b"BLOBCRND";
const VERSION: u32 = 1;
pub(crate) const LEN: usize = 32;

/// magic 8 · version 4 · id 16 · CRC-32C of all before 4.
pub(crate) fn encode(id: StoreId) -> Vec<u8> {
    let mut out = Vec::with_capacity(LEN);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(id.0);
    out.extend(crc32c(&out).to_le_bytes());
    out
}

pub(crate) fn decode(bytes: &[u8]) -> Result<StoreId, FormatError> {
    if bytes.len() != LEN || !bytes.starts_with(&MAGIC) {
        return Err(FormatError::Damaged("not a node identity"));
    }
    let mut fields = Fields(&bytes[MAGIC.len()..]);
    let (version, id) = (fields.u32(), fields.take());
    if fields.u32() != crc32c(&bytes[..LEN - 4]) {
        return Err(FormatError::Damaged("wrong checksum"));
    }
    if version != VERSION {
        return Err(FormatError::Newer { found: version, known: VERSION });
    }
    Ok(StoreId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let id = StoreId(*b"sixteen bytes id");
        let golden = include_bytes!("../../tests/golden/node.v1");
        assert_eq!(encode(id), golden);
        assert_eq!(decode(golden), Ok(id));
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let good = encode(StoreId([7; 16]));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode(&bad), Err(FormatError::Damaged(_))));
        }
    }
}
