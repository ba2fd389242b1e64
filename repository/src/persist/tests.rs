use std::num::NonZeroU64;
use std::sync::Mutex;

use blobcr_proto::ChunkSize;
use blobcr_proto::v1::RecordKind;
use proptest::prelude::*;
use rand::{RngCore, SeedableRng, rngs::StdRng};

use super::*;
use crate::testing::{MemoryDisk, MemoryPool, PoolOperation};
use crate::tree::FanOut;
use crate::{Identified, SnapshotReader, nodes::CachedNodes};

const CHUNK: ChunkSize = ChunkSize::MIN;
const CHUNK_LEN: usize = CHUNK.len();

fn geometry(size_bytes: u64) -> Geometry {
    Geometry::new(size_bytes, CHUNK, FanOut::new(64).unwrap()).unwrap()
}

/// A disk of `chunks` chunks that are all different.
fn random_disk(seed: u64, chunks: usize) -> MemoryDisk {
    let mut bytes = vec![0; chunks * CHUNK_LEN];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    MemoryDisk::new(bytes, CHUNK)
}

fn quiet(_: Progress) {}

fn whole<'a>(disk: &'a MemoryDisk) -> PersistJob<'a> {
    let geometry = geometry(disk.bytes().len() as u64);
    PersistJob {
        base: Root::empty(geometry),
        geometry,
        chunks: (0..geometry.chunks()).collect(),
        generation: 7,
        source: disk,
        progress: &quiet,
        limits: PersistLimits::default(),
    }
}

async fn read_back(pool: &MemoryPool, root: Root) -> Vec<u8> {
    let store: Arc<dyn ObjectStore> = Arc::new(pool.clone());
    let nodes = Arc::new(CachedNodes::new(Arc::clone(&store)));
    let reader = SnapshotReader::new(root, nodes, store);
    let mut bytes = vec![0xAA; root.geometry.size_bytes as usize];
    reader.read(0, &mut bytes).await.unwrap();
    bytes
}

fn unavailable() -> StoreError {
    StoreError::Unavailable("down for a test".into())
}

#[tokio::test]
async fn each_new_chunk_is_put_once_and_unchanged_data_puts_nothing() {
    let pool = MemoryPool::default();
    let disk = random_disk(1, 600);
    let first = persist(&pool, &pool, whole(&disk)).await.unwrap();
    let faults = pool.faults();
    // 600 chunks in batches of 256, and the tree's 11 nodes in one.
    assert_eq!(faults.calls(PoolOperation::Touch), 3 + 1);
    // 64 chunks to a put of 4 MiB; batches of 256, 256 and 88; one put of nodes.
    assert_eq!(faults.calls(PoolOperation::Put), 4 + 4 + 2 + 1);
    assert_eq!(faults.calls(PoolOperation::Get), 0, "an empty base has no nodes to read");
    assert_eq!(pool.count(RecordKind::Chunk), 600);
    let stats = first.stats;
    assert_eq!((stats.dirty_chunks, stats.dirty_bytes), (600, 600 * CHUNK.bytes()));
    assert_eq!((stats.stored_chunks, stats.zero_chunks, stats.tree_nodes), (600, 0, 11));
    assert!(stats.stored_bytes > 600 * CHUNK.bytes(), "chunks and nodes");

    faults.reset_calls();
    let again = PersistJob { base: first.root, generation: 8, ..whole(&disk) };
    let second = persist(&pool, &pool, again).await.unwrap();
    assert_eq!(second.root, first.root);
    assert_eq!(faults.calls(PoolOperation::Put), 0);
    assert_eq!(faults.calls(PoolOperation::Touch), 3, "nothing new in the tree to ask about");
    assert_eq!(second.stats.stored_bytes, 0);
    for id in pool.ids(RecordKind::Chunk) {
        assert_eq!(pool.generation(RecordKind::Chunk, &id), Some(8), "touched by the writer");
    }
    assert_eq!(read_back(&pool, second.root).await, disk.bytes());
}

