//! The shapes that `--json` prints. Sizes in bytes, times in RFC 3339; a field is null, never
//! missing, where there is nothing to say.

use blobcr_proto::{Hash, v1};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// RFC 3339 in UTC; `None` for 0, which stands for "not yet".
#[must_use]
pub fn rfc3339(unix_ms: u64) -> Option<String> {
    let nanos = i128::from(unix_ms).checked_mul(1_000_000).filter(|nanos| *nanos > 0)?;
    OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?.format(&Rfc3339).ok()
}

const fn some_unless_zero(number: u64) -> Option<u64> {
    if number == 0 { None } else { Some(number) }
}

pub(crate) fn some_unless_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// The word for a snapshot's state.
#[must_use]
pub const fn state_word(state: v1::SnapshotState) -> &'static str {
    match state {
        v1::SnapshotState::Pending => "pending",
        v1::SnapshotState::Stable => "stable",
        v1::SnapshotState::Failed => "failed",
        v1::SnapshotState::Obsolete => "obsolete",
        v1::SnapshotState::Unspecified => "unknown",
    }
}

/// Where an image was cloned from.
#[derive(Debug, Serialize)]
pub struct ParentView {
    /// Null once the parent was removed.
    pub image: Option<String>,
    pub snapshot: u64,
}

/// Who needs a snapshot.
#[derive(Debug, Serialize)]
pub struct PinView {
    pub image: String,
    pub snapshot: u64,
    pub holder: String,
    pub created_at: Option<String>,
}

impl From<v1::Pin> for PinView {
    fn from(pin: v1::Pin) -> Self {
        Self {
            image: pin.image,
            snapshot: pin.number,
            holder: pin.holder,
            created_at: rfc3339(pin.created_unix_ms),
        }
    }
}

/// An image.
#[derive(Debug, Serialize)]
pub struct ImageView {
    pub image: String,
    pub id: u64,
    pub pool: String,
    /// Of the newest stable snapshot.
    pub size_bytes: Option<u64>,
    pub chunk_size: u32,
    /// The newest stable snapshot.
    pub latest: Option<u64>,
    pub parent: Option<ParentView>,
    /// The host that alone may add snapshots: that of a checkpoint image.
    pub writer: Option<String>,
    pub created_at: Option<String>,
}

impl ImageView {
    /// `pool` and `parent` are names that the image's record has only as ids.
    #[must_use]
    pub fn new(
        image: v1::Image,
        size_bytes: Option<u64>,
        pool: String,
        parent: Option<String>,
    ) -> Self {
        Self {
            image: image.name,
            id: image.id,
            pool,
            size_bytes,
            chunk_size: image.chunk_size,
            latest: some_unless_zero(image.latest),
            parent: (image.parent_image != 0)
                .then_some(ParentView { image: parent, snapshot: image.parent_snapshot }),
            writer: some_unless_empty(image.writer),
            created_at: rfc3339(image.created_unix_ms),
        }
    }
}

/// A snapshot.
#[derive(Debug, Serialize)]
pub struct SnapshotView {
    pub image: String,
    pub snapshot: u64,
    pub state: &'static str,
    pub size_bytes: Option<u64>,
    pub chunk_size: Option<u32>,
    /// Names the whole content: equal roots are equal disks. Null for an image of zeros.
    pub root: Option<String>,
    pub dirty_chunks: u64,
    pub dirty_bytes: u64,
    pub stored_chunks: u64,
    pub stored_bytes: u64,
    pub zero_chunks: u64,
    pub tree_nodes: u64,
    pub persist_ms: u64,
    /// Why it failed.
    pub reason: Option<String>,
    pub created_at: Option<String>,
    pub stable_at: Option<String>,
}

impl From<v1::Snapshot> for SnapshotView {
    fn from(snapshot: v1::Snapshot) -> Self {
        let state = state_word(snapshot.state());
        let stats = snapshot.stats.unwrap_or_default();
        let root = snapshot.root;
        Self {
            image: snapshot.image,
            snapshot: snapshot.number,
            state,
            size_bytes: root.as_ref().map(|root| root.size_bytes),
            chunk_size: root.as_ref().map(|root| root.chunk_size),
            root: root.and_then(|root| Hash::from_slice(&root.node)).map(|hash| hash.to_string()),
            dirty_chunks: stats.dirty_chunks,
            dirty_bytes: stats.dirty_bytes,
            stored_chunks: stats.stored_chunks,
            stored_bytes: stats.stored_bytes,
            zero_chunks: stats.zero_chunks,
            tree_nodes: stats.tree_nodes,
            persist_ms: stats.persist_ms,
            reason: some_unless_empty(snapshot.reason),
            created_at: rfc3339(snapshot.created_unix_ms),
            stable_at: rfc3339(snapshot.stable_unix_ms),
        }
    }
}

