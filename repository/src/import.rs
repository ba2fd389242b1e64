//! A new image from a file or whatever else holds a disk.

use std::ops::Range;

use async_trait::async_trait;
use blobcr_proto::{ChunkSize, v1};

use crate::persist::{PersistError, PersistJob, PersistLimits, Progress, persist};
use crate::source::{ChunkSource, SourceError};
use crate::tree::{FanOut, Geometry, GeometryError, Root};
use crate::{CatalogError, LeaseKeeper, Repository};

/// Chunks persisted before the tree over them is made: bounds memory (100 bytes a chunk) however
/// large the image is, at the price of a few tree nodes that only the collector will see again.
const SEGMENT_CHUNKS: usize = 1 << 18;

/// How often an import begins again because its lease ran out meanwhile. What is stored already is
/// not sent again, so a second round is quick.
const ROUNDS_MAX: u32 = 5;

/// The pool of images for which none is named.
pub const DEFAULT_POOL: &str = "default";

/// A disk of which only a part may hold data.
#[async_trait]
pub trait SparseSource: ChunkSource {
    /// Bytes of the disk.
    fn size_bytes(&self) -> u64;

    /// The next chunks (indices) from `from` on that may hold data; `None` when only zeros follow.
    async fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, SourceError>;
}

/// The image to make.
#[derive(Debug, Clone, Default)]
pub struct NewImage {
    /// Its name.
    pub name: String,
    /// Name of its pool; empty for [`DEFAULT_POOL`].
    pub pool: String,
    /// Bytes of its chunks.
    pub chunk_size: ChunkSize,
    /// Children of its tree's nodes.
    pub fan_out: FanOut,
    /// Who alone may add snapshots; empty when anybody may.
    pub writer: String,
}

/// Why an image was not made.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The metadata service refused, or cannot be reached.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The bytes could not be made durable.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// The source could not tell where its data is.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The disk is larger than any image may be.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The lease ran out in every round: the metadata service is away too often.
    #[error("the lease ran out {ROUNDS_MAX} times before the image was published; try again")]
    Lease,
}

