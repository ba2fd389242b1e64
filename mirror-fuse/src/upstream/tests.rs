use std::collections::HashMap;
use std::path::Path;

use blobcr_proto::v1::RecordKind;
use blobcr_proto::{ChunkSize, DiskName};
use blobcr_repository::testing::{MemoryCatalog, MemoryDisk, MemoryPool, memory_repository};
use blobcr_repository::{LEASE_TTL, NewImage, SnapshotReader, StoreError, import};
use bytes::Bytes;

use super::*;
use crate::disk::{
    Base, BaseError, BaseOpener, Budgets, Disk, DiskDeps, DiskSpec, Settled, Source,
};

const CHUNK: usize = 64 << 10;
const SIZE: usize = 6 * CHUNK + 1234;

/// A snapshot, read through the repository and kept.
struct ReaderBase {
    reader: SnapshotReader,
    size_bytes: u64,
    here: Mutex<HashMap<u64, Option<Bytes>>>,
}

#[async_trait]
impl Base for ReaderBase {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_local(&self, chunk: u64, within: u64, out: &mut [u8]) -> Result<bool, BaseError> {
        match lock(&self.here).get(&chunk) {
            None => return Ok(false),
            Some(None) => out.fill(0),
            Some(Some(whole)) => out.copy_from_slice(&whole[within as usize..][..out.len()]),
        }
        Ok(true)
    }

    async fn fetch(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        let unavailable = |reason: String| BaseError::Unavailable { chunk, reason };
        let whole = self.reader.chunk(chunk).await.map_err(|e| unavailable(e.to_string()))?;
        lock(&self.here).insert(chunk, whole.clone());
        Ok(whole)
    }

    fn may_have_data(&self, _chunk: u64) -> Option<bool> {
        None
    }
}

struct Bases(MemoryPool);

impl BaseOpener for Bases {
    fn open(&self, source: &Source) -> Result<Arc<dyn Base>, BaseError> {
        let root = Root::try_from(&source.root).map_err(|e| BaseError::Open(e.to_string()))?;
        let pool = Arc::new(self.0.clone());
        Ok(Arc::new(ReaderBase {
            reader: SnapshotReader::new(root, Arc::clone(&pool) as _, pool),
            size_bytes: source.root.size_bytes,
            here: Mutex::default(),
        }))
    }
}

struct Setup {
    dir: tempfile::TempDir,
    repository: Repository,
    catalog: MemoryCatalog,
    pool: MemoryPool,
    upstream: Arc<RepositoryUpstream>,
    base: (v1::Image, v1::Snapshot),
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 7) as u8 ^ (at >> 11) as u8 ^ seed).collect()
}

impl Setup {
    async fn new() -> Self {
        let (repository, catalog, pool) = memory_repository();
        let lease = LeaseKeeper::start(Arc::new(catalog.clone()), "import", LEASE_TTL);
        let disk = MemoryDisk::new(bytes(1, SIZE), ChunkSize::MIN);
        let image =
            NewImage { name: "base".into(), chunk_size: ChunkSize::MIN, ..NewImage::default() };
        let limits = PersistLimits::default();
        let base =
            import(&repository, &lease, &disk, image, limits.clone(), &|_| ()).await.unwrap();
        lease.shutdown().await;
        catalog.faults().reset_calls();
        let upstream = Arc::new(RepositoryUpstream::new(repository.clone(), limits));
        let dir = tempfile::tempdir().unwrap();
        Self { dir, repository, catalog, pool, upstream, base }
    }

    fn deps(&self) -> DiskDeps {
        let upstream = Arc::clone(&self.upstream) as Arc<dyn Upstream>;
        DiskDeps::new(Arc::new(Bases(self.pool.clone())), upstream, Budgets::new(1 << 20, 0))
            .unwrap()
    }

