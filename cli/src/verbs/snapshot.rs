//! `blobcr snapshot`: immutable versions of images.

use std::time::{Duration, Instant};

use blobcr_proto::{Hash, ImageName, ImageSpec, v1};
use blobcr_repository::tree::{Geometry, diff};
use blobcr_repository::{CatalogError, Damage, Repository};
use serde::Serialize;

use super::{image_ref, pins, snapshot_ref};
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
        SnapshotCommand::Prune { image, keep, dry_run } => {
            super::prune::run(&repository, &image, &keep, dry_run, output).await
        }
        SnapshotCommand::Verify { snapshot } => verify(&repository, &snapshot, output).await,
        SnapshotCommand::Pin { snapshot, holder } => {
            pins::add(&repository, &snapshot, holder, output).await
        }
        SnapshotCommand::Unpin { snapshot, holder } => {
            pins::remove(&repository, &snapshot, holder, output).await
        }
        SnapshotCommand::Pins => pins::list(&repository, output).await,
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
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
    // A COMMIT returns before the metadata service has heard of its snapshot, which may become
    // stable between a look at the one and at the other.
    let mut may_come = true;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let request = v1::WaitSnapshotRequest {
            snapshot: Some(snapshot_ref(spec)),
            timeout_ms: left.as_millis() as u64,
        };
        match repository.catalog().wait_snapshot(request).await {
            Err(CatalogError::NotFound(_)) if may_come && !left.is_zero() => {
                may_come = is_pending_here(session, spec).await;
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

/// Refuses to compare images of which no chunk can be the same.
pub(super) fn check_same_pool(a: &v1::Image, b: &v1::Image) -> Result<(), Refusal> {
    if a.pool == b.pool {
        return Ok(());
    }
    let message = "the two images are in different pools and share nothing";
    Err(Refusal::new(Exit::Conflict, message))
}

async fn differences(
    repository: &Repository,
    from: &ImageSpec,
    to: &ImageSpec,
    output: Output,
) -> anyhow::Result<()> {
    let (of_a, _, a) = repository.open(snapshot_ref(from)).await?;
    let (of_b, _, b) = repository.open(snapshot_ref(to)).await?;
    check_same_pool(&of_a, &of_b)?;
    let nodes = repository.nodes(of_a.pool).await?;
    let mut ranges = Vec::new();
    let size = a.size_bytes().max(b.size_bytes());
    let chunk_bytes = a.root().geometry.chunk_size.bytes();
    diff(&*nodes, a.root(), b.root(), &mut |index, in_a, in_b| {
        append(&mut ranges, index * chunk_bytes, chunk_bytes, size, kind(in_a, in_b));
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

#[derive(Debug, Serialize)]
struct VerifyView {
    image: String,
    snapshot: u64,
    state: &'static str,
    intact: bool,
    tree_nodes: u64,
    chunks: u64,
    bytes: u64,
    /// How many chunks and tree nodes are damaged or lost.
    damaged: u64,
    /// The first of them.
    damage: Vec<DamageView>,
}

/// A range of the disk that cannot be read, and why.
#[derive(Debug, Serialize)]
struct DamageView {
    offset_bytes: u64,
    length_bytes: u64,
    reason: String,
}

impl DamageView {
    fn new(damage: &Damage, geometry: &Geometry) -> Self {
        let chunk_bytes = geometry.chunk_size.bytes();
        let offset_bytes = damage.chunks.start * chunk_bytes;
        let end = damage.chunks.end.saturating_mul(chunk_bytes).min(geometry.size_bytes);
        let length_bytes = end.saturating_sub(offset_bytes);
        Self { offset_bytes, length_bytes, reason: damage.detail.clone() }
    }
}

/// What cannot be reached for so long is reported, not waited out.
const VERIFY_PATIENCE: Duration = Duration::from_secs(20);

/// What is left of a snapshot when all of it is read.
pub(super) async fn verified(
    repository: &Repository,
    spec: &ImageSpec,
) -> anyhow::Result<blobcr_repository::Verification> {
    let (image, _, reader) = repository.open(snapshot_ref(spec)).await?;
    let pool = repository.pool(image.pool).await?;
    let verifying = blobcr_repository::verify(&pool, reader.root(), VERIFY_PATIENCE, &|_, _| {});
    Ok(Box::pin(verifying).await?)
}

async fn verify(repository: &Repository, spec: &ImageSpec, output: Output) -> anyhow::Result<()> {
    let (image, snapshot, reader) = repository.open(snapshot_ref(spec)).await?;
    let pool = repository.pool(image.pool).await?;
    let geometry = reader.root().geometry;
    let progress = Progress::bytes("verify", 0);
    let told = |done: u64, total: u64| {
        progress.set_total(total * geometry.chunk_size.bytes());
        progress.set(done * geometry.chunk_size.bytes());
    };
    let verified = blobcr_repository::verify(&pool, reader.root(), VERIFY_PATIENCE, &told);
    let found = progress.during(Box::pin(verified)).await?;
    drop(progress);
    let view = VerifyView {
        image: image.name,
        snapshot: snapshot.number,
        state: "stable",
        intact: found.is_whole(),
        tree_nodes: found.nodes,
        chunks: found.chunks,
        bytes: found.bytes,
        damaged: found.damaged,
        damage: found.damage.iter().map(|damage| DamageView::new(damage, &geometry)).collect(),
    };
    output.data(&view, verified_text)?;
    if view.intact {
        return Ok(());
    }
    let message = format!(
        "snapshot {}@{} is damaged: {} of its chunks and tree nodes cannot be read",
        view.image, view.snapshot, view.damaged
    );
    Err(Refusal::new(Exit::Integrity, message).into())
}

fn verified_text(view: &VerifyView) -> String {
    if view.intact {
        let size = human_size(view.bytes);
        return format!(
            "{}@{} is intact: {} chunks ({size}) and {} tree nodes\n",
            view.image, view.snapshot, view.chunks, view.tree_nodes
        );
    }
    let columns = [Column::Number("OFFSET"), Column::Number("LENGTH"), Column::Text("DAMAGE")];
    let rows = view.damage.iter().map(|damage| {
        let DamageView { offset_bytes, length_bytes, reason } = damage;
        vec![offset_bytes.to_string(), length_bytes.to_string(), reason.clone()]
    });
    table(&columns, rows)
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
