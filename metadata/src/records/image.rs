//! Images.

use blobcr_proto::{ChunkSize, ImageName, v1};

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// A named, versioned virtual disk. It stays, as a grave, when the image is removed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageRecord {
    /// Its id; never reused.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its name, which another image may have once this one is removed.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Its pool.
    #[prost(uint32, tag = "3")]
    pub pool: u32,
    /// Bytes in a chunk.
    #[prost(uint32, tag = "4")]
    pub chunk_size: u32,
    /// When it was made, in ms since 1970.
    #[prost(uint64, tag = "5")]
    pub created_unix_ms: u64,
    /// The newest stable snapshot; 0 before the first.
    #[prost(uint64, tag = "6")]
    pub latest: u64,
    /// The highest number ever begun.
    #[prost(uint64, tag = "7")]
    pub highest_number: u64,
    /// The image that it was cloned from, or 0.
    #[prost(uint64, tag = "8")]
    pub parent_image: u64,
    /// The snapshot that it was cloned from, or 0.
    #[prost(uint64, tag = "9")]
    pub parent_snapshot: u64,
    /// Who alone may add snapshots; empty when anybody may.
    #[prost(string, tag = "10")]
    pub writer: String,
    /// When it was removed, in ms since 1970; 0 while it lives.
    #[prost(uint64, tag = "11")]
    pub removed_unix_ms: u64,
    /// The snapshot with whose set the image would have gone, but for a pin; 0 when none.
    #[prost(uint64, tag = "12")]
    pub left_behind: u64,
}

impl ImageRecord {
    /// The key of an image.
    #[must_use]
    pub fn key_of(id: u64) -> Key {
        KeyBuilder::new(KeyKind::Image).u64(id).key()
    }

    /// Whether it was removed.
    #[must_use]
    pub const fn is_removed(&self) -> bool {
        self.removed_unix_ms != 0
    }

    /// The wire form.
    #[must_use]
    pub fn to_wire(&self) -> v1::Image {
        v1::Image {
            id: self.id,
            name: self.name.clone(),
            pool: self.pool,
            chunk_size: self.chunk_size,
            created_unix_ms: self.created_unix_ms,
            latest: self.latest,
            highest_number: self.highest_number,
            parent_image: self.parent_image,
            parent_snapshot: self.parent_snapshot,
            writer: self.writer.clone(),
        }
    }
}

impl Record for ImageRecord {
    const KIND: KeyKind = KeyKind::Image;

    fn key(&self) -> Key {
        Self::key_of(self.id)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.id == 0 || self.pool == 0 {
            return Err("an id is zero");
        }
        if self.latest > self.highest_number {
            return Err("latest is above every number begun");
        }
        ChunkSize::new(self.chunk_size.into()).map_err(|_| "no chunk size")?;
        ImageName::new(self.name.as_str()).map_err(|_| "no image name")?;
        Ok(())
    }
}