/// Makes a new image whose first snapshot is `source`. The image appears when all of its bytes are
/// durable: an import that fails or is broken off leaves no image, only orphans for the collector.
///
/// `progress` counts the chunks that may hold data.
///
/// # Errors
/// When the name is taken (told before anything is read), or the source or the repository fails.
pub async fn import(
    repository: &Repository,
    lease: &LeaseKeeper,
    source: &dyn SparseSource,
    image: NewImage,
    limits: PersistLimits,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<(v1::Image, v1::Snapshot), ImportError> {
    let catalog = repository.catalog();
    let by_name = v1::ImageRef { name: image.name.clone(), id: 0 };
    match catalog.get_image(by_name).await {
        Ok(_) => {
            let text = format!("there is an image {} already", image.name);
            return Err(CatalogError::AlreadyExists(text).into());
        }
        Err(CatalogError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let geometry = Geometry::new(source.size_bytes(), image.chunk_size, image.fan_out)?;
    let pool_name =
        if image.pool.is_empty() { DEFAULT_POOL.to_owned() } else { image.pool.clone() };
    let image = NewImage { pool: pool_name.clone(), ..image };
    let pool = catalog.get_pool(v1::PoolRef { name: pool_name, id: 0 }).await?.id;
    let importer = Importer { repository, pool, geometry, source, limits, progress };
    for _ in 0..ROUNDS_MAX {
        let held = lease.current().await?;
        let (root, stats) = importer.persist(held.generation).await?;
        // What was stored under a generation that has ended may be collected already.
        if lease.current().await?.generation == held.generation {
            return Ok(importer.publish(&image, &held, root, stats).await?);
        }
        tracing::info!(image = image.name, "the lease ran out during the import; once more");
    }
    Err(ImportError::Lease)
}

struct Importer<'a> {
    repository: &'a Repository,
    pool: u32,
    geometry: Geometry,
    source: &'a dyn SparseSource,
    limits: PersistLimits,
    progress: &'a (dyn Fn(Progress) + Send + Sync),
}

impl Importer<'_> {
    /// How many chunks may hold data.
    async fn total(&self) -> Result<u64, SourceError> {
        let (mut from, mut total) = (0, 0);
        while let Some(data) = self.source.next_data(from).await? {
            let data = data.start.max(from)..data.end.min(self.geometry.chunks());
            if data.is_empty() {
                break;
            }
            from = data.end;
            total += data.end - data.start;
        }
        Ok(total)
    }

    /// The next chunks that may hold data, at most a segment of them; the chunk to go on from.
    async fn segment(&self, mut from: u64) -> Result<(Vec<u64>, Option<u64>), SourceError> {
        let end = self.geometry.chunks();
        let mut chunks = Vec::new();
        while let Some(data) = self.source.next_data(from).await? {
            let data = data.start.max(from)..data.end.min(end);
            if data.is_empty() {
                return Ok((chunks, None));
            }
            let room = (SEGMENT_CHUNKS - chunks.len()) as u64;
            let taken = data.start..data.end.min(data.start + room);
            from = taken.end;
            chunks.extend(taken);
            if chunks.len() == SEGMENT_CHUNKS {
                return Ok((chunks, Some(from)));
            }
        }
        Ok((chunks, None))
    }

    async fn persist(&self, generation: u64) -> Result<(Root, v1::SnapshotStats), ImportError> {
        let pool = self.repository.pool(self.pool).await?;
        let nodes = self.repository.nodes(self.pool).await?;
        let chunks_total = self.total().await?;
        let mut root = Root::empty(self.geometry);
        let mut sum = v1::SnapshotStats::default();
        let mut next = Some(0);
        while let Some(from) = next {
            let (chunks, behind) = self.segment(from).await?;
            next = behind;
            let before = sum;
            let progress = |step: Progress| {
                (self.progress)(Progress {
                    chunks_total,
                    chunks_done: step.chunks_done + before.dirty_chunks,
                    stored_bytes: step.stored_bytes + before.stored_bytes,
                    stalled: step.stalled,
                });
            };
            let job = PersistJob {
                base: root,
                geometry: self.geometry,
                chunks,
                generation,
                source: self.source,
                progress: &progress,
                limits: self.limits.clone(),
            };
            let persisted = persist(&*pool, &*nodes, job).await?;
            root = persisted.root;
            add(&mut sum, &persisted.stats);
        }
        Ok((root, sum))
    }

    async fn publish(
        &self,
        image: &NewImage,
        lease: &v1::Lease,
        root: Root,
        stats: v1::SnapshotStats,
    ) -> Result<(v1::Image, v1::Snapshot), CatalogError> {
        let catalog = self.repository.catalog();
        let create = v1::CreateImageRequest {
            name: image.name.clone(),
            pool: image.pool.clone(),
            chunk_size: image.chunk_size.len() as u32,
            writer: image.writer.clone(),
        };
        let created = catalog.create_image(create).await?;
        let begin = v1::BeginSnapshotRequest {
            image_id: created.id,
            number: 0,
            lease_id: lease.id,
            writer: image.writer.clone(),
        };
        let number = catalog.begin_snapshot(begin).await?.number;
        let publish = v1::PublishSnapshotRequest {
            image_id: created.id,
            number,
            lease_id: lease.id,
            writer: image.writer.clone(),
            root: Some(root.to_wire()),
            stats: Some(stats),
        };
        let snapshot = catalog.publish_snapshot(publish).await?;
        Ok((v1::Image { latest: number, highest_number: number, ..created }, snapshot))
    }
}

fn add(sum: &mut v1::SnapshotStats, more: &v1::SnapshotStats) {
    sum.dirty_chunks += more.dirty_chunks;
    sum.dirty_bytes += more.dirty_bytes;
    sum.stored_chunks += more.stored_chunks;
    sum.stored_bytes += more.stored_bytes;
    sum.zero_chunks += more.zero_chunks;
    sum.tree_nodes += more.tree_nodes;
    sum.persist_ms += more.persist_ms;
}

#[cfg(test)]
#[path = "tests/import.rs"]
mod tests;
