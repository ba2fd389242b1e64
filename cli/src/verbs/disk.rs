//! `blobcr disk`: the writable disks of a host.

use std::time::Duration;

use anyhow::Context;
use blobcr_proto::{DiskName, ImageSpec, v1};

use super::snapshot::wait;
use super::snapshot_ref;
use crate::args::DiskCommand;
use crate::channel::within;
use crate::output::{Column, Output, facts, or_dash, table};
use crate::session::Session;
use crate::size::human_size;
use crate::view::{CheckpointView, DiskView};

/// The mirror answers from memory, or after a few calls of the metadata service.
const DEADLINE: Duration = Duration::from_secs(60);
/// A third COMMIT waits until one of two snapshots in flight is durable.
const CHECKPOINT_DEADLINE: Duration = Duration::from_secs(3600);

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: DiskCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    match command {
        DiskCommand::Attach { source, disk, size } => {
            attach(session, &source, &disk, size, output).await
        }
        DiskCommand::Fork { source, disk, count, size } => {
            fork(session, &source, (&disk, count), size, output).await
        }
        DiskCommand::List => list(session, output).await,
        DiskCommand::Info { disk } => info(session, &disk, output).await,
        DiskCommand::Detach { disk, discard_changes } => {
            detach(session, &disk, discard_changes, output).await
        }
        DiskCommand::Checkpoint { disk, wait } => checkpoint(session, &disk, wait, output).await,
        DiskCommand::Rollback { disk, number } => rollback(session, &disk, number, output).await,
    }
}

async fn attach(
    session: &Session,
    source: &ImageSpec,
    disk: &DiskName,
    size: Option<u64>,
    output: Output,
) -> anyhow::Result<()> {
    let mut mirror = session.mirror()?;
    let request = v1::AttachDiskRequest {
        source: Some(snapshot_ref(source)),
        disk: disk.to_string(),
        size_bytes: size.unwrap_or_default(),
    };
    let answer = mirror.client.attach_disk(within(DEADLINE, request)).await;
    let attached = mirror.answer(answer)?;
    output.data(&DiskView::from(attached), |view| format!("{}\n", view.path))
}

async fn fork(
    session: &Session,
    source: &ImageSpec,
    (disk, count): (&DiskName, u32),
    size: Option<u64>,
    output: Output,
) -> anyhow::Result<()> {
    let mut mirror = session.mirror()?;
    let request = v1::ForkDisksRequest {
        source: Some(snapshot_ref(source)),
        disks: (1..=count).map(|number| format!("{disk}-{number}")).collect(),
        size_bytes: size.unwrap_or_default(),
    };
    let answer = mirror.client.fork_disks(within(DEADLINE, request)).await;
    let disks = mirror.answer(answer)?.disks;
    let views: Vec<_> = disks.into_iter().map(DiskView::from).collect();
    output.data(&views, |views| views.iter().map(|view| format!("{}\n", view.path)).collect())
}

/// The disks of the host whose mirror the endpoint leads to.
pub(super) async fn all(session: &Session) -> anyhow::Result<Vec<v1::Disk>> {
    let mut mirror = session.mirror()?;
    let answer = mirror.client.list_disks(within(DEADLINE, v1::ListDisksRequest {})).await;
    Ok(mirror.answer(answer)?.disks)
}

async fn list(session: &Session, output: Output) -> anyhow::Result<()> {
    let views: Vec<_> = all(session).await?.into_iter().map(DiskView::from).collect();
    output.data(&views, |views| disk_table(views))
}

/// Disks as a table.
pub(super) fn disk_table(views: &[DiskView]) -> String {
    let columns = [
        Column::Text("DISK"),
        Column::Text("FROM"),
        Column::Number("SIZE"),
        Column::Number("DIRTY"),
        Column::Text("CHECKPOINTS"),
        Column::Number("STABLE"),
        Column::Number("PENDING"),
        Column::Text("PATH"),
    ];
    table(
        &columns,
        views.iter().map(|view| {
            vec![
                view.disk.clone(),
                format!("{}@{}", view.image, view.snapshot),
                human_size(view.size_bytes),
                human_size(view.dirty_bytes),
                or_dash(view.checkpoint_image.clone()),
                or_dash(view.last_stable),
                view.pending.len().to_string(),
                view.path.clone(),
            ]
        }),
    )
}

