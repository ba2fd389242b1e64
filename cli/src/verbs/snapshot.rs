//! `blobcr snapshot`: immutable versions of images.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use blobcr_proto::{Hash, ImageName, ImageSpec, v1};
use blobcr_repository::tree::{Geometry, Lost, Reached, diff, survey};
use blobcr_repository::{CatalogError, Repository, StoreError};
use serde::Serialize;

use super::transfer::fetch_all;
use super::{Readable, image_ref, readable, snapshot_ref};
use crate::args::SnapshotCommand;
use crate::channel::within;
use crate::exit::{Exit, Refusal};
use crate::output::{Column, Output, or_dash, table};
use crate::progress::Progress;
use crate::session::Session;
use crate::size::human_size;
use crate::view::SnapshotView;

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(
    command: SnapshotCommand,
    session: &Session,
    output: Output,
) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    match command {
        SnapshotCommand::List { image } => list(&repository, &image, output).await,
        SnapshotCommand::Wait { snapshot, timeout } => {
            let timeout = timeout.map(Duration::from_secs);
            let settled = wait(session, &repository, &snapshot, timeout).await?;
            output.data(&SnapshotView::from(settled), |view| format!("{}\n", view.state))
        }
        SnapshotCommand::Diff { from, to } => differences(&repository, &from, &to, output).await,
        SnapshotCommand::Verify { snapshot } => verify(&repository, &snapshot, output).await,
    }
}

/// Snapshots in one answer.
const PAGE: u32 = 500;

async fn list(repository: &Repository, name: &ImageName, output: Output) -> anyhow::Result<()> {
    let mut views: Vec<SnapshotView> = Vec::new();
    loop {
        let after_number = views.last().map_or(0, |view| view.snapshot);
        let request =
            v1::ListSnapshotsRequest { image: Some(image_ref(name)), after_number, limit: PAGE };
        let page = repository.catalog().list_snapshots(request).await?;
        let none = page.snapshots.is_empty();
        views.extend(page.snapshots.into_iter().map(SnapshotView::from));
        if !page.more || none {
            break;
        }
    }
    output.data(&views, |views| {
        let columns = [
            Column::Text("SNAPSHOT"),
            Column::Text("STATE"),
            Column::Number("SIZE"),
            Column::Number("CHANGED"),
            Column::Number("STORED"),
            Column::Text("CREATED"),
            Column::Text("STABLE"),
        ];
        table(&columns, views.iter().map(row))
    })
}

fn row(view: &SnapshotView) -> Vec<String> {
    vec![
        format!("{}@{}", view.image, view.snapshot),
        view.state.to_owned(),
        or_dash(view.size_bytes.map(human_size)),
        human_size(view.dirty_bytes),
        human_size(view.stored_bytes),
        or_dash(view.created_at.clone()),
        or_dash(view.stable_at.clone()),
    ]
}

/// How long a wait without a limit of its own lasts: until the operator loses patience.
const WAIT_MAX: Duration = Duration::from_secs(30 * 86_400);
/// How often to look for a snapshot that its host has not announced yet.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Waits until a snapshot is stable.
///
/// # Errors
/// When it failed, there is none, or the time is over.
pub(super) async fn wait(
    session: &Session,
    repository: &Repository,
    spec: &ImageSpec,
    timeout: Option<Duration>,
) -> anyhow::Result<v1::Snapshot> {
    let until = Instant::now() + timeout.unwrap_or(WAIT_MAX).min(WAIT_MAX);
    let progress = Progress::spinner(&format!("waiting for {spec}"));
    let waited = progress.during(settled(session, repository, spec, until)).await;
    let snapshot = match waited {
        Err(CatalogError::Timeout(_)) => {
            let message =
                format!("snapshot {spec} is still pending; wait again, or look at `blobcr status`");
            return Err(Refusal::new(Exit::Other, message).into());
        }
        other => other?,
    };
    match snapshot.state() {
        v1::SnapshotState::Stable => Ok(snapshot),
        state => {
            let word = crate::view::state_word(state);
            let reason = if snapshot.reason.is_empty() {
                String::new()
            } else {
                format!(": {}", snapshot.reason)
            };
            Err(Refusal::new(Exit::Other, format!("snapshot {spec} is {word}{reason}")).into())
        }
    }
}

