//! The `record` file: what a disk is. Written once, last of all files, so that a directory with a
//! record is a whole disk and one without holds nothing.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use blobcr_proto::{DiskName, v1};

use super::files::Files;
use super::frame::{self, Kind};
use super::io::Which;
use super::upstreams::Source;
use super::{DiskError, DiskSpec};

/// Versions: 1, the first.
const KIND: Kind = Kind { magic: *b"BCDR", version: 1 };

/// A [`Source`] in a file.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredSource {
    #[prost(string, tag = "1")]
    image: String,
    #[prost(uint64, tag = "2")]
    image_id: u64,
    #[prost(uint64, tag = "3")]
    number: u64,
    #[prost(uint32, tag = "4")]
    pool: u32,
    #[prost(message, optional, tag = "5")]
    root: Option<v1::TreeRoot>,
}

impl From<&Source> for StoredSource {
    fn from(source: &Source) -> Self {
        Self {
            image: source.image.clone(),
            image_id: source.image_id,
            number: source.number,
            pool: source.pool,
            root: Some(source.root.clone()),
        }
    }
}

impl StoredSource {
    pub(super) fn into_source(self) -> Option<Source> {
        let Self { image, image_id, number, pool, root } = self;
        Some(Source { image, image_id, number, pool, root: root? })
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(string, tag = "1")]
    name: String,
    /// 16 bytes, big endian.
    #[prost(bytes = "vec", tag = "2")]
    uid: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    source: Option<StoredSource>,
    #[prost(uint64, tag = "4")]
    size_bytes: u64,
    #[prost(string, tag = "5")]
    writer: String,
    #[prost(uint64, tag = "6")]
    created_unix_ms: u64,
}

pub(super) fn encode(spec: &DiskSpec) -> Vec<u8> {
    let stored = Stored {
        name: spec.name.to_string(),
        uid: spec.uid.to_be_bytes().to_vec(),
        source: Some(StoredSource::from(&spec.source)),
        size_bytes: spec.size_bytes,
        writer: spec.writer.clone(),
        created_unix_ms: spec.created_unix_ms,
    };
    frame::encode(KIND, &stored)
}

pub(super) fn decode(bytes: &[u8]) -> Result<DiskSpec, String> {
    let stored: Stored = frame::decode(KIND, bytes)?;
    let uid: [u8; 16] = stored.uid.try_into().map_err(|_| "its uid is not 16 bytes")?;
    let source = stored.source.and_then(StoredSource::into_source).ok_or("it names no source")?;
    Ok(DiskSpec {
        name: DiskName::new(stored.name).map_err(|error| error.to_string())?,
        uid: u128::from_be_bytes(uid),
        source,
        size_bytes: stored.size_bytes,
        writer: stored.writer,
        created_unix_ms: stored.created_unix_ms,
    })
}

/// Takes the disk for this process: the lock goes with the returned file.
pub(super) fn lock(files: &Arc<Files>, path: &Path) -> Result<File, DiskError> {
    let file = files.open(Which::Record, path)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DiskError::Locked(files.disk().to_owned())),
        Err(error) => Err(files.error(Which::Record, "lock", error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> DiskSpec {
        DiskSpec {
            name: DiskName::new("vm1-root").unwrap(),
            uid: 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff,
            source: Source {
                image: "debian-12".into(),
                image_id: 3,
                number: 2,
                pool: 1,
                root: v1::TreeRoot {
                    size_bytes: 1 << 30,
                    chunk_size: 256 << 10,
                    fan_out: 64,
                    node: vec![7; 32].into(),
                },
            },
            size_bytes: 2 << 30,
            writer: "host-a".into(),
            created_unix_ms: 1_700_000_000_000,
        }
    }

    #[test]
    fn golden_record_of_version_1() {
        let bytes = encode(&sample());
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/record-v1.hex").trim());
        assert_eq!(decode(&bytes), Ok(sample()));
    }
}
