//! `blobcr image`: named, versioned disks.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context;
use blobcr_proto::{ChunkSize, ImageName, ImageSpec, v1};
use blobcr_repository::{
    CatalogError, ImportError, LEASE_TTL, LeaseKeeper, NewImage, PersistLimits, Repository,
    SnapshotReader,
};
use futures::{StreamExt, TryStreamExt, stream};

use super::{image_ref, snapshot_ref};
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
    check_pool(repository, args.pool.as_str()).await?;
    let mut interrupts = Interrupts::listen()?;
    let lease = LeaseKeeper::start(
        repository.catalog().clone(),
        format!("import of {}", args.image),
        LEASE_TTL,
    );
    let stored = interrupts.guard(async {
        let raw = image_file::open(args, chunk_size).await?;
        store(repository, &lease, &raw, args, chunk_size).await
    });
    let stored =
        Box::pin(stored).await.with_context(|| format!("cannot import {}", args.file.display()));
    lease.shutdown().await;
    let snapshot = match stored {
        Ok(snapshot) => snapshot,
        Err(failure) => {
            if !is_taken(&failure) {
                remove_unborn(repository, &args.image).await;
            }
            return Err(failure);
        }
    };
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

/// Makes the image. It has no name before all of its bytes are durable.
async fn store(
    repository: &Repository,
    lease: &LeaseKeeper,
    raw: &RawFile,
    args: &ImportArgs,
    chunk_size: ChunkSize,
) -> anyhow::Result<v1::Snapshot> {
    let image = NewImage {
        name: args.image.to_string(),
        pool: args.pool.to_string(),
        chunk_size,
        ..NewImage::default()
    };
    let limits = PersistLimits { give_up_after: IMPORT_PATIENCE, ..PersistLimits::default() };
    let progress = Progress::bytes("import", 0);
    let told = |now: blobcr_repository::Progress| {
        progress.set_total(now.chunks_total * chunk_size.bytes());
        progress.set(now.chunks_done * chunk_size.bytes());
    };
    let imported = blobcr_repository::import(repository, lease, raw, image, limits, &told);
    let (_, snapshot) = progress.during(Box::pin(imported)).await?;
    Ok(snapshot)
}

/// Whether another import was quicker to take the name, which is then its own.
fn is_taken(failure: &anyhow::Error) -> bool {
    matches!(failure.downcast_ref(), Some(ImportError::Catalog(CatalogError::AlreadyExists(_))))
}

/// Takes back the name of an import that ended between its making and its first snapshot.
async fn remove_unborn(repository: &Repository, name: &ImageName) {
    let catalog = repository.catalog();
    match catalog.get_image(image_ref(name)).await {
        Ok(image) if image.latest == 0 => {
            let by_id = v1::ImageRef { name: String::new(), id: image.id };
            if let Err(e) = catalog.remove_image(by_id).await {
                tracing::warn!(image = image.name, error = %e, "an image without snapshot is left");
            }
        }
        // Never made, made by somebody else, or nobody to ask.
        _ => {}
    }
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

/// Tells of a pool that is missing, or has too few nodes, before anything is read.
async fn check_pool(repository: &Repository, name: &str) -> anyhow::Result<()> {
    let by_name = v1::PoolRef { name: name.to_owned(), id: 0 };
    match repository.catalog().get_pool(by_name.clone()).await {
        Err(CatalogError::NotFound(_)) => {
            let message = format!(
                "there is no pool {name}; list them with `blobcr pool list`, or make it with \
                 `blobcr pool create {name} --policy replica:N|ec:K+M`"
            );
            Err(Refusal::new(Exit::NotFound, message).into())
        }
        Err(e) => Err(e.into()),
        Ok(_) => {
            let table = v1::GetPlacementRequest { name: by_name.name, ..Default::default() };
            repository.catalog().get_placement(table).await?;
            Ok(())
        }
    }
}

async fn export(repository: &Repository, args: &ExportArgs, output: Output) -> anyhow::Result<()> {
    let (image, snapshot, reader) = repository.open(snapshot_ref(&args.source)).await?;
    let mut interrupts = Interrupts::listen()?;
    let written = async {
        match &args.since {
            Some(since) => {
                super::update::write(repository, since, (&image, &reader), &args.file).await
            }
            None => write(&reader, args).await,
        }
    };
    let written = interrupts.guard(Box::pin(written));
    let name = format!("{}@{}", image.name, snapshot.number);
    written.await.with_context(|| format!("cannot export {name} to {}", args.file.display()))?;
    output.data(&SnapshotView::from(snapshot), |_| String::new())
}

/// Writes a snapshot to a file; its holes stay holes.
async fn write(reader: &SnapshotReader, args: &ExportArgs) -> anyhow::Result<()> {
    let size = reader.size_bytes();
    let target = Target::create(&args.file, args.format, args.force, size)?;
    let progress = Progress::bytes("export", size);
    let chunk_bytes = reader.root().geometry.chunk_size.bytes();
    let mut present = reader.present(0..u64::MAX);
    let written = async {
        while let Some((index, mut chunk)) = present.try_next().await? {
            let offset = index * chunk_bytes;
            chunk.truncate(size.saturating_sub(offset).min(chunk_bytes) as usize);
            let write = target.writer();
            tokio::task::spawn_blocking(move || write(offset, chunk)).await??;
            progress.set(offset);
        }
        anyhow::Ok(())
    };
    progress.during(written).await?;
    target.finish().await
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
