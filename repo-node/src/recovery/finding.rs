//! What the start of a store can find wrong.

use std::fmt;

use crate::format::{StoreId, identity};

/// What the start of a store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// What was wrong, and what it means: a line each. Empty after a clean stop of a sound store.
    pub findings: Vec<Finding>,
    /// Segments that had to be read, because they had no good listing.
    pub segments_scanned: u32,
    /// All segments.
    pub segments: u32,
    /// Records in the index.
    pub records: u64,
}

/// One thing that the start of a store found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The last write before the stop was cut short. It had not been acknowledged.
    TornTail {
        /// File.
        segment: String,
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A stretch of a segment is not readable as records.
    UnreadableBytes {
        /// File.
        segment: String,
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A record's payload does not match its checksum.
    DamagedRecord {
        /// File.
        segment: String,
        /// Where it begins.
        offset: u64,
        /// Identity of the record.
        id: blobcr_proto::Hash,
    },
    /// A segment is shorter than when it was closed.
    TruncatedSegment {
        /// File.
        segment: String,
        /// Bytes that are missing.
        missing_bytes: u64,
        /// Records that are missing.
        missing_records: u64,
    },
    /// A segment is gone altogether.
    MissingSegment {
        /// File.
        segment: String,
        /// Records that are missing.
        missing_records: u64,
    },
    /// The listing of a segment was damaged, and has been made again from the segment.
    DamagedListing {
        /// File.
        listing: String,
        /// What was wrong with it.
        detail: String,
    },
    /// The header of a segment was damaged; its records are still found by their own headers.
    DamagedSegmentHeader {
        /// File.
        segment: String,
    },
    /// A file belongs to another store, and is not used.
    ForeignSegment {
        /// File.
        segment: String,
        /// The other store.
        store: StoreId,
    },
    /// The node's identity file was lost, and has been made again from the segments.
    IdentityRestored {
        /// The identity.
        store: StoreId,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TornTail { segment, offset, len } => write!(
                f,
                "{segment}: the last write, {len} bytes at {offset}, was cut short by the stop; \
                 nothing of it had been acknowledged: nothing to do"
            ),
            Self::UnreadableBytes { segment, offset, len } => write!(
                f,
                "{segment}: {len} bytes at {offset} are damaged and the records in them lost; \
                 `blobcr snapshot verify` tells which snapshots need them; check the disk"
            ),
            Self::DamagedRecord { segment, offset, id } => write!(
                f,
                "{segment}: record {id} at {offset} is damaged; `blobcr snapshot verify` tells \
                 which snapshots need it; check the disk"
            ),
            Self::TruncatedSegment { segment, missing_bytes, missing_records } => write!(
                f,
                "{segment}: its last {missing_bytes} bytes with {missing_records} records are \
                 missing; `blobcr snapshot verify` tells which snapshots need them; check the disk"
            ),
            Self::MissingSegment { segment, missing_records } => write!(
                f,
                "{segment} with {missing_records} records is missing; put the file back and \
                 restart, or remove its listing (.idx) to go on without them; `blobcr snapshot \
                 verify` tells which snapshots need them"
            ),
            Self::DamagedListing { listing, detail } => write!(
                f,
                "{listing}: {detail}; it has been made again from its segment: nothing to do"
            ),
            Self::DamagedSegmentHeader { segment } => write!(
                f,
                "{segment}: its header is damaged; its records are still found by their own: check \
                 the disk"
            ),
            Self::ForeignSegment { segment, store } => write!(
                f,
                "{segment} belongs to store {store} and is not used; move it to that store's \
                 directory"
            ),
            Self::IdentityRestored { store } => write!(
                f,
                "the file {} was missing or damaged and has been made again from the segments: \
                 this is node {store}; check the disk",
                identity::NAME
            ),
        }
    }
}
