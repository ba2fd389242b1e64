//! Two hosts over one repository in memory: what one reads is fetched ahead on the other.

use std::time::Duration;

use blobcr_proto::{ChunkSize, v1};
use blobcr_repository::import::{NewImage, import};
use blobcr_repository::testing::{
    MemoryCatalog, MemoryDisk, MemoryPool, PoolOperation, memory_repository,
};
use blobcr_repository::{CatalogError, LEASE_TTL, LeaseKeeper, PersistLimits, StoreError};

use super::*;
use crate::base::{DiskBases, FetchLimits, Snapshots};
use crate::cache::{CacheLimits, ChunkCache};
use crate::disk::{BaseOpener, Source};

const SIZE: ChunkSize = ChunkSize::MIN;
const CHUNKS: u64 = 100;
const PLENTY: u64 = 64 << 20;

struct World {
    dir: tempfile::TempDir,
    repository: Repository,
    catalog: MemoryCatalog,
    pool: MemoryPool,
    source: Source,
}

/// What the image holds at a chunk: every third one is a hole.
fn expected(chunk: u64) -> Vec<u8> {
    let word = if chunk % 3 == 2 { 0 } else { chunk + 1 };
    word.to_le_bytes().repeat(SIZE.len() / 8)
}

impl World {
    async fn new() -> Self {
        let (repository, catalog, pool) = memory_repository();
        let disk = MemoryDisk::new((0..CHUNKS).flat_map(expected).collect(), SIZE);
        let lease = LeaseKeeper::start(Arc::clone(repository.catalog()), "test", LEASE_TTL);
        let image = NewImage { name: "vm".into(), chunk_size: SIZE, ..NewImage::default() };
        let limits = PersistLimits::default();
        let imported = import(&repository, &lease, &disk, image, limits, &|_| {}).await;
        let (image, snapshot) = imported.unwrap();
        let source = Source {
            image: image.name,
            image_id: image.id,
            number: snapshot.number,
            pool: image.pool,
            root: snapshot.root.unwrap(),
        };
        Self { dir: tempfile::tempdir().unwrap(), repository, catalog, pool, source }
    }

    fn host(&self, name: &str, cache_bytes: u64) -> Mirror<'_> {
        let dir = self.dir.path().join(name);
        let limits = CacheLimits { capacity_bytes: cache_bytes, keep_free_bytes: 0 };
        let cache = Arc::new(ChunkCache::open(&dir, limits).unwrap());
        let repository = self.repository.clone();
        let snapshots = Snapshots::open(&dir, repository, cache, FetchLimits::default()).unwrap();
        let prefetcher = Prefetcher::new(self.repository.clone(), None);
        Mirror { world: self, bases: DiskBases::new(snapshots, Some(prefetcher)) }
    }

    fn snapshot(&self) -> Snapshot {
        (self.source.image_id, self.source.number)
    }

    async fn put(&self, chunks: &[u64]) {
        let (image_id, number) = self.snapshot();
        let trace = Some(v1::ReadTrace::of(chunks.iter().copied()));
        let request = v1::PutReadTraceRequest { image_id, number, trace };
        self.repository.catalog().put_read_trace(request).await.unwrap();
    }

    async fn trace(&self) -> Vec<u64> {
        let (id, number) = self.snapshot();
        let image = Some(v1::ImageRef { id, name: String::new() });
        let found = self.repository.catalog().get_read_trace(v1::SnapshotRef { image, number });
        found.await.map_or(Vec::new(), |found| found.trace.unwrap().chunks().collect())
    }
}

struct Mirror<'a> {
    world: &'a World,
    bases: Arc<DiskBases>,
}

impl Mirror<'_> {
    fn attach(&self) -> Arc<dyn Base> {
        self.bases.open(&self.world.source).unwrap()
    }

    fn status(&self) -> v1::Disk {
        let mut disk = v1::Disk::default();
        self.bases.describe(&mut disk);
        disk
    }
}

/// As a disk reads: from this host, or else fetched.
async fn read(base: &dyn Base, chunk: u64) {
    let mut out = vec![0xEE; SIZE.len()];
    if !base.read_local(chunk, 0, &mut out).unwrap() {
        match base.fetch(chunk).await.unwrap() {
            Some(bytes) => out.copy_from_slice(&bytes),
            None => out.fill(0),
        }
    }
    assert!(out == expected(chunk), "chunk {chunk}");
}

/// Waits for what another task does.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..12_000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not come about");
}

/// Waits until nobody has to wait for a chunk.
async fn is_here(base: &dyn Base, chunk: u64) {
    let here = async || base.read_local(chunk, 0, &mut [0; 8]).unwrap();
    eventually("it is here", here).await;
}

#[tokio::test]
async fn what_one_host_read_is_fetched_once_on_the_next_before_it_is_read() {
    // No hole among them.
    let order = [40, 42, 3, 0, 99, 43, 7];
    let world = World::new().await;
    let first = world.host("first", PLENTY);
    let base = first.attach();
    for chunk in order {
        read(&*base, chunk).await;
    }
    for chunk in [2, 3, 43] {
        is_here(&*base, chunk).await;
        read(&*base, chunk).await;
    }
    let (waited, bytes) = (first.status(), order.len() as u64 * SIZE.bytes());
    assert_eq!((waited.waited_bytes, waited.prefetched_bytes), (bytes, 0));
    assert_eq!(world.trace().await, []);
    // The last disk is gone.
    drop(base);
    eventually("the trace is kept", async || world.trace().await == order).await;

    world.pool.faults().reset_calls();
    let second = world.host("second", PLENTY);
    let base = second.attach();
    assert_eq!(world.pool.faults().calls(PoolOperation::Get), 0, "nobody reads it yet");
    read(&*base, 40).await;
    let ahead = bytes - SIZE.bytes();
    eventually("all is here", async || second.status().prefetched_bytes == ahead).await;
    let gets = world.pool.faults().calls(PoolOperation::Get);
    for chunk in order {
        read(&*base, chunk).await;
    }
    assert_eq!(world.pool.faults().calls(PoolOperation::Get), gets, "all of it was here");
    // The chunks, each once; the node of the tree is in the repository's cache, which both hosts have.
    assert_eq!(gets, order.len() as u64);
    let status = second.status();
    assert_eq!((status.waited_bytes, status.prefetched_used_bytes), (SIZE.bytes(), ahead));
}