#[tokio::test]
async fn equal_content_on_an_empty_base_stores_nothing_twice() {
    let pool = MemoryPool::default();
    let disk = random_disk(2, 100);
    let first = persist(&pool, &pool, whole(&disk)).await.unwrap();
    pool.faults().reset_calls();
    let second = persist(&pool, &pool, whole(&disk)).await.unwrap();
    assert_eq!(second.root, first.root);
    assert_eq!(pool.faults().calls(PoolOperation::Put), 0, "not even the nodes");
}

#[tokio::test]
async fn duplicates_are_sent_once_and_zeros_never() {
    let pool = MemoryPool::default();
    let mut bytes = Vec::new();
    for index in 0..90u8 {
        bytes.extend(std::iter::repeat_n(index % 3, CHUNK_LEN));
    }
    // A last chunk that is only partly within the disk.
    bytes.extend([5; 1000]);
    let disk = MemoryDisk::new(bytes, CHUNK);
    let done = persist(&pool, &pool, whole(&disk)).await.unwrap();
    assert_eq!(pool.count(RecordKind::Chunk), 3);
    assert_eq!((done.stats.zero_chunks, done.stats.stored_chunks), (30, 3));
    assert_eq!(done.stats.dirty_bytes, disk.bytes().len() as u64);
    assert_eq!(read_back(&pool, done.root).await, disk.bytes());
}

#[tokio::test(start_paused = true)]
async fn failures_that_pass_are_tried_again_and_reported() {
    let pool = MemoryPool::default();
    let disk = random_disk(3, 300);
    let stalls = Mutex::new(Vec::new());
    let last = Mutex::new(None);
    let progress = |step: Progress| {
        stalls.lock().unwrap().extend(step.stalled.clone());
        *last.lock().unwrap() = Some(step);
    };
    pool.faults().fail_next(PoolOperation::Touch, 2, unavailable());
    pool.faults().pass_next(PoolOperation::Put, 3);
    let full = StoreError::Full { node: "n".into(), detail: "no room".into() };
    pool.faults().fail_next(PoolOperation::Put, 9, full);
    let job = PersistJob { progress: &progress, ..whole(&disk) };
    let done = persist(&pool, &pool, job).await.unwrap();
    assert_eq!(read_back(&pool, done.root).await, disk.bytes());
    assert_eq!(done.stats.stored_chunks, 300);
    let stalls = stalls.into_inner().unwrap();
    assert!(stalls.iter().any(|text| text.contains("down for a test")), "{stalls:?}");
    assert!(stalls.iter().any(|text| text.contains("no room")), "{stalls:?}");
    let last = last.into_inner().unwrap().unwrap();
    assert_eq!((last.chunks_done, last.chunks_total), (300, 300));
    assert_eq!((last.stored_bytes, last.stalled), (done.stats.stored_bytes, None));
}

#[tokio::test(start_paused = true)]
async fn the_base_of_an_update_is_read_again_when_its_nodes_cannot_be_had() {
    let pool = MemoryPool::default();
    let disk = random_disk(4, 70);
    let first = persist(&pool, &pool, whole(&disk)).await.unwrap();
    let mut bytes = disk.bytes().to_vec();
    bytes[3 * CHUNK_LEN] ^= 1;
    let changed = MemoryDisk::new(bytes, CHUNK);
    pool.faults().fail_next(PoolOperation::Get, 3, unavailable());
    let job = PersistJob { base: first.root, chunks: vec![3], ..whole(&changed) };
    let second = persist(&pool, &pool, job).await.unwrap();
    assert_eq!(changed.reads(), [3]);
    assert_eq!(read_back(&pool, second.root).await, changed.bytes());
    assert_eq!(read_back(&pool, first.root).await, disk.bytes());
}