async fn settled(
    session: &Session,
    repository: &Repository,
    spec: &ImageSpec,
    until: Instant,
) -> Result<v1::Snapshot, CatalogError> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let request = v1::WaitSnapshotRequest {
            snapshot: Some(snapshot_ref(spec)),
            timeout_ms: left.as_millis() as u64,
        };
        match repository.catalog().wait_snapshot(request).await {
            // A COMMIT returns before the metadata service has heard of its snapshot.
            Err(CatalogError::NotFound(reason)) => {
                if !is_pending_here(session, spec).await {
                    return Err(CatalogError::NotFound(reason));
                }
                if left.is_zero() {
                    return Err(CatalogError::Timeout(reason));
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            settled => return settled,
        }
    }
}

/// An answer from memory.
const LIST_DEADLINE: Duration = Duration::from_secs(10);

/// Whether a disk of the mirror that we talk to is about to announce this snapshot.
async fn is_pending_here(session: &Session, spec: &ImageSpec) -> bool {
    let Ok(mut mirror) = session.mirror() else { return false };
    let request = within(LIST_DEADLINE, v1::ListDisksRequest {});
    let Ok(answer) = mirror.client.list_disks(request).await else { return false };
    answer.into_inner().disks.iter().any(|disk| {
        disk.checkpoint_image == spec.image.as_str()
            && spec.number.is_some_and(|number| disk.pending.contains(&number))
    })
}

/// A range in which two snapshots differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct RangeView {
    offset_bytes: u64,
    length_bytes: u64,
    /// `changed`; `added` where the first has zeros; `removed` where the second has.
    kind: &'static str,
}

#[derive(Debug, Serialize)]
struct DiffView {
    from: String,
    to: String,
    changed_bytes: u64,
    ranges: Vec<RangeView>,
}

async fn differences(
    repository: &Repository,
    from: &ImageSpec,
    to: &ImageSpec,
    output: Output,
) -> anyhow::Result<()> {
    let (a, b) = (readable(repository, from).await?, readable(repository, to).await?);
    if a.image.pool != b.image.pool {
        let message = "the two images are in different pools and share nothing";
        return Err(Refusal::new(Exit::Conflict, message).into());
    }
    let nodes = repository.nodes(a.image.pool).await?;
    let mut ranges = Vec::new();
    let size = a.root.geometry.size_bytes.max(b.root.geometry.size_bytes);
    let chunk_bytes = a.root.geometry.chunk_size.bytes();
    diff(&*nodes, &a.root, &b.root, &mut |index, of_a, of_b| {
        append(&mut ranges, index * chunk_bytes, chunk_bytes, size, kind(of_a, of_b));
    })
    .await?;
    let changed_bytes = ranges.iter().map(|range| range.length_bytes).sum();
    let view = DiffView { from: from.to_string(), to: to.to_string(), changed_bytes, ranges };
    output.data(&view, |view| {
        let columns = [Column::Number("OFFSET"), Column::Number("LENGTH"), Column::Text("KIND")];
        table(
            &columns,
            view.ranges.iter().map(|range| {
                vec![
                    range.offset_bytes.to_string(),
                    range.length_bytes.to_string(),
                    range.kind.to_owned(),
                ]
            }),
        )
    })
}

const fn kind(from: Option<Hash>, to: Option<Hash>) -> &'static str {
    match (from, to) {
        (None, _) => "added",
        (_, None) => "removed",
        _ => "changed",
    }
}

/// Adds a chunk to the ranges: to the last one where it continues that.
fn append(
    ranges: &mut Vec<RangeView>,
    offset_bytes: u64,
    chunk_bytes: u64,
    size: u64,
    kind: &'static str,
) {
    let length_bytes = chunk_bytes.min(size.saturating_sub(offset_bytes));
    match ranges.last_mut() {
        Some(last)
            if last.kind == kind && last.offset_bytes + last.length_bytes == offset_bytes =>
        {
            last.length_bytes += length_bytes;
        }
        _ => ranges.push(RangeView { offset_bytes, length_bytes, kind }),
    }
}

/// Damage named one by one; the rest is only counted.
const DAMAGE_NAMED_MAX: usize = 100;
/// Chunks read at once.
const READS: usize = 16;

#[derive(Debug, Serialize)]
struct VerifyView {
    image: String,
    snapshot: u64,
    state: &'static str,
    intact: bool,
    tree_nodes: u64,
    /// Each distinct chunk is read once.
    chunks: u64,
    bytes: u64,
    damaged_nodes: u64,
    damaged_chunks: u64,
    /// The first of them.
    damage: Vec<DamageView>,
}

#[derive(Debug, Serialize)]
struct DamageView {
    offset_bytes: u64,
    length_bytes: u64,
    reason: String,
}

/// What the walk over the tree found.
#[derive(Debug, Default)]
struct Surveyed {
    seen: HashSet<Hash>,
    tree_nodes: u64,
    chunks: Vec<(u64, Hash)>,
    lost: Vec<Lost>,
}

