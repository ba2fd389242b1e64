use std::time::Duration;

use blobcr_proto::v1::{self, RecordKind};
use blobcr_repository::testing::{MemoryPool, PoolOperation, memory_repository};
use blobcr_repository::tree::{FanOut, Geometry, update};
use blobcr_repository::{Object, ObjectStore, StoreError};

use super::*;
use crate::cache::CacheLimits;
use crate::disk::{BaseOpener, Source};

const POOL: u32 = 1;
const SIZE: ChunkSize = ChunkSize::MIN;

struct World {
    dir: tempfile::TempDir,
    repository: Repository,
    catalog: blobcr_repository::testing::MemoryCatalog,
    pool: MemoryPool,
}

fn down() -> StoreError {
    StoreError::Unavailable("no node answers".to_owned())
}

fn content(chunk: u64) -> Vec<u8> {
    (0..SIZE.bytes() / 8).flat_map(|word| (chunk << 32 | word).to_le_bytes()).collect()
}

/// What the image holds at a chunk: every third one is a hole.
fn expected(chunk: u64) -> Vec<u8> {
    if chunk % 3 == 2 { vec![0; SIZE.len()] } else { content(chunk) }
}

impl World {
    fn new() -> Self {
        let (repository, catalog, pool) = memory_repository();
        Self { dir: tempfile::tempdir().unwrap(), repository, catalog, pool }
    }

    /// A mirror's share of the repository, with whatever an earlier one left in its directory.
    fn snapshots_with(&self, cache_bytes: u64, limits: FetchLimits) -> Arc<Snapshots> {
        let cache_limits = CacheLimits { capacity_bytes: cache_bytes, keep_free_bytes: 0 };
        let cache = ChunkCache::open(&self.dir.path().join("cache"), cache_limits).unwrap();
        let nodes = self.dir.path().join("nodes");
        Snapshots::open(&nodes, self.repository.clone(), Arc::new(cache), limits).unwrap()
    }

    fn snapshots(&self) -> Arc<Snapshots> {
        self.snapshots_with(64 << 20, FetchLimits::default())
    }

    async fn image(&self, size_bytes: u64) -> Root {
        let geometry = Geometry::new(size_bytes, SIZE, FanOut::DEFAULT).unwrap();
        let mut changes = Vec::new();
        for chunk in 0..geometry.chunks() {
            if chunk % 3 != 2 {
                let plain = Bytes::from(content(chunk));
                let id = Hash::of(&plain);
                changes.push((chunk, Some(id)));
                let object = Object { kind: RecordKind::Chunk, id, plain };
                self.pool.put(1, vec![object]).await.unwrap();
            }
        }
        let updated = update(&self.pool, &Root::empty(geometry), geometry, &changes).await.unwrap();
        let nodes = updated.new_nodes.into_iter();
        let nodes = nodes.map(|node| Object {
            kind: RecordKind::TreeNode,
            id: node.id,
            plain: node.encoding,
        });
        self.pool.put(1, nodes.collect()).await.unwrap();
        self.pool.faults().reset_calls();
        updated.root
    }
}

fn local(base: &SnapshotBase, chunk: u64) -> Option<Vec<u8>> {
    let mut out = vec![0xEE; SIZE.len()];
    base.read_local(chunk, 0, &mut out).unwrap().then_some(out)
}

async fn whole(base: &SnapshotBase, chunk: u64) -> Vec<u8> {
    let bytes = base.fetch(chunk).await.unwrap();
    bytes.map_or_else(|| vec![0; SIZE.len()], |bytes| bytes.to_vec())
}