#[tokio::test(start_paused = true)]
async fn a_repository_that_stays_away_ends_the_job_after_the_limit() {
    let pool = MemoryPool::default();
    let disk = random_disk(5, 40);
    pool.faults().down(unavailable());
    let limits =
        PersistLimits { give_up_after: Duration::from_secs(30), ..PersistLimits::default() };
    let begin = tokio::time::Instant::now();
    let error = persist(&pool, &pool, PersistJob { limits, ..whole(&disk) }).await.unwrap_err();
    assert!(matches!(error, PersistError::Store(StoreError::Unavailable(_))), "{error}");
    assert!(error.is_transient());
    let waited = begin.elapsed().as_secs();
    assert!((20..=30).contains(&waited), "gave up after {waited} s");
    let touches = pool.faults().calls(PoolOperation::Touch);
    assert!((8..30).contains(&touches), "{touches} attempts in 30 s");
}

#[tokio::test]
async fn a_refusal_ends_the_job_at_once() {
    let pool = MemoryPool::default();
    let disk = random_disk(6, 40);
    let refused = StoreError::Refused { node: "n".into(), detail: "never".into() };
    pool.faults().fail_next(PoolOperation::Put, 1, refused);
    let error = persist(&pool, &pool, whole(&disk)).await.unwrap_err();
    assert!(matches!(error, PersistError::Store(StoreError::Refused { .. })), "{error}");
    assert!(!error.is_transient());
}

/// What the mirror relies on: a guest's write to a chunk that is being read waits for the read
/// only, so the reads of a job finish though the network does not move.
#[tokio::test]
async fn reads_finish_while_puts_hang_but_no_more_than_the_budget_is_read() {
    let pool = MemoryPool::default();
    let disk = random_disk(7, 200);
    let held = pool.faults().hold_next(PoolOperation::Put, 1000);
    let limits = PersistLimits {
        bytes_in_flight: 40 * CHUNK_LEN,
        puts: 2,
        put_bytes: 1,
        ..PersistLimits::default()
    };
    let job = PersistJob { limits, ..whole(&disk) };
    let mut persisting = Box::pin(persist(&pool, &pool, job));
    tokio::select! {
        _ = &mut persisting => panic!("it cannot end while the puts are held"),
        () = held.arrived(2) => {}
    }
    // The stages run on as far as they can.
    let settled = async {
        while disk.reads().len() < 40 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _ = &mut persisting => panic!("it cannot end while the puts are held"),
        () = settled => {}
    }
    assert_eq!(disk.reads().len(), 40);
    assert_eq!(pool.faults().calls(PoolOperation::Put), 2, "no more than two at once");
    held.release();
    let done = persisting.await.unwrap();
    assert_eq!(read_back(&pool, done.root).await, disk.bytes());
}

#[tokio::test]
async fn dropping_a_job_anywhere_leaves_orphans_only() {
    let disk = random_disk(8, 80);
    let expected = persist(&MemoryPool::default(), &MemoryPool::default(), whole(&disk)).await;
    let expected = expected.unwrap().root;
    let pool = MemoryPool::default();
    for (operation, before) in
        [(PoolOperation::Touch, 0), (PoolOperation::Put, 0), (PoolOperation::Put, 3)]
    {
        pool.faults().pass_next(operation, before);
        let held = pool.faults().hold_next(operation, 1);
        let limits = PersistLimits { puts: 1, put_bytes: 1 << 20, ..PersistLimits::default() };
        let job = PersistJob { limits, ..whole(&disk) };
        tokio::select! {
            _ = persist(&pool, &pool, job) => panic!("it cannot end while it is held"),
            () = held.arrived(1) => {}
        }
    }
    let done = persist(&pool, &pool, whole(&disk)).await.unwrap();
    assert_eq!(done.root, expected);
    assert_eq!(read_back(&pool, done.root).await, disk.bytes());
}

