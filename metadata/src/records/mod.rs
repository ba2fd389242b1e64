//! What is stored: one file per kind of record.
//!
//! # Layout of a value
//! ```text
//! offset  bytes
//!      0      4  magic "BCMR"
//!      4      1  version, 1
//!      5      1  kind: the first byte of the key
//!      6      2  zero
//!      8      4  CRC-32C (little endian) of bytes 0..8, of the key and of the body
//!     12      …  body: a protobuf message, the struct in the file of the kind
//! ```
//! The key is part of the checksum, so a value that strayed to another key is found.

mod cluster;
mod counter;
mod debt;
mod group;
mod image;
mod image_name;
mod lease;
mod lease_work;
mod node;
mod pin;
mod placement;
mod pool;
mod pool_name;
mod read_trace;
mod removal;
mod set;
mod set_vm;
mod snapshot;
mod steward;

pub use cluster::ClusterRecord;
pub use counter::{Counter, CounterRecord};
pub use debt::{DebtRecord, MISSED_NODES_MAX};
pub use group::GroupRecord;
pub use image::ImageRecord;
pub use image_name::ImageNameRecord;
pub use lease::LeaseRecord;
pub use lease_work::LeaseWorkRecord;
pub use node::{NodeRecord, check_node_id};
pub use pin::{HOLDER_BYTES_MAX, PinRecord, check_holder};
pub use placement::{MovingFrom, PART_ROWS, PlacementPartRecord, PlacementRecord, TABLE_NODES_MAX};
pub use pool::PoolRecord;
pub use pool_name::PoolNameRecord;
pub use read_trace::ReadTraceRecord;
pub use removal::RemovalRecord;
pub use set::{SET_HOLDER_PREFIX, SET_HOLDERS_MAX, SetRecord};
pub use set_vm::{SetDisk, SetVmRecord, VM_DISKS_MAX};
pub use snapshot::{SNAPSHOT_NUMBER_MAX, SnapshotRecord, check_root};
pub use steward::{STEWARD_HOLDER_BYTES_MAX, StewardRecord};

use blobcr_proto::codec::crc32c;
use bytes::{BufMut, Bytes, BytesMut};

use crate::store::Key;

/// The kinds of records, as the first byte of their keys. Persisted: a number is never reused.
/// Numbers in keys are big endian, so that they sort.
///
/// | kind | rest of the key | value |
/// |---|---|---|
/// | `Counter` | counter, 1 byte | [`CounterRecord`] |
/// | `Image` | image id, 8 | [`ImageRecord`] |
/// | `ImageName` | name | [`ImageNameRecord`] |
/// | `Snapshot` | image id, 8; number, 8 | [`SnapshotRecord`] |
/// | `Set` | group; 0; all ones minus sequence, 8 (newest first) | [`SetRecord`] |
/// | `SetVm` | as `Set`; name of the VM | [`SetVmRecord`] |
/// | `Pool` | pool id, 4 | [`PoolRecord`] |
/// | `PoolName` | name | [`PoolNameRecord`] |
/// | `Node` | node id | [`NodeRecord`] |
/// | `Placement` | pool id, 4 | [`PlacementRecord`] |
/// | `PlacementPart` | pool id, 4; version, 8; part, 2 | [`PlacementPartRecord`] |
/// | `Lease` | lease id, 8 | [`LeaseRecord`] |
/// | `LeaseWork` | lease id, 8; image id, 8; number, 8 | [`LeaseWorkRecord`] |
/// | `Removal` | image id, 8 | [`RemovalRecord`] |
/// | `Debt` | pool id, 4; partition, 4 | [`DebtRecord`] |
/// | `Cluster` | nothing | [`ClusterRecord`] |
/// | `Steward` | nothing | [`StewardRecord`] |
/// | `Pin` | image id, 8; number, 8; holder | [`PinRecord`] |
/// | `Group` | name | [`GroupRecord`] |
/// | `ReadTrace` | image id, 8; number, 8 | [`ReadTraceRecord`] |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum KeyKind {
    /// A source of numbers.
    Counter = 1,
    /// An image.
    Image = 2,
    /// Which image has a name.
    ImageName = 3,
    /// A snapshot of an image.
    Snapshot = 4,
    /// A checkpoint set, without its members.
    Set = 5,
    /// What one VM contributed to a set.
    SetVm = 6,
    /// A pool.
    Pool = 7,
    /// Which pool has a name.
    PoolName = 8,
    /// A repository node.
    Node = 9,
    /// The newest placement table of a pool.
    Placement = 10,
    /// Some partitions of one version of a placement table.
    PlacementPart = 11,
    /// A writer's lease.
    Lease = 12,
    /// A pending snapshot under the lease that it was begun with.
    LeaseWork = 13,
    /// A removed image whose snapshots are not all marked yet.
    Removal = 14,
    /// What a partition owes to its pool's policy.
    Debt = 15,
    /// Which repository this is.
    Cluster = 16,
    /// Which steward leads.
    Steward = 17,
    /// A snapshot that somebody needs.
    Pin = 24,
    /// A group of VMs whose checkpoints make sets.
    Group = 25,
    /// What the disks of a snapshot read first.
    ReadTrace = 26,
}

