//! `blobcr image`: named, versioned disks.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context;
use blobcr_proto::{ChunkSize, ImageName, ImageSpec, v1};
use blobcr_repository::tree::{FanOut, Geometry, Root};
use blobcr_repository::{
    CatalogError, LEASE_TTL, LeaseKeeper, PersistJob, PersistLimits, Persisted, Repository, persist,
};
use futures::{StreamExt, TryStreamExt, stream};

use super::transfer::for_each_chunk;
use super::{Readable, image_ref, readable, snapshot_ref};
use crate::args::{ExportArgs, ImageCommand, ImportArgs};
use crate::exit::{Exit, Refusal};
use crate::image_file::{self, RawFile, Target};
use crate::interrupt::Interrupts;
use crate::output::{Column, Output, facts, or_dash, table};
use crate::progress::Progress;
use crate::session::Session;
use crate::size::human_size;
use crate::view::{ImageView, SnapshotView};

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: ImageCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    match command {
        ImageCommand::Import(args) => import(&repository, &args, output).await,
        ImageCommand::Export(args) => export(&repository, &args, output).await,
        ImageCommand::List => list(&repository, output).await,
        ImageCommand::Info { image } => info(&repository, &image, output).await,
        ImageCommand::Clone { source, name } => clone(&repository, &source, &name, output).await,
        ImageCommand::Remove { image } => remove(&repository, &image, output).await,
    }
}

/// An operator waits for an import: what fails for longer than this is reported, not waited out.
const IMPORT_PATIENCE: Duration = Duration::from_secs(20);

async fn import(repository: &Repository, args: &ImportArgs, output: Output) -> anyhow::Result<()> {
    let chunk_size = args.chunk_size.map_or(Ok(ChunkSize::DEFAULT), ChunkSize::new);
    let chunk_size = chunk_size.map_err(|e| Refusal::new(Exit::Usage, e.to_string()))?;
    refuse_taken(repository, &args.image).await?;
    let pool = pool_named(repository, args.pool.as_str()).await?;
    let mut interrupts = Interrupts::listen()?;

    let stored = interrupts.guard(async {
        let raw = image_file::open(args).await?;
        store(repository, pool.id, &raw, chunk_size, &args.image)
            .await
            .with_context(|| format!("cannot import {}", args.file.display()))
    });
    let (persisted, keeper) = stored.await?;
    // From here on it takes milliseconds and is not interrupted. Before, there was no trace of
    // the image but chunks that the collector takes.
    let snapshot = publish(repository, args, chunk_size, persisted, &keeper).await?;
    keeper.shutdown().await;
    output.data(&SnapshotView::from(snapshot), |view| {
        format!(
            "{}@{}  {} in size, {} stored\n",
            view.image,
            view.snapshot,
            human_size(view.size_bytes.unwrap_or_default()),
            human_size(view.stored_bytes)
        )
    })
}

async fn refuse_taken(repository: &Repository, name: &ImageName) -> anyhow::Result<()> {
    match repository.catalog().get_image(image_ref(name)).await {
        Err(CatalogError::NotFound(_)) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(image) => {
            let hint = if image.latest == 0 {
                " without a stable snapshot: it is being written, or its import was killed"
            } else {
                ""
            };
            let message = format!(
                "image {name} exists{hint}; choose another name, or remove it with `blobcr image \
                 remove {name}`"
            );
            Err(Refusal::new(Exit::Conflict, message).into())
        }
    }
}

async fn pool_named(repository: &Repository, name: &str) -> anyhow::Result<v1::Pool> {
    let by_name = v1::PoolRef { name: name.to_owned(), id: 0 };
    match repository.catalog().get_pool(by_name.clone()).await {
        Err(CatalogError::NotFound(_)) => {
            let message = format!(
                "there is no pool {name}; list them with `blobcr pool list`, or make it with \
                 `blobcr pool create {name} --policy replica:N`"
            );
            Err(Refusal::new(Exit::NotFound, message).into())
        }
        Err(e) => Err(e.into()),
        Ok(pool) => {
            // Too few nodes for its policy are told before anything is read.
            repository.catalog().get_placement(by_name).await?;
            Ok(pool)
        }
    }
}