async fn get(session: &Session, disk: &DiskName) -> anyhow::Result<DiskView> {
    let mut mirror = session.mirror()?;
    let request = v1::DiskRef { disk: disk.to_string() };
    let answer = mirror.client.get_disk(within(DEADLINE, request)).await;
    Ok(mirror.answer(answer)?.into())
}

/// What reads and writes had to wait for.
fn waited(view: &DiskView) -> String {
    format!("{}, {:.1} s", human_size(view.waited_bytes), view.waited_ms as f64 / 1000.0)
}

/// What was fetched before it was asked for, and how much of it was not asked for.
fn prefetched(view: &DiskView) -> String {
    let unused = view.prefetched_bytes.saturating_sub(view.prefetched_used_bytes);
    format!("{}, {} of it not read yet", human_size(view.prefetched_bytes), human_size(unused))
}

async fn info(session: &Session, disk: &DiskName, output: Output) -> anyhow::Result<()> {
    output.data(&get(session, disk).await?, |view| {
        facts([
            ("disk", view.disk.clone()),
            ("path", view.path.clone()),
            ("attached", format!("{}@{}", view.image, view.snapshot)),
            ("size", human_size(view.size_bytes)),
            ("chunk size", human_size(u64::from(view.chunk_size))),
            ("dirty", human_size(view.dirty_bytes)),
            ("written here", human_size(view.local_bytes)),
            ("checkpoint image", or_dash(view.checkpoint_image.clone())),
            ("last stable", or_dash(view.last_stable)),
            ("pending", view.pending.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")),
            ("stalled", or_dash(view.stalled.clone())),
            ("copied aside", human_size(view.aside_bytes)),
            ("spilled", human_size(view.spill_bytes)),
            ("throttled writes", view.throttled_writes.to_string()),
            ("waited for", waited(view)),
            ("prefetched", prefetched(view)),
            ("attached at", or_dash(view.created_at.clone())),
        ])
    })
}

/// What was detached.
#[derive(Debug, serde::Serialize)]
struct DetachedView {
    disk: String,
    state: &'static str,
}

async fn detach(
    session: &Session,
    disk: &DiskName,
    discard_changes: bool,
    output: Output,
) -> anyhow::Result<()> {
    let mut mirror = session.mirror()?;
    let request = v1::DetachDiskRequest { disk: disk.to_string(), discard_changes };
    let answer = mirror.client.detach_disk(within(DEADLINE, request)).await;
    mirror.answer(answer)?;
    output.data(&DetachedView { disk: disk.to_string(), state: "detached" }, |_| String::new())
}

async fn checkpoint(
    session: &Session,
    disk: &DiskName,
    until_stable: bool,
    output: Output,
) -> anyhow::Result<()> {
    let mut mirror = session.mirror()?;
    let request =
        v1::CheckpointDisksRequest { disks: vec![disk.to_string()], ..Default::default() };
    let answer = mirror.client.checkpoint_disks(within(CHECKPOINT_DEADLINE, request)).await;
    let made = mirror.answer(answer)?.snapshots.pop().context("the mirror made no snapshot")?;
    let mut view = CheckpointView::from(made);
    if until_stable {
        let spec = ImageSpec { image: view.image.parse()?, number: Some(view.snapshot) };
        let repository = session.repository().await?;
        view.settle(wait(session, &repository, &spec, None).await?);
    }
    output.data(&view, |view| {
        format!(
            "{}@{}  {}  {} changed, held for {} µs\n",
            view.image,
            view.snapshot,
            view.state,
            human_size(view.dirty_bytes),
            view.downtime_us
        )
    })
}

async fn rollback(
    session: &Session,
    disk: &DiskName,
    number: Option<u64>,
    output: Output,
) -> anyhow::Result<()> {
    let mut mirror = session.mirror()?;
    let number = number.unwrap_or_default();
    let request = v1::RollbackDiskRequest { disk: disk.to_string(), number };
    let answer = mirror.client.rollback_disk(within(DEADLINE, request)).await;
    let rolled_back = mirror.answer(answer)?;
    output.data(&DiskView::from(rolled_back), |_| String::new())
}
