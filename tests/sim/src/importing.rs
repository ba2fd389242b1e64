//! The images that writers clone.

use std::sync::Arc;
use std::time::Duration;

use blobcr_repository::nodes::CachedNodes;
use blobcr_repository::testing::{MemoryDisk, MemoryPool};
use blobcr_repository::tree::{FanOut, Root};
use blobcr_repository::{
    LeaseKeeper, NewImage, PersistJob, PersistLimits, Repository, import as import_image, persist,
};
use tokio::time::sleep;

use crate::content::{CHUNK, Content};
use crate::world::World;

/// As tools have it, that come and go.
const LEASE_TTL: Duration = Duration::from_secs(10);

fn disk(content: &Content) -> MemoryDisk {
    let zeros = || vec![0; CHUNK.len()];
    let chunk = |at| content.chunk(at).map_or_else(zeros, |bytes| bytes.to_vec());
    MemoryDisk::new((0..content.chunks()).flat_map(chunk).collect(), CHUNK)
}

/// The root of a tree over `content`: equal content has an equal root, whoever makes it.
async fn root_of(content: &Content) -> Option<Root> {
    let pool = MemoryPool::default();
    let nodes = CachedNodes::new(Arc::new(pool.clone()));
    let geometry = content.geometry().ok()?;
    let job = PersistJob {
        base: Root::empty(geometry),
        geometry,
        chunks: (0..content.chunks() as u64).collect(),
        generation: 1,
        source: &disk(content),
        progress: &|_| (),
        limits: PersistLimits::default(),
    };
    persist(&pool, &nodes, job).await.ok().map(|persisted| persisted.root)
}

/// Imports an image; tries until it works. Returns its id; `None` when it never can.
pub(crate) async fn import(
    world: &World,
    repository: &Repository,
    name: &str,
    pool: &str,
    content: &Content,
) -> Option<u64> {
    world.oracle.made(&root_of(content).await?.to_wire(), content);
    let lease = LeaseKeeper::start(Arc::clone(repository.catalog()), "an import", LEASE_TTL);
    let disk = disk(content);
    for _ in 0..20 {
        let image = NewImage {
            name: name.into(),
            pool: pool.into(),
            chunk_size: CHUNK,
            fan_out: FanOut::MIN,
            writer: String::new(),
        };
        let limits = PersistLimits::default();
        match import_image(repository, &lease, &disk, image, limits, &|_| ()).await {
            Ok((image, _)) => {
                lease.shutdown().await;
                return Some(image.id);
            }
            Err(error) => world.note(format_args!("import of {name}: {error}")),
        }
        sleep(Duration::from_secs(1)).await;
    }
    None
}