    fn disk(&self, directory: &Path) -> Arc<Disk> {
        let (image, snapshot) = &self.base;
        let source = Source {
            image: image.name.clone(),
            image_id: image.id,
            number: snapshot.number,
            pool: image.pool,
            root: snapshot.root.clone().unwrap(),
        };
        let spec = DiskSpec {
            name: DiskName::new("disk").unwrap(),
            uid: 1 << 100,
            source,
            size_bytes: SIZE as u64,
            writer: "host".into(),
            created_unix_ms: 0,
        };
        Disk::create(directory, spec, self.deps()).unwrap()
    }

    /// The bytes of a snapshot, through the repository.
    async fn read(&self, image_id: u64, number: u64) -> Vec<u8> {
        let snapshot = self.upstream.snapshot(image_id, number).await.unwrap();
        assert_eq!(snapshot.state(), SnapshotState::Stable);
        let root = Root::try_from(snapshot.root.as_ref().unwrap()).unwrap();
        let nodes = self.repository.nodes(1).await.unwrap();
        let reader = SnapshotReader::new(root, nodes, self.repository.pool(1).await.unwrap());
        let mut all = vec![0; root.geometry.size_bytes as usize];
        reader.read(0, &mut all).await.unwrap();
        all
    }

    async fn own_image(&self) -> SnapshotKey {
        let made = self.upstream.clone_image("own", &self.source(), "host").await.unwrap();
        SnapshotKey { image_id: made.image.unwrap().id, number: 2, writer: "host".into() }
    }

    fn source(&self) -> v1::SnapshotRef {
        v1::SnapshotRef { image: Some(image(self.base.0.id)), number: 1 }
    }

    async fn leases_end(&self) {
        for _ in 0..10_000 {
            let calls = |call| self.catalog.faults().calls(call);
            if calls("release_lease") == calls("acquire_lease") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("a lease is kept for ever");
    }
}

fn away() -> StoreError {
    StoreError::Unavailable("away".into())
}

/// Gives `chunks` chunks of one byte each.
struct Bytewise(u8);

#[async_trait]
impl SnapshotChunks for Bytewise {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, String> {
        Ok(Identified::of(vec![self.0 + index as u8; CHUNK].into()))
    }
}

fn work<'a>(setup: &Setup, source: &'a Bytewise, chunks: u64) -> Work<'a> {
    Work {
        pool: 1,
        base: setup.base.1.root.clone().unwrap(),
        size_bytes: SIZE as u64,
        chunks: (0..chunks).collect(),
        source,
        stalled: &|_| (),
    }
}

#[tokio::test]
async fn what_a_disk_commits_is_read_back_from_the_repository() {
    let setup = Setup::new().await;
    let disk = setup.disk(&setup.dir.path().join("disk"));
    let mut expected = bytes(1, SIZE);
    for round in 0..4u8 {
        let (at, len) = (usize::from(round) * 70_000 + 13, 30_000 + usize::from(round));
        expected[at..at + len].copy_from_slice(&bytes(round, len));
        disk.write(at as u64, bytes(round, len).into()).await.unwrap();
        let made = disk.commit().await.unwrap();
        assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
        assert!(setup.read(made.image_id, made.number).await == expected);
    }
    disk.rollback(3).await.unwrap();
    assert!(disk.read(0, SIZE).await.unwrap() == setup.read(2, 3).await);
    let image = setup.catalog_image(2).await;
    assert_eq!((image.latest, image.parent_image, image.writer.as_str()), (5, 1, "host"));
    setup.leases_end().await;
    disk.shutdown().await.unwrap();
}

impl Setup {
    async fn catalog_image(&self, id: u64) -> v1::Image {
        self.repository.catalog().get_image(image(id)).await.unwrap()
    }
}

#[tokio::test]
async fn a_clone_is_made_once_and_a_name_that_is_taken_is_told() {
    let setup = Setup::new().await;
    let first = setup.upstream.clone_image("own", &setup.source(), "host").await.unwrap();
    let again = setup.upstream.clone_image("own", &setup.source(), "host").await.unwrap();
    assert_eq!((&first.image, &first.snapshot), (&again.image, &again.snapshot));
    let other = setup.upstream.clone_image("own", &setup.source(), "another").await;
    assert!(matches!(other, Err(UpstreamError::AlreadyExists(_))));
    let own = setup.upstream.clone_image("base", &setup.source(), "host").await;
    assert!(matches!(own, Err(UpstreamError::AlreadyExists(_))));
}

