//! What the files of a store hold, byte for byte. All numbers are little-endian.
//!
//! | file | holds |
//! |---|---|
//! | `node` | the store's identity: [`identity`] |
//! | `N.seg` (N of 8 hex digits) | a part of the log: [`segment`] |
//! | `N.idx` | what `N.seg` holds, without the payloads: [`listing`]; made again when it is lost |
//! | `reserve` | room for tombstones on a full disk; contents mean nothing |
//! | `lock` | the process that has the directory |

pub(crate) mod identity;
pub(crate) mod listing;
pub(crate) mod segment;

use blobcr_proto::Hash;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::RecordKind;

/// Why bytes of a file are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Too short, or without the magic, checksum or values that belong there.
    #[error("damaged: {0}")]
    Damaged(&'static str),
    /// Written by a newer program.
    #[error(
        "format version {found} is newer than {known}, which is the newest that this program reads: run a newer one"
    )]
    Newer {
        /// The version that is written there.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// It belongs to another store.
    #[error("it belongs to another store ({0})")]
    Foreign(StoreId),
}

/// The identity of a store and of the node that has it: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoreId(pub [u8; 16]);

impl std::fmt::Display for StoreId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for StoreId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The key of a record within a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The pool it belongs to.
    pub pool: u32,
    /// Its key within the pool.
    pub record: RecordKey,
}

/// A place in the log. Later places are greater: the log is written in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Location {
    /// Number of the segment.
    pub(crate) segment: u32,
    /// Offset in units of [`segment::ALIGN`] bytes.
    pub(crate) unit: u32,
}

impl Location {
    /// Offset in the segment, in bytes.
    pub(crate) fn offset(self) -> u64 {
        u64::from(self.unit) * segment::ALIGN
    }
}

/// What a record of the log says about its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Here is the record.
    Put,
    /// The record has been asked for by a writer of this generation.
    Touch,
    /// No copy of the record at this place or before it counts any more.
    Tombstone(Location),
}

impl Event {
    const fn code(self) -> u8 {
        match self {
            Self::Put => 1,
            Self::Touch => 2,
            Self::Tombstone(_) => 3,
        }
    }
}

/// A little-endian reader over bytes whose length the caller has checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, tail) = self.0.split_first_chunk().expect("the caller checked the length");
        self.0 = tail;
        *head
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn zeros<const N: usize>(&mut self) -> Result<(), FormatError> {
        if self.take::<N>() == [0; N] {
            Ok(())
        } else {
            Err(FormatError::Damaged("reserved bytes are set"))
        }
    }
}

fn kind_from(code: u8) -> Result<RecordKind, FormatError> {
    match RecordKind::try_from(i32::from(code)) {
        Ok(RecordKind::Unspecified) | Err(_) => Err(FormatError::Damaged("unknown kind")),
        Ok(kind) => Ok(kind),
    }
}

fn key_from(pool: u32, kind: u8, shard: u8, id: [u8; 32]) -> Result<Key, FormatError> {
    Ok(Key { pool, record: RecordKey { kind: kind_from(kind)?, id: Hash(id), shard } })
}

/// The code of a kind on disk: its number in the protocol, which is fixed.
pub(crate) fn kind_code(kind: RecordKind) -> u8 {
    kind as i32 as u8
}
