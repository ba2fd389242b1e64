//! Snapshots.

use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// The highest number of a snapshot: what every program can hold in a signed 64-bit integer.
pub const SNAPSHOT_NUMBER_MAX: u64 = i64::MAX as u64;

/// One version of an image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotRecord {
    /// Its image.
    #[prost(uint64, tag = "1")]
    pub image_id: u64,
    /// Its number, from 1.
    #[prost(uint64, tag = "2")]
    pub number: u64,
    /// Its state.
    #[prost(enumeration = "v1::SnapshotState", tag = "3")]
    pub state: i32,
    /// What it holds; set once it is stable.
    #[prost(message, optional, tag = "4")]
    pub root: Option<v1::TreeRoot>,
    /// When it was begun, in ms since 1970.
    #[prost(uint64, tag = "5")]
    pub created_unix_ms: u64,
    /// When it became stable, in ms since 1970, or 0.
    #[prost(uint64, tag = "6")]
    pub stable_unix_ms: u64,
    /// What persisting it took.
    #[prost(message, optional, tag = "7")]
    pub stats: Option<v1::SnapshotStats>,
    /// Why it failed.
    #[prost(string, tag = "8")]
    pub reason: String,
    /// Who began it.
    #[prost(string, tag = "9")]
    pub writer: String,
    /// The lease that it was begun under; 0 for that of a clone.
    #[prost(uint64, tag = "10")]
    pub lease_id: u64,
    /// For an obsolete one: the generation of the newest lease when it became so.
    #[prost(uint64, tag = "11")]
    pub obsolete_generation: u64,
}

impl SnapshotRecord {
    /// The key of a snapshot.
    #[must_use]
    pub fn key_of(image_id: u64, number: u64) -> Key {
        KeyBuilder::new(KeyKind::Snapshot).u64(image_id).u64(number).key()
    }

    /// What all snapshots of an image begin with.
    #[must_use]
    pub fn prefix_of(image_id: u64) -> Key {
        KeyBuilder::new(KeyKind::Snapshot).u64(image_id).key()
    }

    /// The wire form; `image` is the name of its image.
    #[must_use]
    pub fn to_wire(&self, image: &str) -> v1::Snapshot {
        v1::Snapshot {
            image_id: self.image_id,
            image: image.to_owned(),
            number: self.number,
            state: self.state,
            root: self.root.clone(),
            created_unix_ms: self.created_unix_ms,
            stable_unix_ms: self.stable_unix_ms,
            stats: self.stats,
            reason: self.reason.clone(),
        }
    }
}

/// Checks the shape of a root.
///
/// # Errors
/// What is wrong with it.
pub fn check_root(root: &v1::TreeRoot) -> Result<(), &'static str> {
    if root.size_bytes > IMAGE_SIZE_MAX {
        return Err("the root's size is larger than any image");
    }
    if blobcr_proto::ChunkSize::new(root.chunk_size.into()).is_err() {
        return Err("the root's chunk size is not a power of two from 64 KiB to 4 MiB");
    }
    if !root.fan_out.is_power_of_two() || !(2..=1024).contains(&root.fan_out) {
        return Err("the root's fan-out is not a power of two from 2 to 1024");
    }
    match root.node.len() {
        0 | blobcr_proto::Hash::LEN => Ok(()),
        _ => Err("the root's node is no identity of 32 bytes"),
    }
}

impl Record for SnapshotRecord {
    const KIND: KeyKind = KeyKind::Snapshot;

    fn key(&self) -> Key {
        Self::key_of(self.image_id, self.number)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.image_id == 0 || !(1..=SNAPSHOT_NUMBER_MAX).contains(&self.number) {
            return Err("an id or number is out of range");
        }
        if let Some(root) = &self.root {
            check_root(root)?;
        }
        match v1::SnapshotState::try_from(self.state) {
            Err(_) | Ok(v1::SnapshotState::Unspecified) => Err("unknown state"),
            Ok(v1::SnapshotState::Stable) if self.root.is_none() => Err("stable without a root"),
            Ok(_) => Ok(()),
        }
    }
}
