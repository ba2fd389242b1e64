//! The index file of a slab: which chunk each slot holds.
//!
//! ```text
//! offset  bytes  header (one page)
//!      0      4  magic "BCCX"
//!      4      4  version, 1
//!      8      4  chunk size
//!     12      4  CRC-32C of bytes 0..12
//!   4096     40  entry of slot 0, then of slot 1, …
//!
//! offset  bytes  entry
//!      0     32  identity of the chunk
//!     32      4  number of the slot, so that a misplaced entry is not believed
//!     36      4  CRC-32C of bytes 0..36
//! ```
//!
//! All numbers are little endian. The index is a hint: it is written without a sync, an entry that
//! does not check is an empty slot, and a slot that it names is compared with its identity before
//! the first byte of it is handed out. So nothing here can make the cache return wrong bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blobcr_proto::codec::crc32c;
use blobcr_proto::{ChunkSize, Hash};

const MAGIC: [u8; 4] = *b"BCCX";
const VERSION: u32 = 1;
/// Entries begin on a page of their own.
const HEADER_BYTES: u64 = 4096;
const ENTRY_BYTES: usize = 40;
const ENTRY_CRC_AT: usize = 36;

/// The open index file of one slab.
#[derive(Debug)]
pub(super) struct IndexFile(File);

fn header(chunk_size: ChunkSize) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..12].copy_from_slice(&(chunk_size.len() as u32).to_le_bytes());
    let crc = crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn encode(slot: u32, id: &Hash) -> [u8; ENTRY_BYTES] {
    let mut bytes = [0; ENTRY_BYTES];
    bytes[..Hash::LEN].copy_from_slice(&id.0);
    bytes[Hash::LEN..ENTRY_CRC_AT].copy_from_slice(&slot.to_le_bytes());
    let crc = crc32c(&bytes[..ENTRY_CRC_AT]);
    bytes[ENTRY_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(slot: u32, bytes: &[u8]) -> Option<Hash> {
    let (body, crc) = bytes.split_at_checked(ENTRY_CRC_AT)?;
    let id = Hash::from_slice(&body[..Hash::LEN])?;
    let sound =
        crc == crc32c(body).to_le_bytes() && body[Hash::LEN..ENTRY_CRC_AT] == slot.to_le_bytes();
    sound.then_some(id)
}

impl IndexFile {
    /// Opens or makes the index of a slab and tells what each slot holds, for at most `slots_max`
    /// slots. An index of another version or chunk size is emptied.
    pub(super) fn open(
        path: &Path,
        chunk_size: ChunkSize,
        slots_max: u32,
    ) -> io::Result<(Self, Vec<Option<Hash>>)> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut found = [0; 16];
        let known = file.read_exact_at(&mut found, 0).is_ok() && found == header(chunk_size);
        if !known {
            file.set_len(0)?;
            file.write_all_at(&header(chunk_size), 0)?;
            return Ok((Self(file), Vec::new()));
        }
        let bytes = file.metadata()?.len().saturating_sub(HEADER_BYTES);
        let slots = (bytes / ENTRY_BYTES as u64).min(u64::from(slots_max)) as usize;
        let mut entries = vec![0; slots * ENTRY_BYTES];
        file.read_exact_at(&mut entries, HEADER_BYTES)?;
        let held = entries
            .chunks_exact(ENTRY_BYTES)
            .zip(0u32..)
            .map(|(entry, slot)| decode(slot, entry))
            .collect();
        Ok((Self(file), held))
    }

    /// Notes that a slot holds a chunk.
    pub(super) fn set(&self, slot: u32, id: &Hash) -> io::Result<()> {
        self.0.write_all_at(&encode(slot, id), Self::offset(slot))
    }

    /// Notes that a slot holds nothing.
    pub(super) fn clear(&self, slot: u32) -> io::Result<()> {
        self.0.write_all_at(&[0; ENTRY_BYTES], Self::offset(slot))
    }

    fn offset(slot: u32) -> u64 {
        HEADER_BYTES + u64::from(slot) * ENTRY_BYTES as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_format_of_version_1_does_not_change() {
        assert_eq!(
            hex(&header(ChunkSize::DEFAULT)),
            include_str!("../../golden/cache-header-v1.hex").trim()
        );
        let id = Hash(std::array::from_fn(|i| i as u8));
        assert_eq!(hex(&encode(7, &id)), include_str!("../../golden/cache-entry-v1.hex").trim());
        assert_eq!(decode(7, &encode(7, &id)), Some(id));
    }

    #[test]
    fn a_reopened_index_tells_what_was_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let (index, held) = IndexFile::open(&path, ChunkSize::DEFAULT, 100).unwrap();
        assert!(held.is_empty());
        let (a, b) = (Hash::of(b"a"), Hash::of(b"b"));
        index.set(0, &a).unwrap();
        index.set(3, &b).unwrap();
        index.set(1, &b).unwrap();
        index.clear(1).unwrap();
        let (_, held) = IndexFile::open(&path, ChunkSize::DEFAULT, 100).unwrap();
        assert_eq!(held, [Some(a), None, None, Some(b)]);
        let (_, held) = IndexFile::open(&path, ChunkSize::DEFAULT, 2).unwrap();
        assert_eq!(held, [Some(a), None]);
        let (_, held) = IndexFile::open(&path, ChunkSize::MIN, 100).unwrap();
        assert!(held.is_empty(), "an index for another chunk size is not believed");
    }

    proptest::proptest! {
        #[test]
        fn no_damaged_entry_is_believed(slot in 0u32..1000, bit in 0usize..ENTRY_BYTES * 8) {
            let mut bytes = encode(slot, &Hash::of(b"x"));
            bytes[bit / 8] ^= 1 << (bit % 8);
            proptest::prop_assert_eq!(decode(slot, &bytes), None);
        }

        #[test]
        fn junk_is_no_entry(slot: u32, bytes in proptest::collection::vec(0u8.., 0..50)) {
            proptest::prop_assert_eq!(decode(slot, &bytes), None);
        }
    }
}