#[tokio::test(start_paused = true)]
async fn a_repository_that_is_away_for_an_hour_costs_no_snapshot() {
    let setup = Setup::new().await;
    let disk = setup.disk(&setup.dir.path().join("disk"));
    disk.ensure_clone().await.unwrap();
    disk.write(0, bytes(9, SIZE).into()).await.unwrap();
    setup.pool.faults().down(away());
    let first = disk.commit().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1800)).await;
    disk.write(4096, bytes(8, 4096).into()).await.unwrap();
    let expected = disk.read(0, SIZE).await.unwrap();
    let second = disk.commit().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1800)).await;
    let status = disk.status();
    assert_eq!(status.pending, [first.number, second.number]);
    assert!(status.stalled.contains("away"), "{}", status.stalled);
    setup.pool.faults().up();
    for made in [&first, &second] {
        assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    }
    assert!(setup.read(first.image_id, first.number).await == bytes(9, SIZE));
    assert!(setup.read(second.image_id, second.number).await == expected);
    assert_eq!(disk.status().stalled, "");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_lost_is_replaced_and_what_was_stored_is_touched_again() {
    let setup = Setup::new().await;
    let key = setup.own_image().await;
    setup.upstream.begin(&key).await.unwrap();
    let source = Bytewise(40);
    let persisted = setup.upstream.persist(&key, work(&setup, &source, 5)).await.unwrap();
    let job = setup.upstream.job(&key);
    let first = job.lease.current().await.unwrap();
    job.lease.abandon();
    setup.upstream.publish(&key, &persisted).await.unwrap();
    let second = job.lease.current().await.unwrap();
    assert!(second.generation > first.generation);
    for kind in [RecordKind::Chunk, RecordKind::TreeNode] {
        let own = setup.pool.ids(kind).into_iter().filter_map(|id| {
            let generation = setup.pool.generation(kind, &id)?;
            (generation >= first.generation).then_some(generation)
        });
        let own: Vec<_> = own.collect();
        assert!(!own.is_empty() && own.iter().all(|generation| *generation == second.generation));
    }
    let mut expected = bytes(1, SIZE);
    for (index, chunk) in expected.chunks_mut(CHUNK).take(5).enumerate() {
        chunk.fill(40 + index as u8);
    }
    assert!(setup.read(key.image_id, 2).await == expected);
}

#[tokio::test(start_paused = true)]
async fn what_was_collected_meanwhile_fails_the_snapshot() {
    let setup = Setup::new().await;
    let key = setup.own_image().await;
    setup.upstream.begin(&key).await.unwrap();
    let source = Bytewise(40);
    let persisted = setup.upstream.persist(&key, work(&setup, &source, 5)).await.unwrap();
    setup.upstream.job(&key).lease.abandon();
    let chunk = blobcr_proto::Hash::of(&vec![42; CHUNK]);
    assert!(setup.pool.lose(RecordKind::Chunk, &chunk));
    let Err(UpstreamError::Refused(why)) = setup.upstream.publish(&key, &persisted).await else {
        panic!("a snapshot with a chunk missing was published");
    };
    assert!(why.contains("was collected"), "{why}");
    setup.upstream.fail(&key, &why).await.unwrap();
    setup.upstream.fail(&key, &why).await.unwrap();
    let record = setup.upstream.snapshot(key.image_id, 2).await.unwrap();
    assert_eq!((record.state(), record.reason), (SnapshotState::Failed, why));
}

