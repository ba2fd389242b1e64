//! Compaction: what is of no use goes, what is of use stays, whatever happens meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blobcr_proto::v1::{Record, RecordKind};
use blobcr_repo_node::testing::SimDisk;
use blobcr_repo_node::{ChunkStore, Fetched, Options};

use crate::common::{assert_holds, chunk, key, open, options};

const POOL: u32 = 1;
const SEGMENT: u64 = 64 << 10;

fn generations(store: &ChunkStore) -> Vec<u64> {
    let listed = store.list(POOL, RecordKind::Chunk, None, 1000).0;
    listed.iter().map(|listed| listed.generation).collect()
}

#[test]
fn deleted_records_give_their_room_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let records: Vec<_> = (0..200).map(|n| chunk(n, 5000)).collect();
    store.put(POOL, 1, &records[..100]).unwrap();
    store.put(POOL, 1, &records[100..]).unwrap();
    let before = store.status();
    let dead: Vec<_> = records.iter().filter(|r| key(r).id.0[0] < 192).map(key).collect();
    store.delete(POOL, 2, &dead).unwrap();
    store.put(POOL, 1, &[chunk(1000, 100_000)]).unwrap();
    store.put(POOL, 1, &[chunk(1001, 10)]).unwrap();
    let report = store.compact().unwrap();
    assert!(report.segments > 0 && report.carried_bytes < report.unlinked_bytes / 2, "{report:?}");
    let after = store.status();
    assert!(after.segment_bytes < before.segment_bytes * 2 / 3, "{before:?} {after:?}");
    assert_eq!(after.records as usize, 202 - dead.len());
    drop(store);
    let (store, report) = open(dir.path(), SEGMENT);
    assert!(report.findings.is_empty(), "{report:?}");
    for record in &records {
        if dead.contains(&key(record)) {
            assert_eq!(store.get(POOL, key(record)), Fetched::Absent);
        } else {
            assert_holds(&store, POOL, record);
        }
    }
}

#[test]
fn touches_take_bounded_room_and_the_last_of_each_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let records: Vec<_> = (0..50).map(|n| chunk(n, 1000)).collect();
    let keys: Vec<_> = records.iter().map(key).collect();
    store.put(POOL, 1, &records).unwrap();
    for generation in 2..=400 {
        store.touch(POOL, generation, &keys).unwrap();
        if generation % 40 == 0 {
            store.compact().unwrap();
            // The records, one touch for each, and one open segment.
            let status = store.status();
            assert!(status.segment_bytes < 50 * 1200 + 3 * SEGMENT, "{status:?}");
        }
    }
    assert_eq!(generations(&store), vec![400; 50]);
    drop(store);
    let (store, _) = open(dir.path(), SEGMENT);
    assert_eq!(generations(&store), vec![400; 50]);
    assert_eq!(store.delete(POOL, 400, &keys).unwrap().kept, 50);
}

#[test]
fn puts_and_deletes_in_turn_take_bounded_room() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), SEGMENT);
    let lasting = chunk(0, 40_000);
    store.put(POOL, 1, std::slice::from_ref(&lasting)).unwrap();
    for n in 1..300 {
        let record = chunk(n, 3000);
        store.put(POOL, n, std::slice::from_ref(&record)).unwrap();
        store.delete(POOL, n + 1, &[key(&record)]).unwrap();
        if n % 50 == 0 {
            store.compact().unwrap();
            let status = store.status();
            assert!(status.segment_bytes < 4 * SEGMENT, "{status:?}");
        }
    }
    assert_holds(&store, POOL, &lasting);
    drop(store);
    assert_eq!(open(dir.path(), SEGMENT).1.records, 1);
}

/// One thread's share of records, which nobody else changes: after each call it knows what must
/// be there.
fn churn(store: &ChunkStore, share: u64, done: &AtomicBool) -> Vec<(Record, bool)> {
    let mut records: Vec<_> =
        (0..40).map(|n| (chunk(share * 1000 + n, 100 + 100 * n as usize), false)).collect();
    for round in 1.. {
        for (n, (record, live)) in records.iter_mut().enumerate() {
            let key = key(record);
            match (round + n * 7) % 5 {
                0 if *live => {
                    assert_eq!(store.delete(POOL, u64::MAX, &[key]).unwrap().deleted, 1);
                    *live = false;
                }
                1 | 2 => {
                    store.put(POOL, round as u64, std::slice::from_ref(record)).unwrap();
                    *live = true;
                }
                3 => assert_eq!(store.touch(POOL, round as u64, &[key]).unwrap(), [*live]),
                _ => {}
            }
            let expected = if *live { Fetched::Found(record.clone()) } else { Fetched::Absent };
            assert_eq!(store.get(POOL, key), expected);
        }
        if done.load(Ordering::Relaxed) {
            break;
        }
    }
    records
}

#[test]
fn readers_and_writers_never_notice() {
    let disk = SimDisk::new(6);
    let options = Options {
        compact_dead_fraction: 0.3,
        compact_bytes_per_second: u64::MAX,
        maintenance_interval: Some(Duration::from_millis(1)),
        ..options(SEGMENT)
    };
    let (store, _) = ChunkStore::open_on(Arc::new(disk.clone()), options.clone()).unwrap();
    let done = AtomicBool::new(false);
    let shares: Vec<_> = std::thread::scope(|scope| {
        let (store, done) = (&store, &done);
        let threads: Vec<_> =
            (0..4).map(|share| scope.spawn(move || churn(store, share, done))).collect();
        // Segments are numbered in the order in which they are begun.
        let oldest = || disk.files().into_iter().filter(|name| name.ends_with(".seg")).min();
        // A thread that ends before it is told to has failed.
        let failed = || threads.iter().any(std::thread::ScopedJoinHandle::is_finished);
        while oldest().is_none_or(|name| name.as_str() < "00000020.seg") && !failed() {
            std::thread::sleep(Duration::from_millis(1));
        }
        done.store(true, Ordering::Relaxed);
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let live = shares.iter().filter(|(_, live)| *live).count() as u64;
    drop(store);
    let (store, report) = ChunkStore::open_on(Arc::new(disk.crash()), options).unwrap();
    assert_eq!((report.records, report.findings.len()), (live, 0));
    for (record, live) in &shares {
        let expected = if *live { Fetched::Found(record.clone()) } else { Fetched::Absent };
        assert_eq!(store.get(POOL, key(record)), expected);
    }
}
