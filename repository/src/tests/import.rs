use std::sync::Mutex;
use std::time::Duration;

use blobcr_proto::v1::RecordKind;
use rand::{RngCore, SeedableRng, rngs::StdRng};

use super::*;
use crate::testing::{MemoryCatalog, MemoryDisk, MemoryPool, PoolOperation, memory_repository};
use crate::{Identified, LEASE_TTL, StoreError};

const CHUNK: ChunkSize = ChunkSize::MIN;

fn quiet(_: Progress) {}

fn image(name: &str) -> NewImage {
    NewImage { name: name.into(), chunk_size: CHUNK, ..NewImage::default() }
}

/// Data at chunks 10..20 and 50..55 of 60 and a bit.
fn disk() -> MemoryDisk {
    let mut bytes = vec![0; 60 * CHUNK.len() + 512];
    let mut random = StdRng::seed_from_u64(1);
    random.fill_bytes(&mut bytes[10 * CHUNK.len()..20 * CHUNK.len()]);
    random.fill_bytes(&mut bytes[50 * CHUNK.len()..55 * CHUNK.len()]);
    MemoryDisk::new(bytes, CHUNK)
}

struct World {
    repository: Repository,
    catalog: MemoryCatalog,
    pool: MemoryPool,
    lease: LeaseKeeper,
}

fn world() -> World {
    let (repository, catalog, pool) = memory_repository();
    let lease = LeaseKeeper::start(std::sync::Arc::new(catalog.clone()), "import", LEASE_TTL);
    World { repository, catalog, pool, lease }
}

impl World {
    async fn import(
        &self,
        disk: &MemoryDisk,
        name: &str,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(v1::Image, v1::Snapshot), ImportError> {
        let limits =
            PersistLimits { give_up_after: Duration::from_secs(5), ..PersistLimits::default() };
        import(&self.repository, &self.lease, disk, image(name), limits, progress).await
    }

    async fn images(&self) -> usize {
        self.catalog.list_images(v1::ListImagesRequest::default()).await.unwrap().images.len()
    }
}

use crate::Catalog;

#[tokio::test]
async fn an_imported_disk_reads_back_and_only_its_data_was_read() {
    let world = world();
    let disk = disk();
    let last = Mutex::new(None);
    let note = |step| *last.lock().unwrap() = Some(step);
    let (image, snapshot) = world.import(&disk, "debian", &note).await.unwrap();
    assert_eq!((image.latest, snapshot.number), (1, 1));
    assert_eq!(snapshot.state(), v1::SnapshotState::Stable);
    assert_eq!(snapshot.stats.unwrap().stored_chunks, 15);
    let mut reads = disk.reads();
    reads.sort_unstable();
    assert_eq!(reads, (10..20).chain(50..55).collect::<Vec<_>>());
    let last = last.into_inner().unwrap().unwrap();
    assert_eq!((last.chunks_done, last.chunks_total), (15, 15));
    let by_name = v1::ImageRef { name: "debian".into(), id: 0 };
    let newest = v1::SnapshotRef { image: Some(by_name), number: 0 };
    let (found, _, reader) = world.repository.open(newest).await.unwrap();
    assert_eq!(found.id, image.id);
    let mut bytes = vec![1; disk.bytes().len()];
    reader.read(0, &mut bytes).await.unwrap();
    assert!(bytes == disk.bytes());
}

#[tokio::test]
async fn a_name_that_is_taken_is_refused_before_anything_is_read() {
    let world = world();
    world.import(&disk(), "debian", &quiet).await.unwrap();
    let second = disk();
    let error = world.import(&second, "debian", &quiet).await.unwrap_err();
    assert!(matches!(error, ImportError::Catalog(CatalogError::AlreadyExists(_))), "{error}");
    assert!(second.reads().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_import_that_fails_leaves_no_image() {
    let world = world();
    world.pool.faults().down(StoreError::Unavailable("away".into()));
    let error = world.import(&disk(), "debian", &quiet).await.unwrap_err();
    assert!(matches!(error, ImportError::Persist(_)), "{error}");
    assert_eq!(world.images().await, 0);
    world.pool.faults().up();
    world.import(&disk(), "debian", &quiet).await.unwrap();
    assert_eq!(world.images().await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ran_out_meanwhile_begins_another_round() {
    let world = world();
    let first = world.lease.current().await.unwrap();
    let held = world.pool.faults().hold_next(PoolOperation::Put, 1);
    let disk = disk();
    let importing = async {
        let done = world.import(&disk, "debian", &quiet).await;
        done.unwrap()
    };
    let meanwhile = async {
        held.arrived(1).await;
        world.catalog.expire_lease(first.id);
        // Until the keeper has noticed.
        while world.lease.current().await.unwrap().id == first.id {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        held.release();
    };
    let ((_, snapshot), ()) = futures::join!(importing, meanwhile);
    assert_eq!(snapshot.state(), v1::SnapshotState::Stable);
    let second = world.lease.current().await.unwrap();
    for id in world.pool.ids(RecordKind::Chunk) {
        let generation = world.pool.generation(RecordKind::Chunk, &id);
        assert_eq!(generation, Some(second.generation), "touched again");
    }
}

#[tokio::test]
async fn a_disk_too_large_or_a_pool_that_is_not_there_is_refused() {
    struct Huge;
    #[async_trait]
    impl ChunkSource for Huge {
        async fn chunk(&self, _: u64) -> Result<Option<Identified>, SourceError> {
            Ok(None)
        }
    }
    #[async_trait]
    impl SparseSource for Huge {
        fn size_bytes(&self) -> u64 {
            u64::MAX
        }
        async fn next_data(&self, _: u64) -> Result<Option<Range<u64>>, SourceError> {
            Ok(None)
        }
    }
    let world = world();
    let limits = PersistLimits::default();
    let (repository, lease) = (&world.repository, &world.lease);
    let error = import(repository, lease, &Huge, image("huge"), limits.clone(), &quiet).await;
    assert!(matches!(error, Err(ImportError::Geometry(_))));
    let elsewhere = NewImage { pool: "fast".into(), ..image("debian") };
    let error = import(repository, lease, &disk(), elsewhere, limits, &quiet).await;
    assert!(matches!(error, Err(ImportError::Catalog(CatalogError::NotFound(_)))));
    assert_eq!(world.images().await, 0);
}
