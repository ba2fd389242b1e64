//! `blobcr status`: the repository, and the disks of this host.

use blobcr_proto::v1;
use serde::Serialize;

use super::{disk, health, image, node, pool};
use crate::output::{Output, facts, or_dash};
use crate::session::Session;
use crate::size::human_size;
use crate::view::{DiskView, NodeView, PoolView, rfc3339};

/// A snapshot that a disk of this host is persisting.
#[derive(Debug, Serialize)]
struct PendingView {
    image: String,
    snapshot: u64,
    state: &'static str,
    disk: String,
    /// Why it makes no progress just now.
    stalled: Option<String>,
}

#[derive(Debug, Serialize)]
struct StatusView {
    endpoint: String,
    role: String,
    version: String,
    metadata: Vec<String>,
    nodes: Vec<NodeView>,
    pools: Vec<PoolView>,
    images: u64,
    /// Null when the endpoint leads to no mirror.
    disks: Option<Vec<DiskView>>,
    pending_snapshots: Vec<PendingView>,
    capacity_bytes: u64,
    free_bytes: u64,
    live_bytes: u64,
    /// Chunks with fewer good copies than their pool promises, also those that writers reported; null when nodes are down that may
    /// hold the only copies.
    degraded_chunks: Option<u64>,
    /// The progress of a repair; null while there is nothing to repair, or no steward to do it.
    repair: Option<RepairView>,
    /// When a steward was heard of last; null when there is none.
    steward_seen: Option<String>,
}

/// How far a repair is.
#[derive(Debug, Serialize)]
struct RepairView {
    running_seconds: u64,
    partitions_total: u64,
    partitions_done: u64,
    copied_records: u64,
    copied_bytes: u64,
    bytes_per_second: u64,
    /// Null while it cannot be told.
    remaining_seconds: Option<u64>,
    /// Why some of it cannot be done now; null when all can.
    waits_for: Option<String>,
}

impl RepairView {
    fn of(steward: &v1::Steward) -> Option<Self> {
        let repair = steward.repair.as_ref().filter(|_| steward.alive)?;
        (repair.partitions_total > 0).then(|| Self {
            running_seconds: repair.running_ms / 1000,
            partitions_total: repair.partitions_total,
            partitions_done: repair.partitions_done,
            copied_records: repair.copied_records,
            copied_bytes: repair.copied_bytes,
            bytes_per_second: repair.bytes_per_second,
            remaining_seconds: (repair.remaining_ms > 0)
                .then_some(repair.remaining_ms.div_ceil(1000)),
            waits_for: Some(repair.waits_for.clone()).filter(|why| !why.is_empty()),
        })
    }

    fn human(&self) -> String {
        let Self { partitions_done, partitions_total, copied_records, .. } = self;
        let mut text = format!(
            "{partitions_done} of {partitions_total} partitions, {copied_records} records ({}) \
             copied, {} a second",
            human_size(self.copied_bytes),
            human_size(self.bytes_per_second)
        );
        if let Some(seconds) = self.remaining_seconds {
            text += &format!(", done in about {seconds} s");
        }
        if let Some(why) = &self.waits_for {
            text += &format!("; waits for {why}");
        }
        text
    }
}

/// Runs the verb.
///
/// # Errors
/// When a role that is asked does not answer.
pub async fn run(session: &Session, output: Output) -> anyhow::Result<()> {
    let view = gather(session).await?;
    output.data(&view, human)
}

async fn gather(session: &Session) -> anyhow::Result<StatusView> {
    let repository = session.repository().await?;
    let nodes = node::views(&repository).await?;
    let pools = repository.catalog().list_pools(v1::ListPoolsRequest {}).await?.pools;
    let degraded_chunks = health::degraded_chunks(&repository, &nodes, &pools).await?;
    let steward = repository.catalog().get_steward(v1::GetStewardRequest {}).await?;
    let disks = if session.description.mirror.is_empty() {
        None
    } else {
        Some(disk::all(session).await?.into_iter().map(DiskView::from).collect::<Vec<_>>())
    };
    let sum = |field: fn(&NodeView) -> Option<u64>| nodes.iter().filter_map(field).sum();
    Ok(StatusView {
        endpoint: session.address.clone(),
        role: session.description.role.clone(),
        version: session.description.version.clone(),
        metadata: session.description.metadata.clone(),
        images: image::all(&repository).await?.len() as u64,
        pending_snapshots: disks.iter().flatten().flat_map(pending).collect(),
        capacity_bytes: sum(|node| node.capacity_bytes),
        free_bytes: sum(|node| node.free_bytes),
        live_bytes: sum(|node| node.live_bytes),
        degraded_chunks,
        repair: RepairView::of(&steward),
        steward_seen: rfc3339(steward.seen_unix_ms),
        pools: pools.into_iter().map(PoolView::from).collect(),
        nodes,
        disks,
    })
}

fn pending(disk: &DiskView) -> impl Iterator<Item = PendingView> + '_ {
    disk.pending.iter().map(|number| PendingView {
        image: disk.checkpoint_image.clone().unwrap_or_default(),
        snapshot: *number,
        state: "pending",
        disk: disk.disk.clone(),
        stalled: disk.stalled.clone(),
    })
}

fn human(view: &StatusView) -> String {
    let up = view.nodes.iter().filter(|node| node.health != "unreachable").count();
    let mut text = facts([
        ("endpoint", format!("{} ({} {})", view.endpoint, view.role, view.version)),
        ("nodes", format!("{up} of {} up", view.nodes.len())),
        (
            "space",
            format!(
                "{} live, {} free of {}",
                human_size(view.live_bytes),
                human_size(view.free_bytes),
                human_size(view.capacity_bytes)
            ),
        ),
        ("images", view.images.to_string()),
        ("degraded chunks", view.degraded_chunks.map_or("unknown".into(), |n| n.to_string())),
        ("repair", view.repair.as_ref().map_or("nothing to do".into(), RepairView::human)),
        ("pending snapshots", view.pending_snapshots.len().to_string()),
    ]);
    for pending in &view.pending_snapshots {
        let name = format!("{}@{}", pending.image, pending.snapshot);
        text +=
            &format!("  {name} of disk {}: {}\n", pending.disk, or_dash(pending.stalled.clone()));
    }
    text += &format!("\n{}", pool::pool_table(&view.pools));
    text += &format!("\n{}", node::node_table(&view.nodes));
    if let Some(disks) = &view.disks {
        text += &format!("\n{}", disk::disk_table(disks));
    }
    for node in &view.nodes {
        for finding in &node.recovery_findings {
            text += &format!("node {} found at its start: {finding}\n", node.node);
        }
    }
    text
}