#[tokio::test(start_paused = true)]
async fn the_bandwidth_cap_is_shared_and_unsent_bytes_do_not_count() {
    let pool = MemoryPool::default();
    let rate = NonZeroU64::new(100 * CHUNK.bytes()).unwrap();
    let limits = PersistLimits {
        bandwidth: Some(Arc::new(Bandwidth::new(rate))),
        ..PersistLimits::default()
    };
    let begin = tokio::time::Instant::now();
    let (one, two) = (random_disk(9, 200), random_disk(10, 200));
    let job = |disk| PersistJob { limits: limits.clone(), ..whole(disk) };
    let (a, b) =
        futures::join!(persist(&pool, &pool, job(&one)), persist(&pool, &pool, job(&two)),);
    a.unwrap();
    b.unwrap();
    let took = begin.elapsed().as_secs_f64();
    assert!((3.5..=4.5).contains(&took), "400 chunks at 100 a second took {took} s");
    let begin = tokio::time::Instant::now();
    persist(&pool, &pool, job(&one)).await.unwrap();
    assert!(begin.elapsed().as_secs_f64() < 0.5, "nothing was sent");
}

struct Failing;

#[async_trait::async_trait]
impl ChunkSource for Failing {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError> {
        match index {
            0 => Ok(None),
            1 => Ok(Identified::of(bytes::Bytes::from_static(b"short"))),
            _ => Err(SourceError::new(index, "the disk is broken")),
        }
    }
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let pool = MemoryPool::default();
    let geometry = geometry(10 * CHUNK.bytes());
    for (chunks, expected) in [
        (vec![1, 0], "sorted"),
        (vec![2, 2], "sorted"),
        (vec![10], "below 10"),
        (vec![1], "chunk 1 has 5 bytes"),
        (vec![0, 2], "the disk is broken"),
    ] {
        let job = PersistJob {
            base: Root::empty(geometry),
            geometry,
            chunks,
            generation: 1,
            source: &Failing,
            progress: &quiet,
            limits: PersistLimits::default(),
        };
        let error = persist(&pool, &pool, job).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(pool.count(RecordKind::Chunk) + pool.count(RecordKind::TreeNode), 0);
}

/// A change of the model disk: chunk, and the byte that fills it.
fn edits() -> impl Strategy<Value = Vec<(usize, u8)>> {
    proptest::collection::vec((0usize..40, 0u8..4), 0..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_snapshot_of_a_history_reads_as_the_model(
        history in proptest::collection::vec((1usize..41, edits()), 1..5),
        failures in proptest::collection::vec(0usize..3, 3),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let pool = MemoryPool::default();
            let mut model: Vec<u8> = Vec::new();
            let mut root = None;
            let mut snapshots = Vec::new();
            for (chunks, edits) in history {
                let size = chunks * CHUNK_LEN - 777;
                model.resize(size, 0);
                let mut dirty: Vec<u64> = Vec::new();
                for (chunk, byte) in edits {
                    let start = chunk * CHUNK_LEN;
                    if start < size {
                        model[start..size.min(start + CHUNK_LEN)].fill(byte);
                        dirty.push(chunk as u64);
                    }
                }
                // The chunk with the end in it changes when the disk is cut.
                dirty.push(chunks as u64 - 1);
                dirty.sort_unstable();
                dirty.dedup();
                let disk = MemoryDisk::new(model.clone(), CHUNK);
                let operations = [PoolOperation::Put, PoolOperation::Touch, PoolOperation::Get];
                for (operation, count) in operations.into_iter().zip(&failures) {
                    pool.faults().fail_next(operation, *count, unavailable());
                }
                let geometry = geometry(size as u64);
                let job = PersistJob {
                    base: root.unwrap_or_else(|| Root::empty(geometry)),
                    chunks: dirty,
                    ..whole(&disk)
                };
                let done = persist(&pool, &pool, job).await.unwrap();
                let fresh = MemoryPool::default();
                let again = persist(&fresh, &fresh, whole(&disk)).await.unwrap();
                assert_eq!(done.root, again.root, "history does not matter");
                root = Some(done.root);
                snapshots.push((done.root, model.clone()));
            }
            // Failures that the last job did not meet.
            pool.faults().clear();
            for (root, bytes) in snapshots {
                assert_eq!(read_back(&pool, root).await, bytes);
            }
        });
    }
}