#[tokio::test(start_paused = true)]
async fn a_trace_survives_its_host_and_a_shorter_one_changes_nothing() {
    let world = World::new().await;
    let first = world.host("first", PLENTY);
    let base = first.attach();
    read(&*base, 9).await;
    read(&*base, 4).await;
    eventually("the trace is kept", async || world.trace().await == [9, 4]).await;
    read(&*base, 5).await;
    read(&*base, 0).await;
    eventually("what came since is kept", async || world.trace().await == [9, 4, 0]).await;
    let second = world.host("second", PLENTY);
    let other = second.attach();
    read(&*other, 4).await;
    drop(other);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.trace().await, [9, 4, 0]);
}

#[tokio::test]
async fn two_disks_of_a_host_share_what_is_fetched_ahead() {
    let world = World::new().await;
    world.put(&(0..CHUNKS).collect::<Vec<_>>()).await;
    let host = world.host("host", PLENTY);
    let (one, two) = (host.attach(), host.attach());
    world.pool.faults().reset_calls();
    for chunk in 0..CHUNKS {
        tokio::join!(read(&*one, chunk), read(&*two, CHUNKS - 1 - chunk));
    }
    let data = (0..CHUNKS).filter(|chunk| chunk % 3 != 2).count() as u64;
    assert_eq!(world.pool.faults().calls(PoolOperation::Get), data + 1);
}

#[tokio::test]
async fn a_trace_that_makes_no_sense_or_cannot_be_had_changes_no_byte() {
    let world = World::new().await;
    // Holes, and chunks beyond the end.
    world.put(&[2, 5, 1_000_000, 1, 100, 8]).await;
    let host = world.host("host", PLENTY);
    let base = host.attach();
    read(&*base, 0).await;
    eventually("chunk 1 is here", async || host.status().prefetched_bytes == SIZE.bytes()).await;
    for chunk in 0..CHUNKS {
        read(&*base, chunk).await;
    }
    world.catalog.faults().down(CatalogError::Unavailable("away".into()));
    let host = world.host("another", PLENTY);
    let base = host.attach();
    for chunk in 0..CHUNKS {
        read(&*base, chunk).await;
    }
    drop(base);
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_nodes_that_are_away_and_goes_on() {
    let world = World::new().await;
    world.put(&(0..50).collect::<Vec<_>>()).await;
    let host = world.host("host", PLENTY);
    let base = host.attach();
    read(&*base, 0).await;
    world.pool.faults().down(StoreError::Unavailable("no node answers".into()));
    tokio::time::sleep(Duration::from_secs(120)).await;
    let before = host.status();
    assert_eq!(before.stalled, "", "nobody waits");
    world.pool.faults().up();
    let all = (1..50).filter(|chunk| chunk % 3 != 2).count() as u64 * SIZE.bytes();
    eventually("the rest is here", async || host.status().prefetched_bytes == all).await;
    assert_eq!(host.status().prefetched_used_bytes, 0);
}

#[tokio::test]
async fn it_ends_with_the_last_disk() {
    let world = World::new().await;
    world.put(&(0..CHUNKS).collect::<Vec<_>>()).await;
    let host = world.host("host", PLENTY);
    let base = host.attach();
    let asked = world.catalog.faults().hold_next("get_read_trace", 1);
    read(&*base, 0).await;
    let gets = world.pool.faults().calls(PoolOperation::Get);
    let held = world.pool.faults().hold_next(PoolOperation::Get, 100);
    asked.release();
    held.arrived(1).await;
    drop(base);
    // The task lets go of the snapshot.
    let root = blobcr_repository::tree::Root::try_from(&world.source.root).unwrap();
    let is_open = async || host.bases.is_open(world.source.pool, root);
    eventually("nobody has it open", async || !is_open().await).await;
    held.release();
    let after = world.pool.faults().calls(PoolOperation::Get);
    assert!(after - gets < CHUNKS / 2, "{gets} and then {after} chunks were asked for");
}

#[tokio::test]
async fn a_full_cache_keeps_what_is_in_use() {
    let world = World::new().await;
    let hot: Vec<u64> = (0..24).filter(|chunk| chunk % 3 != 2).collect();
    let host = world.host("host", hot.len() as u64 * SIZE.bytes());
    let base = host.attach();
    for _ in 0..2 {
        for chunk in &hot {
            read(&*base, *chunk).await;
        }
        for chunk in &hot {
            is_here(&*base, *chunk).await;
        }
    }
    drop(base);
    world.put(&(30..60).collect::<Vec<_>>()).await;
    let base = host.attach();
    // Something that is not here, so that the trace is asked for; one of the hot ones makes room.
    read(&*base, 99).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let kept = hot.iter().filter(|chunk| base.read_local(**chunk, 0, &mut [0; 8]).unwrap());
    let (kept, fetched) = (kept.count(), host.status().prefetched_bytes / SIZE.bytes());
    assert!(kept >= hot.len() - 1 - fetched as usize, "{kept} {fetched}");
    assert!(fetched <= hot.len() as u64 / 4, "a quarter of the cache at most: {fetched}");
}