/// Waits until what is fetched has reached the cache.
async fn landed(snapshots: &Snapshots) {
    while snapshots.fetcher.under_way() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_was_fetched_is_local_from_then_on() {
    let world = World::new();
    let root = world.image(2000 * SIZE.bytes()).await;
    let snapshots = world.snapshots();
    let base = snapshots.base(POOL, root);
    for chunk in [0, 1, 2, 511, 512, 1999] {
        assert_eq!(base.may_have_data(chunk).is_some(), [1, 2, 511].contains(&chunk), "{chunk}");
        assert_eq!(whole(&base, chunk).await, expected(chunk));
        landed(&snapshots).await;
        assert_eq!(base.may_have_data(chunk), Some(chunk % 3 != 2));
        assert_eq!(local(&base, chunk).unwrap(), expected(chunk));
        let mut part = [0xEE; 100];
        assert!(base.read_local(chunk, 4090, &mut part).unwrap());
        assert_eq!(part, expected(chunk)[4090..4190]);
    }
    let fetched = world.pool.faults().calls(PoolOperation::Get);
    assert_eq!(whole(&base, 0).await, expected(0));
    assert_eq!(world.pool.faults().calls(PoolOperation::Get), fetched);
}

#[tokio::test]
async fn behind_the_end_and_in_an_empty_image_there_are_zeros() {
    let world = World::new();
    let root = world.image(10 * SIZE.bytes() + 5).await;
    let snapshots = world.snapshots();
    let base = snapshots.base(POOL, root);
    assert_eq!(base.size_bytes(), 10 * SIZE.bytes() + 5);
    assert_eq!(local(&base, 11).unwrap(), vec![0; SIZE.len()]);
    assert_eq!(base.fetch(1 << 40).await.unwrap(), None);
    let empty = snapshots.base(POOL, Root::empty(root.geometry));
    assert_eq!(local(&empty, 0).unwrap(), vec![0; SIZE.len()]);
    assert_eq!(empty.may_have_data(0), Some(false));
    assert_eq!(empty.fetch(0).await.unwrap(), None);
    assert_eq!(world.pool.faults().calls(PoolOperation::Get), 0);
}

#[tokio::test]
async fn a_chunk_is_fetched_once_whoever_asks() {
    let world = World::new();
    let root = world.image(100 * SIZE.bytes()).await;
    let snapshots = world.snapshots();
    let (one, same) = (snapshots.base(POOL, root), snapshots.base(POOL, root));
    assert!(Arc::ptr_eq(&one, &same), "one snapshot is open once");
    // Another snapshot that shares the chunk.
    let mut grown = root.geometry;
    grown.size_bytes += SIZE.bytes();
    let updated = update(&world.pool, &root, grown, &[]).await.unwrap();
    let nodes = updated.new_nodes.into_iter();
    let nodes =
        nodes.map(|node| Object { kind: RecordKind::TreeNode, id: node.id, plain: node.encoding });
    world.pool.put(1, nodes.collect()).await.unwrap();
    let other = snapshots.base(POOL, updated.root);
    one.fetch(1).await.unwrap();
    other.fetch(1).await.unwrap();
    landed(&snapshots).await;

    world.pool.faults().reset_calls();
    let held = world.pool.faults().hold_next(PoolOperation::Get, 1);
    let reads: Vec<_> = (0..50)
        .map(|n| {
            let base = Arc::clone(if n % 2 == 0 { &one } else { &other });
            tokio::spawn(async move { whole(&base, 0).await })
        })
        .collect();
    held.arrived(1).await;
    held.release();
    for read in reads {
        assert_eq!(read.await.unwrap(), expected(0));
    }
    assert_eq!(world.pool.faults().calls(PoolOperation::Get), 1);
}

#[tokio::test]
async fn one_who_gives_up_does_not_stop_the_fetch_of_the_others() {
    let world = World::new();
    let root = world.image(10 * SIZE.bytes()).await;
    let snapshots = world.snapshots();
    let base = snapshots.base(POOL, root);
    base.fetch(2).await.unwrap();
    let held = world.pool.faults().hold_next(PoolOperation::Get, 1);
    let first = tokio::spawn({
        let base = Arc::clone(&base);
        async move { base.fetch(0).await }
    });
    held.arrived(1).await;
    let second = tokio::spawn({
        let base = Arc::clone(&base);
        async move { whole(&base, 0).await }
    });
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    held.release();
    assert_eq!(second.await.unwrap(), expected(0));
}

#[tokio::test(start_paused = true)]
async fn reads_wait_while_the_repository_is_away_and_say_so() {
    let world = World::new();
    let root = world.image(10 * SIZE.bytes()).await;
    let snapshots = world.snapshots();
    let base = snapshots.base(POOL, root);
    world.pool.faults().down(down());
    let read = tokio::spawn({
        let base = Arc::clone(&base);
        async move { whole(&base, 1).await }
    });
    while base.stall.reason().is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let why = base.stall.reason().unwrap();
    assert!(why.contains("1 reads wait") && why.contains("no node answers"), "{why}");
    // Zeros and what is known need nobody.
    assert_eq!(base.fetch(10_000).await.unwrap(), None);
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert!(!read.is_finished());
    world.pool.faults().up();
    assert_eq!(read.await.unwrap(), expected(1));
    assert_eq!(base.stall.reason(), None);
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_at_the_limit_and_when_the_mirror_stops() {
    let world = World::new();
    let root = world.image(10 * SIZE.bytes()).await;
    let limits = FetchLimits { wait: Duration::from_secs(60), ..FetchLimits::default() };
    let snapshots = world.snapshots_with(64 << 20, limits);
    let base = snapshots.base(POOL, root);
    world.pool.faults().down(down());
    let began = tokio::time::Instant::now();
    let error = base.fetch(0).await.unwrap_err();
    assert!(matches!(&error, BaseError::Unavailable { chunk: 0, .. }), "{error}");
    assert!(error.to_string().contains("given up after 60 s"), "{error}");
    let waited = began.elapsed();
    assert!((50..=60).contains(&waited.as_secs()), "{waited:?}");

    let read = tokio::spawn({
        let base = Arc::clone(&base);
        async move { base.fetch(0).await }
    });
    tokio::time::sleep(Duration::from_secs(5)).await;
    snapshots.stop();
    let began = tokio::time::Instant::now();
    let error = read.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("stopping"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn lost_and_damaged_chunks_are_errors_at_once_and_come_back_when_mended() {
    let world = World::new();
    let root = world.image(10 * SIZE.bytes()).await;
    let snapshots = world.snapshots();
    let base = snapshots.base(POOL, root);
    let ids = [0, 1].map(|chunk| Hash::of(&content(chunk)));
    assert!(world.pool.lose(RecordKind::Chunk, &ids[0]));
    assert!(world.pool.damage(RecordKind::Chunk, &ids[1]));
    for chunk in [0, 1] {
        let error = base.fetch(chunk).await.unwrap_err();
        assert!(matches!(error, BaseError::Lost { .. }), "{error}");
        let plain = Bytes::from(content(chunk));
        let id = ids[chunk as usize];
        world.pool.put(2, vec![Object { kind: RecordKind::Chunk, id, plain }]).await.unwrap();
        landed(&snapshots).await;
        assert_eq!(whole(&base, chunk).await, expected(chunk));
    }
}

#[tokio::test]
async fn a_chunk_of_another_length_is_refused() {
    let world = World::new();
    let geometry = Geometry::new(SIZE.bytes(), SIZE, FanOut::DEFAULT).unwrap();
    let plain = Bytes::from_static(b"short");
    let id = Hash::of(&plain);
    world.pool.put(1, vec![Object { kind: RecordKind::Chunk, id, plain }]).await.unwrap();
    let updated =
        update(&world.pool, &Root::empty(geometry), geometry, &[(0, Some(id))]).await.unwrap();
    let nodes = updated.new_nodes.into_iter();
    let nodes =
        nodes.map(|node| Object { kind: RecordKind::TreeNode, id: node.id, plain: node.encoding });
    world.pool.put(1, nodes.collect()).await.unwrap();
    let error = world.snapshots().base(POOL, updated.root).fetch(0).await.unwrap_err();
    assert!(error.to_string().contains("5 bytes instead of 65536"), "{error}");
}

#[tokio::test]
async fn after_a_restart_what_was_read_needs_no_repository() {
    let world = World::new();
    let root = world.image(2000 * SIZE.bytes()).await;
    let snapshots = world.snapshots();
    let base = snapshots.base(POOL, root);
    for chunk in [0, 1, 1000] {
        base.fetch(chunk).await.unwrap();
    }
    landed(&snapshots).await;
    drop((base, snapshots));
    world.pool.faults().down(down());
    world.catalog.faults().down(blobcr_repository::CatalogError::Unavailable("down".to_owned()));

    let base = world.snapshots().base(POOL, root);
    for chunk in [0, 1, 2, 1000] {
        let read = tokio::time::timeout(Duration::from_secs(20), whole(&base, chunk)).await;
        assert_eq!(read.expect("no network is needed"), expected(chunk));
        assert_eq!(local(&base, chunk).unwrap(), expected(chunk));
    }
}

#[tokio::test]
async fn without_a_cache_everything_still_reads() {
    let world = World::new();
    let root = world.image(20 * SIZE.bytes()).await;
    let snapshots = world.snapshots_with(0, FetchLimits::default());
    let base = snapshots.base(POOL, root);
    for chunk in 0..20 {
        assert_eq!(whole(&base, chunk).await, expected(chunk));
        assert_eq!(local(&base, chunk).is_some(), chunk % 3 == 2);
    }
}

#[tokio::test]
async fn little_memory_slows_fetching_but_stops_nothing() {
    let world = World::new();
    let root = world.image(300 * SIZE.bytes()).await;
    let limits = FetchLimits { memory_bytes: 1, ..FetchLimits::default() };
    let snapshots = world.snapshots_with(64 << 20, limits);
    let base = snapshots.base(POOL, root);
    let reads: Vec<_> = (0..300)
        .map(|chunk| {
            let base = Arc::clone(&base);
            tokio::spawn(async move { (chunk, whole(&base, chunk).await) })
        })
        .collect();
    for read in reads {
        let (chunk, bytes) = read.await.unwrap();
        assert!(bytes == expected(chunk), "chunk {chunk}");
    }
}

#[tokio::test]
async fn seeking_finds_the_borders_of_holes() {
    let world = World::new();
    let size = 1000 * SIZE.bytes() + 7;
    let root = world.image(size).await;
    let base = world.snapshots().base(POOL, root);
    let chunk = SIZE.bytes();
    for (offset, data, found) in [
        (0, true, 0),
        (0, false, 2 * chunk),
        (5, false, 2 * chunk),
        (2 * chunk, true, 3 * chunk),
        (2 * chunk + 9, false, 2 * chunk + 9),
        (1000 * chunk + 3, true, 1000 * chunk + 3),
        (1000 * chunk + 3, false, size),
        (999 * chunk, false, size),
    ] {
        assert_eq!(base.seek(offset, data).await.unwrap(), found, "{offset} {data}");
    }
    let (empty, geometry) = (world.snapshots(), root.geometry);
    let empty = empty.base(POOL, Root::empty(geometry));
    assert_eq!(empty.seek(0, true).await.unwrap(), size);
    assert_eq!(empty.seek(100, false).await.unwrap(), 100);
}

#[test]
fn a_source_that_makes_no_sense_is_refused() {
    let world = World::new();
    let root = v1::TreeRoot { size_bytes: 1, chunk_size: 7, fan_out: 64, node: Bytes::new() };
    let source = Source { image: "vm".into(), image_id: 1, number: 3, pool: POOL, root };
    let Err(error) = DiskBases::new(world.snapshots(), None).open(&source) else {
        panic!("a chunk size of 7 bytes was accepted");
    };
    assert!(error.to_string().contains("vm@3"), "{error}");
}