async fn verify(repository: &Repository, spec: &ImageSpec, output: Output) -> anyhow::Result<()> {
    let Readable { image, snapshot, root } = readable(repository, spec).await?;
    let (store, nodes) = (repository.pool(image.pool).await?, repository.nodes(image.pool).await?);
    let Surveyed { tree_nodes, chunks, lost, .. } = walk(&*nodes, &root).await?;
    let progress =
        Progress::bytes("verify", chunks.len() as u64 * root.geometry.chunk_size.bytes());
    let mut view = VerifyView {
        image: image.name,
        snapshot: snapshot.number,
        state: "stable",
        intact: false,
        tree_nodes,
        chunks: chunks.len() as u64,
        bytes: 0,
        damaged_nodes: lost.len() as u64,
        damaged_chunks: 0,
        damage: lost
            .iter()
            .take(DAMAGE_NAMED_MAX)
            .map(|lost| lost_node(lost, &root.geometry))
            .collect(),
    };
    let tally = std::sync::Mutex::new(&mut view);
    let each = async |index: u64, _id, chunk: Result<bytes::Bytes, StoreError>| {
        let mut view = tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match chunk {
            Ok(chunk) => view.bytes += chunk.len() as u64,
            Err(e @ (StoreError::Missing { .. } | StoreError::Damaged { .. })) => {
                view.damaged_chunks += 1;
                if view.damage.len() < DAMAGE_NAMED_MAX {
                    view.damage.push(damage(index..index + 1, e.to_string(), &root.geometry));
                }
            }
            Err(e) => return Err(e.into()),
        }
        progress.set(view.bytes);
        Ok(())
    };
    progress.during(fetch_all(&*store, chunks, READS, &each)).await?;
    view.intact = view.damaged_nodes == 0 && view.damaged_chunks == 0;
    output.data(&view, verified)?;
    if view.intact {
        return Ok(());
    }
    let message = format!(
        "snapshot {}@{} is damaged: {} chunks and {} tree nodes cannot be read",
        view.image, view.snapshot, view.damaged_chunks, view.damaged_nodes
    );
    Err(Refusal::new(Exit::Integrity, message).into())
}

async fn walk(
    nodes: &dyn blobcr_repository::tree::NodeSource,
    root: &blobcr_repository::tree::Root,
) -> anyhow::Result<Surveyed> {
    let found = std::sync::Mutex::new(Surveyed::default());
    let lock = || found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut visit = |reached| {
        let mut found = lock();
        match reached {
            Reached::Node { id, .. } => {
                let new = found.seen.insert(id);
                found.tree_nodes += u64::from(new);
                new
            }
            Reached::Chunk { id, index } => {
                if found.seen.insert(id) {
                    found.chunks.push((index, id));
                }
                true
            }
        }
    };
    survey(nodes, root, &mut visit, &mut |lost| lock().lost.push(lost)).await?;
    Ok(found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn lost_node(lost: &Lost, geometry: &Geometry) -> DamageView {
    damage(lost.chunks.clone(), lost.error.to_string(), geometry)
}

fn damage(chunks: std::ops::Range<u64>, reason: String, geometry: &Geometry) -> DamageView {
    let chunk_bytes = geometry.chunk_size.bytes();
    let offset_bytes = chunks.start * chunk_bytes;
    let end = chunks.end.saturating_mul(chunk_bytes).min(geometry.size_bytes);
    DamageView { offset_bytes, length_bytes: end.saturating_sub(offset_bytes), reason }
}

fn verified(view: &VerifyView) -> String {
    if view.intact {
        return format!(
            "{}@{} is intact: {} chunks ({}) and {} tree nodes\n",
            view.image,
            view.snapshot,
            view.chunks,
            human_size(view.bytes),
            view.tree_nodes
        );
    }
    let columns = [Column::Number("OFFSET"), Column::Number("LENGTH"), Column::Text("DAMAGE")];
    table(
        &columns,
        view.damage.iter().map(|damage| {
            vec![
                damage.offset_bytes.to_string(),
                damage.length_bytes.to_string(),
                damage.reason.clone(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_kind_are_one_range() {
        let mut ranges = Vec::new();
        for (index, kind) in [(0, "added"), (1, "added"), (2, "changed"), (9, "changed")] {
            append(&mut ranges, index * 10, 10, 95, kind);
        }
        let seen: Vec<_> =
            ranges.iter().map(|r| (r.offset_bytes, r.length_bytes, r.kind)).collect();
        assert_eq!(seen, [(0, 20, "added"), (20, 10, "changed"), (90, 5, "changed")]);
    }
}
