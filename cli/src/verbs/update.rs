//! `blobcr image export --since`: makes a raw file of one snapshot a file of another, by what differs.

use std::path::Path;
use std::sync::Arc;

use blobcr_proto::{Hash, ImageSpec};
use blobcr_repository::tree::diff;
use blobcr_repository::{Repository, SnapshotReader};
use futures::{StreamExt, TryStreamExt, stream};

use super::snapshot::check_same_pool;
use super::snapshot_ref;
use crate::exit::{Exit, Refusal};
use crate::image_file::HeldFile;
use crate::progress::Progress;

/// Chunks of the file that are read and hashed at once: as many as a small machine has cores.
const READS: usize = 4;
/// Chunks that are fetched and written at once.
const WRITES: usize = 8;

/// Where two snapshots differ. `None`: zeros.
#[derive(Debug, Clone, Copy)]
struct Change {
    chunk: u64,
    from: Option<Hash>,
    to: Option<Hash>,
}

/// Writes into `path`, which holds `since`, what `to` has otherwise. No byte is written before all
/// that will be were found to be those of `since`, or of `to` already: what was interrupted can go on.
pub(super) async fn write(
    repository: &Repository,
    since: &ImageSpec,
    (image, to): (&blobcr_proto::v1::Image, &SnapshotReader),
    path: &Path,
) -> anyhow::Result<()> {
    let (of_since, _, from) = repository.open(snapshot_ref(since)).await?;
    check_same_pool(&of_since, image)?;
    if from.size_bytes() != to.size_bytes() {
        let message = format!("{since} has another size; export the snapshot whole");
        return Err(Refusal::new(Exit::Conflict, message).into());
    }
    let nodes = repository.nodes(image.pool).await?;
    let mut changes = Vec::new();
    diff(&*nodes, from.root(), to.root(), &mut |chunk, from, to| {
        changes.push(Change { chunk, from, to });
    })
    .await?;
    let geometry = to.root().geometry;
    let file = Arc::new(HeldFile::open(path, geometry.size_bytes, geometry.chunk_size)?);
    let progress = Progress::bytes("export", changes.len() as u64 * geometry.chunk_size.bytes());
    let written = async {
        let stale = stale(&file, since, changes, geometry.chunk_size.bytes()).await?;
        let mut written =
            stream::iter(stale).map(|change| bring(&file, to, change)).buffer_unordered(WRITES);
        let mut done = 0;
        while let Some(()) = written.try_next().await? {
            done += geometry.chunk_size.bytes();
            progress.set(done);
        }
        blocking(&file, HeldFile::sync).await
    };
    progress.during(Box::pin(written)).await
}

async fn blocking<T: Send + 'static>(
    file: &Arc<HeldFile>,
    work: impl FnOnce(&HeldFile) -> std::io::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let file = Arc::clone(file);
    Ok(tokio::task::spawn_blocking(move || work(&file)).await??)
}

/// The changes that the file does not have yet.
async fn stale(
    file: &Arc<HeldFile>,
    since: &ImageSpec,
    changes: Vec<Change>,
    chunk_bytes: u64,
) -> anyhow::Result<Vec<Change>> {
    let looked = |change: Change| async move {
        let held = blocking(file, move |file| file.identity(change.chunk)).await?;
        if held == change.to {
            return Ok(None);
        }
        if held == change.from {
            return Ok(Some(change));
        }
        let at = change.chunk * chunk_bytes;
        let message = format!(
            "it does not hold {since}: the {chunk_bytes} bytes from {at} on are others, and nothing was \
             written; export the snapshot whole, to another file"
        );
        Err(Refusal::new(Exit::Conflict, message).into())
    };
    let looked = stream::iter(changes).map(looked).buffer_unordered(READS);
    looked.try_filter_map(|stale: Option<Change>| std::future::ready(Ok(stale))).try_collect().await
}

async fn bring(file: &Arc<HeldFile>, to: &SnapshotReader, change: Change) -> anyhow::Result<()> {
    let plain = match change.to {
        Some(id) => Some(to.fetch(change.chunk, id).await?),
        None => None,
    };
    blocking(file, move |file| file.write(change.chunk, plain.as_deref())).await
}