/// Makes the file's chunks and tree durable. They belong to no image yet; the lease keeps them.
async fn store(
    repository: &Repository,
    pool: u32,
    raw: &RawFile,
    chunk_size: ChunkSize,
    name: &ImageName,
) -> anyhow::Result<(Persisted, LeaseKeeper)> {
    let geometry = Geometry::new(raw.size_bytes(), chunk_size, FanOut::DEFAULT)?;
    let chunks = raw.data_chunks(chunk_size)?;
    let progress = Progress::bytes("import", chunks.len() as u64 * chunk_size.bytes());
    let catalog = repository.catalog();
    let keeper = LeaseKeeper::start(catalog.clone(), format!("import of {name}"), LEASE_TTL);
    let lease = tokio::time::timeout(IMPORT_PATIENCE, keeper.current())
        .await
        .map_err(|_| CatalogError::Unavailable("no lease was given in time".into()))??;
    let (store, nodes) = (repository.pool(pool).await?, repository.nodes(pool).await?);
    let source = raw.source(chunk_size);
    let job = PersistJob {
        base: Root::empty(geometry),
        geometry,
        chunks,
        generation: lease.generation,
        source: &source,
        progress: &|now| progress.set(now.chunks_done * chunk_size.bytes()),
        limits: PersistLimits { give_up_after: IMPORT_PATIENCE, ..PersistLimits::default() },
    };
    let persisted = progress.during(Box::pin(persist(&*store, &*nodes, job))).await?;
    raw.check_unchanged()?;
    if keeper.current().await?.generation != lease.generation {
        let message = "the metadata service was away for longer than a lease lasts; import again \
                       (what is stored already is not sent twice)";
        return Err(Refusal::new(Exit::Unavailable, message).into());
    }
    Ok((persisted, keeper))
}

async fn publish(
    repository: &Repository,
    args: &ImportArgs,
    chunk_size: ChunkSize,
    persisted: Persisted,
    keeper: &LeaseKeeper,
) -> anyhow::Result<v1::Snapshot> {
    let catalog = repository.catalog();
    let lease_id = keeper.current().await?.id;
    let create = v1::CreateImageRequest {
        name: args.image.to_string(),
        pool: args.pool.to_string(),
        // At most 4 MiB.
        chunk_size: chunk_size.bytes() as u32,
        writer: String::new(),
    };
    let image = catalog.create_image(create).await?;
    let published = async {
        let begin = v1::BeginSnapshotRequest {
            image_id: image.id,
            number: 0,
            lease_id,
            writer: String::new(),
        };
        let begun = catalog.begin_snapshot(begin).await?;
        let publish = v1::PublishSnapshotRequest {
            image_id: image.id,
            number: begun.number,
            lease_id,
            writer: String::new(),
            root: Some(persisted.root.to_wire()),
            stats: Some(persisted.stats),
        };
        catalog.publish_snapshot(publish).await
    };
    match published.await {
        Ok(snapshot) => Ok(snapshot),
        Err(failure) => {
            let by_id = v1::ImageRef { name: String::new(), id: image.id };
            if let Err(e) = catalog.remove_image(by_id).await {
                tracing::warn!(image = image.name, error = %e, "an image without snapshot is left");
            }
            Err(failure.into())
        }
    }
}

/// Chunks fetched at once: hides the round trips of a pool whose nodes are milliseconds away.
const READS: usize = 16;

async fn export(repository: &Repository, args: &ExportArgs, output: Output) -> anyhow::Result<()> {
    let Readable { image, snapshot, root } = readable(repository, &args.source).await?;
    let mut interrupts = Interrupts::listen()?;
    let written = interrupts.guard(async {
        let size = root.geometry.size_bytes;
        let target = Target::create(&args.file, args.format, args.force, size)?;
        let write = target.writer();
        let progress = Progress::bytes("export", size);
        let chunk_bytes = root.geometry.chunk_size.bytes();
        let (store, nodes) =
            (repository.pool(image.pool).await?, repository.nodes(image.pool).await?);
        let each = async |index: u64, _id, chunk: Result<bytes::Bytes, _>| {
            let mut chunk = chunk?;
            let offset = index * chunk_bytes;
            chunk.truncate(size.saturating_sub(offset).min(chunk_bytes) as usize);
            let write = write.clone();
            tokio::task::spawn_blocking(move || write(offset, chunk)).await??;
            progress.set(offset + chunk_bytes);
            Ok(())
        };
        Box::pin(progress.during(for_each_chunk(&*store, &*nodes, &root, READS, each))).await?;
        target.finish().await
    });
    let name = format!("{}@{}", image.name, snapshot.number);
    written.await.with_context(|| format!("cannot export {name} to {}", args.file.display()))?;
    output.data(&SnapshotView::from(snapshot), |_| String::new())
}

/// Images in one answer.
const PAGE: u32 = 500;
/// Snapshot records asked for at once.
const LOOKUPS: usize = 16;

/// Every image.
pub(super) async fn all(repository: &Repository) -> Result<Vec<v1::Image>, CatalogError> {
    let mut images: Vec<v1::Image> = Vec::new();
    loop {
        let after_name = images.last().map(|image| image.name.clone()).unwrap_or_default();
        let request = v1::ListImagesRequest { after_name, limit: PAGE };
        let page = repository.catalog().list_images(request).await?;
        let none = page.images.is_empty();
        images.extend(page.images);
        if !page.more || none {
            return Ok(images);
        }
    }
}

