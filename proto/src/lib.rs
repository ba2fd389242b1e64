//! What every part of blobcr shares: the wire protocol, the identities of records, the names that
//! people give, units, and how a record's bytes are encoded.
//!
//! | module | holds |
//! |---|---|
//! | [`v1`] | messages and services generated from `proto/blobcr/v1/*.proto` |
//! | [`hash`] | [`Hash`]: BLAKE3-256, the identity of chunks and tree nodes |
//! | [`name`] | validated names of images, disks, VMs and pools, and the `IMAGE@N` form |
//! | [`units`] | [`ChunkSize`], sectors, byte ranges |
//! | [`codec`] | plain bytes ↔ stored payload |
//! | [`policy`] | redundancy and compression of a pool |
//! | [`record`] | checks that a [`v1::Record`] is what it says it is |
//! | [`trace`] | in which order the chunks of a snapshot are read first |
//! | [`channel`] | frames of a VM's checkpoint channel |
//! | `bulk` | calls that carry chunks, without copying them (with gRPC only) |
//! | `exact` | how messages become bytes on the wire (with gRPC only) |

#[cfg(feature = "grpc")]
pub mod bulk;
pub mod channel;
pub mod codec;
#[cfg(feature = "grpc")]
pub mod exact;
pub mod hash;
pub mod name;
#[cfg(feature = "planted-bugs")]
pub mod planted;
pub mod policy;
pub mod record;
pub mod trace;
pub mod units;

/// Messages and services of protocol version 1.
#[expect(
    missing_docs,
    clippy::all,
    clippy::allow_attributes,
    reason = "generated code; the .proto files carry the docs"
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/blobcr.v1.rs"));
}

pub use hash::Hash;
pub use name::{DiskName, ImageName, ImageSpec, PoolName, RepositoryName, VmName};
pub use units::{ByteRange, ChunkSize, SECTOR_SIZE};

/// The largest gRPC message that any part sends or accepts, in bytes: one 4 MiB chunk, twice over
/// for batches of small records, and room for headers.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