/// A stored value that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It was written by a newer program.
    #[error("the record {key:?} has version {version}, newer than {VERSION}: upgrade this program")]
    Newer {
        /// Its key.
        key: Key,
        /// Its version.
        version: u8,
    },
    /// It is damaged.
    #[error("the record {key:?} is damaged: {detail}; restore the metadata store from a copy")]
    Damaged {
        /// Its key.
        key: Key,
        /// What is wrong.
        detail: String,
    },
}

const MAGIC: [u8; 4] = *b"BCMR";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 12;

/// A kind of record.
pub trait Record: prost::Message + Default + Clone + PartialEq + std::fmt::Debug {
    /// Its kind.
    const KIND: KeyKind;

    /// The key that this record belongs under.
    fn key(&self) -> Key;

    /// Checks what the rest of the service relies on.
    ///
    /// # Errors
    /// What is wrong.
    fn check(&self) -> Result<(), &'static str>;
}

fn crc(header: &[u8], key: &Key, body: &[u8]) -> u32 {
    let mut all = BytesMut::with_capacity(header.len() + key.as_slice().len() + body.len());
    all.put_slice(header);
    all.put_slice(key.as_slice());
    all.put_slice(body);
    crc32c(&all)
}

/// The stored form of a record.
#[must_use]
pub fn encode<R: Record>(record: &R) -> Bytes {
    debug_assert_eq!(record.check(), Ok(()));
    let body = record.encode_to_vec();
    let mut out = BytesMut::with_capacity(HEADER_BYTES + body.len());
    out.put_slice(&MAGIC);
    out.put_slice(&[VERSION, R::KIND as u8, 0, 0]);
    let sum = crc(&out, &record.key(), &body);
    out.put_u32_le(sum);
    out.put_slice(&body);
    out.freeze()
}

/// Reads the record stored under `key`, whatever the bytes are.
///
/// # Errors
/// When they are not a record of this kind that belongs under this key.
pub fn decode<R: Record>(key: &Key, stored: &[u8]) -> Result<R, RecordError> {
    let damaged =
        |detail: &str| RecordError::Damaged { key: key.clone(), detail: detail.to_owned() };
    let (header, body) =
        stored.split_at_checked(HEADER_BYTES).ok_or_else(|| damaged("shorter than its header"))?;
    let [m0, m1, m2, m3, version, kind, zero0, zero1, sum @ ..] = header else {
        return Err(damaged("shorter than its header"));
    };
    if [*m0, *m1, *m2, *m3] != MAGIC {
        return Err(damaged("it does not begin with BCMR"));
    }
    if *version > VERSION {
        return Err(RecordError::Newer { key: key.clone(), version: *version });
    }
    if *version != VERSION || *kind != R::KIND as u8 || [*zero0, *zero1] != [0, 0] {
        return Err(damaged("its header is not that of its kind"));
    }
    let summed = header.get(..8).unwrap_or_default();
    if *sum != crc(summed, key, body).to_le_bytes() {
        return Err(damaged("its checksum does not match"));
    }
    let record = R::decode(body).map_err(|error| damaged(&error.to_string()))?;
    record.check().map_err(damaged)?;
    if record.key() != *key {
        return Err(damaged("it belongs under another key"));
    }
    Ok(record)
}

/// Builds keys.
struct KeyBuilder(BytesMut);

impl KeyBuilder {
    fn new(kind: KeyKind) -> Self {
        let mut bytes = BytesMut::with_capacity(64);
        bytes.put_u8(kind as u8);
        Self(bytes)
    }

    fn u8(mut self, number: u8) -> Self {
        self.0.put_u8(number);
        self
    }

    fn u16(mut self, number: u16) -> Self {
        self.0.put_u16(number);
        self
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.put_u32(number);
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.put_u64(number);
        self
    }

    fn text(mut self, text: &str) -> Self {
        self.0.put_slice(text.as_bytes());
        self
    }

    fn key(self) -> Key {
        Key::new(self.0.freeze())
    }
}

/// The first byte of every key of a kind: lists all of them.
#[must_use]
pub fn prefix_of(kind: KeyKind) -> Key {
    KeyBuilder::new(kind).key()
}

#[cfg(test)]
mod tests;