async fn list(repository: &Repository, output: Output) -> anyhow::Result<()> {
    let images = all(repository).await?;
    let views = views(repository, images).await?;
    output.data(&views, |views| {
        let columns = [
            Column::Text("IMAGE"),
            Column::Number("LATEST"),
            Column::Number("SIZE"),
            Column::Text("POOL"),
            Column::Text("CLONE OF"),
            Column::Text("CREATED"),
        ];
        table(&columns, views.iter().map(row))
    })
}

fn row(view: &ImageView) -> Vec<String> {
    vec![
        view.image.clone(),
        or_dash(view.latest),
        or_dash(view.size_bytes.map(human_size)),
        view.pool.clone(),
        parent(view),
        or_dash(view.created_at.clone()),
    ]
}

fn parent(view: &ImageView) -> String {
    or_dash(view.parent.as_ref().map(|parent| {
        format!("{}@{}", parent.image.as_deref().unwrap_or("(removed)"), parent.snapshot)
    }))
}

/// Completes the records of images: sizes, and names of pools and parents.
async fn views(repository: &Repository, images: Vec<v1::Image>) -> anyhow::Result<Vec<ImageView>> {
    let pools = repository.catalog().list_pools(v1::ListPoolsRequest {}).await?.pools;
    let pools: HashMap<_, _> = pools.into_iter().map(|pool| (pool.id, pool.name)).collect();
    stream::iter(images)
        .map(|image| async {
            let size = latest_size(repository, &image).await?;
            let parent = parent_name(repository, &image).await?;
            let pool = pools.get(&image.pool).cloned().unwrap_or_else(|| image.pool.to_string());
            Ok(ImageView::new(image, size, pool, parent))
        })
        .buffered(LOOKUPS)
        .try_collect()
        .await
}

async fn latest_size(
    repository: &Repository,
    image: &v1::Image,
) -> Result<Option<u64>, CatalogError> {
    if image.latest == 0 {
        return Ok(None);
    }
    let by_id = v1::ImageRef { name: String::new(), id: image.id };
    let latest = v1::SnapshotRef { image: Some(by_id), number: image.latest };
    match repository.catalog().get_snapshot(latest).await {
        Ok(snapshot) => Ok(snapshot.root.map(|root| root.size_bytes)),
        // Removed since it was listed.
        Err(CatalogError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

async fn parent_name(
    repository: &Repository,
    image: &v1::Image,
) -> Result<Option<String>, CatalogError> {
    if image.parent_image == 0 {
        return Ok(None);
    }
    let by_id = v1::ImageRef { name: String::new(), id: image.parent_image };
    match repository.catalog().get_image(by_id).await {
        Ok(parent) => Ok(Some(parent.name)),
        Err(CatalogError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

async fn info(repository: &Repository, name: &ImageName, output: Output) -> anyhow::Result<()> {
    let image = repository.catalog().get_image(image_ref(name)).await?;
    let view = views(repository, vec![image]).await?.pop().context("the image is gone")?;
    output.data(&view, |view| {
        facts([
            ("image", view.image.clone()),
            ("id", view.id.to_string()),
            ("pool", view.pool.clone()),
            ("size", or_dash(view.size_bytes.map(human_size))),
            ("chunk size", human_size(u64::from(view.chunk_size))),
            ("latest", or_dash(view.latest)),
            ("clone of", parent(view)),
            ("writer", or_dash(view.writer.clone())),
            ("created", or_dash(view.created_at.clone())),
        ])
    })
}

async fn clone(
    repository: &Repository,
    source: &ImageSpec,
    name: &ImageName,
    output: Output,
) -> anyhow::Result<()> {
    let request = v1::CloneImageRequest {
        source: Some(snapshot_ref(source)),
        name: name.to_string(),
        writer: String::new(),
    };
    let cloned = repository.catalog().clone_image(request).await?;
    let snapshot = cloned.snapshot.context("the metadata service gave no snapshot")?;
    output.data(&SnapshotView::from(snapshot), |view| format!("{}@{}\n", view.image, view.snapshot))
}

/// What was removed.
#[derive(Debug, serde::Serialize)]
struct RemovedView {
    image: String,
    /// Null: all of them.
    snapshot: Option<u64>,
    state: &'static str,
}

async fn remove(repository: &Repository, spec: &ImageSpec, output: Output) -> anyhow::Result<()> {
    if spec.number.is_some() {
        repository.catalog().remove_snapshot(snapshot_ref(spec)).await?;
    } else {
        repository.catalog().remove_image(image_ref(&spec.image)).await?;
    }
    let view =
        RemovedView { image: spec.image.to_string(), snapshot: spec.number, state: "obsolete" };
    output.data(&view, |_| String::new())
}
