//! What a sound store does: put, get, touch, delete, list, and all of it again after a restart.

use crate::common::{assert_holds, chunk, key, open, options, shard, text};
use blobcr_proto::Hash;
use blobcr_proto::v1::{Codec, RecordKind};
use blobcr_repo_node::disk::LockError;
use blobcr_repo_node::{ChunkStore, DeleteOutcome, Fetched, OpenError, PutOutcome, StoreError};

const POOL: u32 = 3;
const SEGMENT: u64 = 1 << 20;

#[test]
fn every_kind_of_record_comes_back_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let records = [
        chunk(1, 256 << 10),
        chunk(2, 64 << 10),
        chunk(3, 4 << 20),
        chunk(4, 1),
        text(5, Codec::Lz4),
        text(6, Codec::Zstd),
        shard(7, 1, 1000),
        shard(7, 2, 1000),
    ];
    let (store, report) = open(dir.path(), SEGMENT);
    assert!(report.findings.is_empty());
    let id = store.node_id();
    let outcome = store.put(POOL, 5, &records).unwrap();
    assert_eq!(outcome.stored, 8);
    for record in &records {
        assert_holds(&store, POOL, record);
    }
    let payloads: u64 = records.iter().map(|record| record.payload.len() as u64).sum();
    assert!(outcome.stored_bytes >= payloads + 8 * 80 && outcome.stored_bytes < payloads + 8 * 96);
    assert_eq!(store.status().live_bytes, outcome.stored_bytes);
    assert_eq!(store.get(POOL + 1, key(&records[0])), Fetched::Absent, "pools are apart");
    drop(store);

    let (store, report) = open(dir.path(), SEGMENT);
    assert_eq!((report.findings.len(), report.segments_scanned, report.records), (0, 0, 8));
    assert_eq!(store.node_id(), id);
    assert_eq!(store.status().live_bytes, outcome.stored_bytes);
    for record in &records {
        assert_holds(&store, POOL, record);
    }
}

#[test]
fn a_record_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let record = chunk(1, 1000);
    let twice = [record.clone(), record.clone()];
    assert_eq!(store.put(POOL, 1, &twice).unwrap().stored, 1);
    assert_eq!(store.put(POOL, 1, &twice).unwrap(), PutOutcome::default());
    assert_eq!(store.status().records, 1);
    let before = store.counters().syncs;
    store.put(POOL, 1, &twice).unwrap();
    assert_eq!(store.counters().syncs, before, "nothing new, nothing to sync");
}

#[test]
fn touches_hold_a_record_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let records = [chunk(1, 100), chunk(2, 100), chunk(3, 100)];
    let keys = records.each_ref().map(key);
    store.put(POOL, 1, &records[..2]).unwrap();
    assert_eq!(store.touch(POOL, 7, &keys[1..]).unwrap(), [true, false]);
    // A put of what is there is a touch.
    store.put(POOL, 9, &records[..1]).unwrap();
    store.touch(POOL, 2, &keys).unwrap();
    drop(store);
    let (store, _) = open(dir.path(), SEGMENT);
    let (listed, _) = store.list(POOL, RecordKind::Chunk, None, 10);
    let mut generations: Vec<u64> = listed.iter().map(|listed| listed.generation).collect();
    generations.sort_unstable();
    assert_eq!(generations, [7, 9]);
    let deleted = store.delete(POOL, 9, &keys).unwrap();
    assert_eq!(deleted, DeleteOutcome { deleted: 1, kept: 1 });
    assert_holds(&store, POOL, &records[0]);
    assert_eq!(store.get(POOL, keys[1]), Fetched::Absent);
    drop(store);
    let (store, _) = open(dir.path(), SEGMENT);
    assert_holds(&store, POOL, &records[0]);
    assert_eq!(store.get(POOL, keys[1]), Fetched::Absent, "a delete survives a restart");
}

#[test]
fn a_deleted_record_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let record = chunk(1, 100);
    for generation in 1..5 {
        assert_eq!(store.put(POOL, generation, std::slice::from_ref(&record)).unwrap().stored, 1);
        let deleted = store.delete(POOL, generation + 1, &[key(&record)]).unwrap();
        assert_eq!(deleted.deleted, 1);
    }
    store.put(POOL, 1, std::slice::from_ref(&record)).unwrap();
    drop(store);
    let (store, _) = open(dir.path(), SEGMENT);
    assert_holds(&store, POOL, &record);
    let (listed, _) = store.list(POOL, RecordKind::Chunk, None, 10);
    assert_eq!(listed[0].generation, 1, "an old touch does not count for a new record");
}

#[test]
fn what_is_not_what_it_says_is_refused_and_nothing_of_the_request_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let good = chunk(1, 100);
    let mut wrong_identity = chunk(2, 100);
    wrong_identity.r#ref.as_mut().unwrap().id = Hash::of(b"other").to_bytes();
    let mut wrong_checksum = chunk(3, 100);
    wrong_checksum.payload_crc32c ^= 1;
    let mut wrong_shard = shard(4, 1, 100);
    wrong_shard.payload = crate::common::plain(9, 100);
    let mut no_ref = chunk(5, 100);
    no_ref.r#ref = None;
    for bad in [wrong_identity, wrong_checksum, wrong_shard, no_ref] {
        let refused = store.put(POOL, 1, &[good.clone(), bad]);
        assert!(matches!(refused, Err(StoreError::Record(_))), "{refused:?}");
    }
    assert_eq!(store.status().records, 0);
}

#[test]
fn pages_of_a_listing_cover_everything_once_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let mut records: Vec<_> = (0..500).map(|n| chunk(n, 10)).collect();
    records.extend((1..=40).flat_map(|s| [shard(7, s, 10), shard(8, s, 10)]));
    store.put(POOL, 1, &records).unwrap();
    store.put(POOL, 1, &[text(1, Codec::Lz4)]).unwrap();
    store.put(POOL + 1, 1, &[chunk(9999, 10)]).unwrap();
    let mut expected: Vec<_> = records.iter().map(key).collect();
    expected.sort_by_key(|key| (key.id, key.shard));
    for limit in [1, 7, 100, 580, 10_000] {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let (page, more) = store.list(POOL, RecordKind::Chunk, after, limit);
            assert!(page.len() <= limit && (!more || page.len() == limit));
            for listed in page {
                seen.push((&listed.r#ref.unwrap()).try_into().unwrap());
            }
            after = seen.last().copied();
            if !more {
                break;
            }
        }
        assert_eq!(seen, expected);
    }
}

#[test]
fn a_second_store_on_a_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let Err(error) = ChunkStore::open(dir.path(), options(SEGMENT)) else { panic!("opened twice") };
    assert!(matches!(error, OpenError::Lock(LockError::Held { .. })));
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(store);
    open(dir.path(), SEGMENT);
}

#[test]
fn after_close_reads_go_on_and_writes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    store.put(POOL, 1, &[chunk(1, 100)]).unwrap();
    store.close();
    assert_holds(&store, POOL, &chunk(1, 100));
    assert!(matches!(store.put(POOL, 1, &[chunk(2, 100)]), Err(StoreError::Closed)));
}