/// An attached disk.
#[derive(Debug, Serialize)]
pub struct DiskView {
    pub disk: String,
    /// As attached.
    pub image: String,
    /// As attached.
    pub snapshot: u64,
    /// Null before the first CHECKPOINT.
    pub checkpoint_image: Option<String>,
    pub path: String,
    pub size_bytes: u64,
    pub chunk_size: u32,
    /// Changed since the last COMMIT.
    pub dirty_bytes: u64,
    /// Kept here because they were written here.
    pub local_bytes: u64,
    /// Snapshots being persisted, oldest first.
    pub pending: Vec<u64>,
    pub last_stable: Option<u64>,
    /// Why persisting makes no progress just now.
    pub stalled: Option<String>,
    pub aside_bytes: u64,
    pub spill_bytes: u64,
    pub throttled_writes: u64,
    /// Of chunks that a read or write had to wait for, since the mirror started.
    pub waited_bytes: u64,
    pub waited_ms: u64,
    /// Fetched before anybody asked, for all disks of the host that lie on the snapshot below this one.
    pub prefetched_bytes: u64,
    /// Of those, what has been read since.
    pub prefetched_used_bytes: u64,
    pub created_at: Option<String>,
}

impl From<v1::Disk> for DiskView {
    fn from(disk: v1::Disk) -> Self {
        Self {
            disk: disk.name,
            image: disk.image,
            snapshot: disk.snapshot,
            checkpoint_image: some_unless_empty(disk.checkpoint_image),
            path: disk.path,
            size_bytes: disk.size_bytes,
            chunk_size: disk.chunk_size,
            dirty_bytes: disk.dirty_bytes,
            local_bytes: disk.local_bytes,
            pending: disk.pending,
            last_stable: some_unless_zero(disk.last_stable),
            stalled: some_unless_empty(disk.stalled),
            aside_bytes: disk.aside_bytes,
            spill_bytes: disk.spill_bytes,
            throttled_writes: disk.throttled_writes,
            waited_bytes: disk.waited_bytes,
            waited_ms: disk.waited_ms,
            prefetched_bytes: disk.prefetched_bytes,
            prefetched_used_bytes: disk.prefetched_used_bytes,
            created_at: rfc3339(disk.created_unix_ms),
        }
    }
}

/// What a CHECKPOINT of a disk gave. Null where only a stable snapshot has it.
#[derive(Debug, Serialize)]
pub struct CheckpointView {
    pub disk: String,
    pub image: String,
    pub snapshot: u64,
    pub state: &'static str,
    pub dirty_bytes: u64,
    /// How long the COMMIT held the disk.
    pub downtime_us: u64,
    pub stored_bytes: Option<u64>,
    pub persist_ms: Option<u64>,
    pub stable_at: Option<String>,
}

impl From<v1::DiskSnapshot> for CheckpointView {
    fn from(made: v1::DiskSnapshot) -> Self {
        Self {
            disk: made.disk,
            image: made.image,
            snapshot: made.number,
            state: state_word(v1::SnapshotState::Pending),
            dirty_bytes: made.dirty_bytes,
            downtime_us: made.downtime_ns.div_ceil(1000),
            stored_bytes: None,
            persist_ms: None,
            stable_at: None,
        }
    }
}

impl CheckpointView {
    /// Adds what is known now that the snapshot is no longer pending.
    pub fn settle(&mut self, snapshot: v1::Snapshot) {
        self.state = state_word(snapshot.state());
        self.stable_at = rfc3339(snapshot.stable_unix_ms);
        self.stored_bytes = snapshot.stats.map(|stats| stats.stored_bytes);
        self.persist_ms = snapshot.stats.map(|stats| stats.persist_ms);
    }
}

