//! The newest version that may have been acknowledged, in a file of our own: see the module above.
//!
//! ```text
//! offset  bytes
//!      0      4  magic "BCMA"
//!      4      1  format, 1
//!      5      3  zero
//!      8      8  the version, little endian
//!     16      4  CRC-32C of bytes 0..16, little endian
//! ```
//! It is overwritten in place by one write of these bytes, which lie in one sector.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blobcr_proto::codec::crc32c;

use crate::store::StoreError;

const NAME: &str = "acknowledged";
const BYTES: usize = 20;
const MAGIC: [u8; 4] = *b"BCMA";
const FORMAT: u8 = 1;

/// The open file.
#[derive(Debug)]
pub(super) struct Acknowledged(File);

impl Acknowledged {
    /// Opens the file and reads what it says; `None` when it was not there, and is made now, once
    /// `sync` has made everything durable that it will stand for.
    pub(super) fn open(
        dir: &Path,
        sync: impl Fn() -> io::Result<()>,
    ) -> Result<(Self, Option<u64>), StoreError> {
        let path = dir.join(NAME);
        let damaged = |detail: String| StoreError::Damaged { detail: format!("{NAME}: {detail}") };
        let failed = |error: io::Error| damaged(error.to_string());
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        match open() {
            Ok(file) => {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut io::Read::take(&file, 1 + BYTES as u64), &mut bytes)
                    .map_err(failed)?;
                let version = decode(&bytes).map_err(|detail| damaged(detail.to_owned()))?;
                Ok((Self(file), Some(version)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                sync().map_err(failed)?;
                // Whole or not there at all.
                let new = dir.join("acknowledged.new");
                let mut file = File::create(&new).map_err(failed)?;
                io::Write::write_all(&mut file, &encode(0)).map_err(failed)?;
                file.sync_all().map_err(failed)?;
                std::fs::rename(&new, &path).map_err(failed)?;
                Ok((Self(open().map_err(failed)?), None))
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Notes a version that is durable and will now be acknowledged.
    pub(super) fn note(&mut self, version: u64) -> io::Result<()> {
        self.0.write_all_at(&encode(version), 0)
    }
}

pub(super) fn encode(version: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = FORMAT;
    bytes[8..16].copy_from_slice(&version.to_le_bytes());
    let sum = crc32c(&bytes[..16]);
    bytes[16..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub(super) fn decode(bytes: &[u8]) -> Result<u64, &'static str> {
    let bytes: &[u8; BYTES] = bytes.try_into().map_err(|_| "it has not 20 bytes")?;
    let [m0, m1, m2, m3, format, _, _, _, version @ .., _, _, _, _] = bytes;
    if [*m0, *m1, *m2, *m3] != MAGIC {
        return Err("it does not begin with BCMA");
    }
    if *format > FORMAT {
        return Err("a newer program wrote it");
    }
    let version = u64::from_le_bytes(*version);
    if encode(version) != *bytes {
        return Err("its checksum does not match");
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_note_of_version_1() {
        let hex: String = encode(0x0102_0304).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, include_str!("../../../golden/acknowledged-v1.hex").trim());
        assert_eq!(decode(&encode(0x0102_0304)), Ok(0x0102_0304));
    }

    #[test]
    fn any_flipped_bit_is_found() {
        for bit in 0..BYTES * 8 {
            let mut bytes = encode(77);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "bit {bit}");
        }
        for len in 0..BYTES {
            assert!(decode(&encode(77)[..len]).is_err());
        }
    }
}
