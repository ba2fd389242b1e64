//! What the tests share: records made from a number, and a store in a directory of its own.

use std::path::Path;

use blobcr_proto::codec::{compress, crc32c};
use blobcr_proto::record::{RecordKey, whole};
use blobcr_proto::v1::{Codec, Record, RecordKind};
use blobcr_proto::{Hash, record};
use blobcr_repo_node::{ChunkStore, Fetched, Options, RecoveryReport};
use bytes::Bytes;

/// Options of a store that does nothing by itself and has small segments.
pub(crate) fn options(segment_bytes: u64) -> Options {
    Options {
        segment_bytes,
        reserve_bytes: Some(0),
        maintenance_interval: None,
        ..Options::default()
    }
}

pub(crate) fn open(dir: &Path, segment_bytes: u64) -> (ChunkStore, RecoveryReport) {
    ChunkStore::open(dir, options(segment_bytes)).unwrap()
}

/// `len` bytes that no other number has.
pub(crate) fn plain(n: u64, len: usize) -> Bytes {
    let mut out = vec![0; len];
    let mut hash = Hash::of(&n.to_le_bytes());
    for piece in out.chunks_mut(Hash::LEN) {
        piece.copy_from_slice(&hash.0[..piece.len()]);
        hash = Hash::of(&hash.0);
    }
    out.into()
}

/// A whole record of `len` plain bytes; the number chooses the codec too.
pub(crate) fn chunk(n: u64, len: usize) -> Record {
    let plain = plain(n, len);
    whole(RecordKind::Chunk, Hash::of(&plain), Codec::Plain, plain.len(), plain)
}

/// A record that compresses.
pub(crate) fn text(n: u64, codec: Codec) -> Record {
    let plain = Bytes::from(format!("{n} is the number of this text. ").repeat(200));
    let payload = compress(codec, &plain).unwrap_or_else(|| plain.to_vec());
    whole(RecordKind::TreeNode, Hash::of(&plain), codec, plain.len(), payload.into())
}

pub(crate) fn shard(n: u64, shard: u32, len: usize) -> Record {
    let payload = plain(n << 8 | u64::from(shard), len);
    let mut record = chunk(n, len);
    record.r#ref.as_mut().unwrap().shard = shard;
    Record { payload_crc32c: crc32c(&payload), payload, ..record }
}

pub(crate) fn key(record: &Record) -> RecordKey {
    record::check_payload(record).unwrap()
}

pub(crate) fn assert_holds(store: &ChunkStore, pool: u32, record: &Record) {
    assert_eq!(store.get(pool, key(record)), Fetched::Found(record.clone()));
}