/// A VM and its channel.
#[derive(Debug, Serialize)]
pub struct VmView {
    pub vm: String,
    pub disks: Vec<String>,
    pub socket: String,
    pub groups: Vec<String>,
    /// Where it is served over TCP.
    pub address: Option<String>,
    /// Its token, in the answer that made it.
    pub token: Option<String>,
    /// By which it is served over vsock, at the port.
    pub vsock_cid: Option<u32>,
    pub vsock_port: Option<u32>,
    /// What QEMU's command line needs for the channel.
    pub qemu_args: Vec<String>,
    /// The same for a guest that is to reach it by TCP, at 10.0.2.100:7000 and nowhere else.
    pub qemu_forward_args: Vec<String>,
}

/// A pool.
#[derive(Debug, Serialize)]
pub struct PoolView {
    pub pool: String,
    pub id: u32,
    pub policy: String,
    pub compression: String,
    pub partitions: u32,
}

impl From<v1::Pool> for PoolView {
    fn from(pool: v1::Pool) -> Self {
        Self {
            pool: pool.name,
            id: pool.id,
            policy: pool.policy,
            compression: pool.compression,
            partitions: pool.partitions,
        }
    }
}

/// A repository node. What only the node itself knows is null while it cannot be reached.
#[derive(Debug, Serialize)]
pub struct NodeView {
    pub node: String,
    pub address: String,
    pub domain: String,
    /// up, suspected, down, draining or removed: whether it has been heard of, and what is to
    /// become of it.
    pub state: &'static str,
    /// ok, full, poisoned or unreachable: what it says just now.
    pub health: &'static str,
    pub capacity_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
    pub live_bytes: Option<u64>,
    pub segment_bytes: Option<u64>,
    pub records: Option<u64>,
    pub damaged_records: Option<u64>,
    pub recovery_findings: Vec<String>,
    pub registered_at: Option<String>,
    pub last_seen_at: Option<String>,
}

impl NodeView {
    /// `status` is `None` when the node did not answer.
    #[must_use]
    pub fn new(node: v1::Node, status: Option<v1::NodeStatus>) -> Self {
        let state = match node.state() {
            v1::NodeState::Unspecified => "unknown",
            v1::NodeState::Up => "up",
            v1::NodeState::Suspected => "suspected",
            v1::NodeState::Down => "down",
            v1::NodeState::Draining => "draining",
            v1::NodeState::Removed => "removed",
        };
        let health = match &status {
            None => "unreachable",
            Some(status) if status.poisoned => "poisoned",
            Some(status) if status.full => "full",
            Some(_) => "ok",
        };
        let of = |field: fn(&v1::NodeStatus) -> u64| status.as_ref().map(field);
        Self {
            node: node.id,
            address: node.address,
            domain: node.domain,
            state,
            health,
            capacity_bytes: of(|s| s.capacity_bytes),
            free_bytes: of(|s| s.free_bytes),
            live_bytes: of(|s| s.live_bytes),
            segment_bytes: of(|s| s.segment_bytes),
            records: of(|s| s.records),
            damaged_records: of(|s| s.damaged_records),
            registered_at: rfc3339(node.registered_unix_ms),
            last_seen_at: rfc3339(node.last_seen_unix_ms),
            recovery_findings: status.map(|s| s.recovery_findings).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(rfc3339(0), None);
        assert_eq!(rfc3339(1_700_000_000_123).as_deref(), Some("2023-11-14T22:13:20.123Z"));
        assert_eq!(rfc3339(u64::MAX), None);
    }

    #[test]
    fn a_disk_before_its_first_checkpoint_says_null() {
        let json = serde_json::to_value(DiskView::from(v1::Disk {
            name: "d".into(),
            image: "base".into(),
            snapshot: 1,
            ..v1::Disk::default()
        }))
        .unwrap();
        assert_eq!(json["disk"], "d");
        assert!(json["checkpoint_image"].is_null() && json["last_stable"].is_null());
        assert!(json.as_object().unwrap().contains_key("checkpoint_image"));
    }

    #[test]
    fn a_snapshot_has_the_keys_of_the_design() {
        let mut snapshot = v1::Snapshot { image: "i".into(), number: 3, ..v1::Snapshot::default() };
        snapshot.set_state(v1::SnapshotState::Stable);
        let json = serde_json::to_value(SnapshotView::from(snapshot)).unwrap();
        assert_eq!((&json["image"], &json["snapshot"]), (&"i".into(), &3.into()));
        assert_eq!(json["state"], "stable");
    }
}
