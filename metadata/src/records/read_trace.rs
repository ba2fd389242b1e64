//! What the disks of a snapshot waited for first: a hint for those that start from it later.

use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// The trace of one snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReadTraceRecord {
    /// The snapshot's image.
    #[prost(uint64, tag = "1")]
    pub image_id: u64,
    /// The snapshot.
    #[prost(uint64, tag = "2")]
    pub number: u64,
    /// What was read.
    #[prost(message, optional, tag = "3")]
    pub trace: Option<v1::ReadTrace>,
    /// When it was put, in ms since 1970.
    #[prost(uint64, tag = "4")]
    pub put_unix_ms: u64,
}

impl ReadTraceRecord {
    /// The key of a snapshot's trace.
    #[must_use]
    pub fn key_of(image_id: u64, number: u64) -> Key {
        Self::builder(image_id).u64(number).key()
    }

    /// What the traces of an image begin with.
    #[must_use]
    pub fn prefix_of(image_id: u64) -> Key {
        Self::builder(image_id).key()
    }

    fn builder(image_id: u64) -> KeyBuilder {
        KeyBuilder::new(KeyKind::ReadTrace).u64(image_id)
    }

    /// Chunks in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.trace.as_ref().map_or(0, v1::ReadTrace::count)
    }
}

impl Record for ReadTraceRecord {
    const KIND: KeyKind = KeyKind::ReadTrace;

    fn key(&self) -> Key {
        Self::key_of(self.image_id, self.number)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.image_id == 0 || self.number == 0 {
            return Err("an id or number is zero");
        }
        self.trace.as_ref().ok_or("there is no trace")?.check()
    }
}