#[tokio::test]
async fn a_number_that_was_never_begun_can_fail_too() {
    let setup = Setup::new().await;
    let key = SnapshotKey { number: 7, ..setup.own_image().await };
    setup.upstream.fail(&key, "lost").await.unwrap();
    let record = setup.upstream.snapshot(key.image_id, 7).await.unwrap();
    assert_eq!(record.state(), SnapshotState::Failed);
    setup.leases_end().await;
    // Nor is the lease kept when the repository refuses to hear of it.
    let unknown = SnapshotKey { image_id: 99, ..key };
    assert!(setup.upstream.fail(&unknown, "lost").await.is_err());
    setup.leases_end().await;
    assert!(lock(&setup.upstream.jobs).is_empty());
}

#[tokio::test]
async fn a_pending_snapshot_is_taken_up_by_the_next_process() {
    let mut setup = Setup::new().await;
    let key = setup.own_image().await;
    setup.upstream.begin(&key).await.unwrap();
    assert_eq!(setup.upstream.pending(key.image_id).await.unwrap(), [2]);
    let source = Bytewise(40);
    setup.upstream.persist(&key, work(&setup, &source, 5)).await.unwrap();
    // The process ends; its lease is not released, for that would fail the snapshot.
    setup.upstream =
        Arc::new(RepositoryUpstream::new(setup.repository.clone(), PersistLimits::default()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(setup.catalog.faults().calls("release_lease"), 0);
    assert_eq!(setup.upstream.pending(key.image_id).await.unwrap(), [2]);
    setup.upstream.begin(&key).await.unwrap();
    let persisted = setup.upstream.persist(&key, work(&setup, &source, 5)).await.unwrap();
    assert_eq!(persisted.stats.stored_chunks, 0, "all of it was there");
    setup.upstream.publish(&key, &persisted).await.unwrap();
    let stable = setup.upstream.snapshot(key.image_id, 0).await.unwrap();
    assert_eq!((stable.number, stable.root), (2, Some(persisted.root)));
}

/// The service fails what is pending under a lease that ran out. Nothing is lost by that.
#[tokio::test(start_paused = true)]
async fn a_disk_whose_lease_ran_out_tells_so_and_goes_on() {
    let setup = Setup::new().await;
    let disk = setup.disk(&setup.dir.path().join("disk"));
    disk.write(0, bytes(9, SIZE).into()).await.unwrap();
    setup.pool.faults().down(away());
    let made = disk.commit().await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let key = SnapshotKey { image_id: made.image_id, number: made.number, writer: "host".into() };
    let lease = setup.upstream.job(&key).lease.current().await.unwrap();
    setup.catalog.expire_lease(lease.id);
    setup.pool.faults().up();
    let Settled::Failed { reason } = disk.wait_stable(made.number).await.unwrap() else {
        panic!("it has failed");
    };
    assert!(reason.contains("ran out"), "{reason}");
    let made = disk.commit().await.unwrap();
    assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    assert!(setup.read(made.image_id, made.number).await == bytes(9, SIZE));
}

/// As the keeper sees it only at its next renewal, the refusal comes first.
#[tokio::test(start_paused = true)]
async fn a_begin_under_a_lease_that_is_gone_is_tried_under_another() {
    let setup = Setup::new().await;
    let key = setup.own_image().await;
    let lease = setup.upstream.job(&key).lease.current().await.unwrap();
    setup.catalog.expire_lease(lease.id);
    assert!(setup.upstream.begin(&key).await.unwrap_err().is_transient());
    setup.upstream.begin(&key).await.unwrap();
}

#[tokio::test]
async fn a_snapshot_that_cannot_even_fail_leaves_no_lease_behind() {
    let (repository, ..) = memory_repository();
    let upstream = RepositoryUpstream::new(repository, PersistLimits::default());
    // Its image was removed by somebody.
    let key = SnapshotKey { image_id: 77, number: 2, writer: "host".into() };
    assert!(matches!(upstream.begin(&key).await, Err(UpstreamError::NotFound(_))));
    assert!(matches!(upstream.fail(&key, "why").await, Err(UpstreamError::NotFound(_))));
    assert!(lock(&upstream.jobs).is_empty(), "its lease would be renewed for ever");
}
