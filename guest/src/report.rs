//! What the programs print: lines of `KEY=VALUE` for people and scripts, or one JSON value.

use std::time::Duration;

use blobcr_proto::v1::{
    CheckpointReply, Disk, DiskSnapshot, SetState, Snapshot, SnapshotState, VmSet, VmStatusReply,
};
use serde_json::{Value, json};

/// How long the guest spent on a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// On flushing its file systems and disks.
    pub flush: Duration,
    /// Between asking and the answer.
    pub call: Duration,
    /// On waiting until the snapshots are stable, when it did.
    pub wait: Option<Duration>,
}

fn us(time: Duration) -> u64 {
    time.as_micros() as u64
}

/// A state as it is written everywhere.
#[must_use]
pub fn state_name(state: SnapshotState) -> &'static str {
    match state {
        SnapshotState::Unspecified => "unknown",
        SnapshotState::Pending => "pending",
        SnapshotState::Stable => "stable",
        SnapshotState::Failed => "failed",
        SnapshotState::Obsolete => "obsolete",
    }
}

/// The state of a set as it is written everywhere.
#[must_use]
pub fn set_state_name(state: SetState) -> &'static str {
    match state {
        SetState::Unspecified => "unknown",
        SetState::Incomplete => "incomplete",
        SetState::Pending => "pending",
        SetState::Stable => "stable",
        SetState::Failed => "failed",
        SetState::Obsolete => "obsolete",
    }
}

/// A set in a line, which begins as `--set` takes it.
#[must_use]
pub fn set_line(set: &VmSet) -> String {
    format!(
        "{}:{}:{} {} joined_vms={}",
        set.group,
        set.sequence,
        set.expected_vms,
        set_state_name(set.state()),
        set.joined_vms
    )
}

/// A set as one JSON object.
#[must_use]
pub fn set_json(set: &VmSet) -> Value {
    json!({
        "group": set.group,
        "sequence": set.sequence,
        "expected_vms": set.expected_vms,
        "joined_vms": set.joined_vms,
        "state": set_state_name(set.state()),
    })
}

/// One line for each disk of a checkpoint, beginning with `IMAGE@N`.
#[must_use]
pub fn checkpoint_lines(reply: &CheckpointReply, spent: Spent) -> Vec<String> {
    let line = |s: &DiskSnapshot| {
        format!(
            "{}@{} disk={} downtime_us={} dirty_bytes={} elapsed_us={} flush_us={}",
            s.image,
            s.number,
            s.disk,
            s.downtime_ns.div_ceil(1000),
            s.dirty_bytes,
            us(spent.call),
            us(spent.flush)
        )
    };
    reply.snapshots.iter().map(line).collect()
}

/// One line for each snapshot that was waited for.
#[must_use]
pub fn stable_lines(snapshots: &[Snapshot], waited: Duration) -> Vec<String> {
    let line = |s: &Snapshot| {
        let stats = s.stats.unwrap_or_default();
        format!(
            "{}@{} {} stored_bytes={} persist_ms={} waited_us={}",
            s.image,
            s.number,
            state_name(s.state()),
            stats.stored_bytes,
            stats.persist_ms,
            us(waited)
        )
    };
    snapshots.iter().map(line).collect()
}

/// One line for each disk of the VM.
#[must_use]
pub fn status_lines(status: &VmStatusReply) -> Vec<String> {
    let line = |d: &Disk| {
        let checkpoint_image = match d.checkpoint_image.as_str() {
            "" => "-",
            image => image,
        };
        let pending: Vec<String> = d.pending.iter().map(u64::to_string).collect();
        format!(
            "{} image={}@{} checkpoint_image={checkpoint_image} size_bytes={} dirty_bytes={} \
             last_stable={} pending={}{}",
            d.name,
            d.image,
            d.snapshot,
            d.size_bytes,
            d.dirty_bytes,
            d.last_stable,
            if pending.is_empty() { "-".to_owned() } else { pending.join(",") },
            if d.stalled.is_empty() { String::new() } else { format!(" stalled={:?}", d.stalled) }
        )
    };
    status.disks.iter().map(line).collect()
}

/// A checkpoint as one JSON object; `stable` is what a wait found.
#[must_use]
pub fn checkpoint_json(
    reply: &CheckpointReply,
    stable: Option<&[Snapshot]>,
    key: &str,
    spent: Spent,
) -> Value {
    let snapshot = |s: &DiskSnapshot| {
        let waited =
            stable.and_then(|all| all.iter().find(|w| w.image == s.image && w.number == s.number));
        json!({
            "disk": s.disk,
            "image": s.image,
            "snapshot": s.number,
            "state": state_name(waited.map_or(SnapshotState::Pending, Snapshot::state)),
            "dirty_bytes": s.dirty_bytes,
            "downtime_ns": s.downtime_ns,
        })
    };
    json!({
        "vm": reply.vm,
        "key": key,
        "snapshots": reply.snapshots.iter().map(snapshot).collect::<Vec<_>>(),
        "flush_us": us(spent.flush),
        "elapsed_us": us(spent.call),
        "wait_us": spent.wait.map(us),
    })
}

/// Snapshots as a JSON array.
#[must_use]
pub fn stable_json(snapshots: &[Snapshot]) -> Value {
    let snapshot = |s: &Snapshot| {
        let stats = s.stats.unwrap_or_default();
        json!({
            "image": s.image,
            "snapshot": s.number,
            "state": state_name(s.state()),
            "dirty_bytes": stats.dirty_bytes,
            "stored_bytes": stats.stored_bytes,
            "persist_ms": stats.persist_ms,
        })
    };
    Value::Array(snapshots.iter().map(snapshot).collect())
}

/// The VM's disks as one JSON object.
#[must_use]
pub fn status_json(status: &VmStatusReply) -> Value {
    let disk = |d: &Disk| {
        json!({
            "disk": d.name,
            "image": d.image,
            "snapshot": d.snapshot,
            "checkpoint_image":
                if d.checkpoint_image.is_empty() { Value::Null } else { json!(d.checkpoint_image) },
            "size_bytes": d.size_bytes,
            "dirty_bytes": d.dirty_bytes,
            "last_stable": d.last_stable,
            "pending": d.pending,
            "stalled": d.stalled,
        })
    };
    json!({
        "vm": status.vm,
        "disks": status.disks.iter().map(disk).collect::<Vec<_>>(),
        "groups": status.groups,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> CheckpointReply {
        let snapshot = DiskSnapshot {
            disk: "d0".into(),
            image: "d0-ckpt".into(),
            image_id: 4,
            number: 3,
            dirty_bytes: 4096,
            downtime_ns: 1500,
        };
        CheckpointReply { vm: "web".into(), snapshots: vec![snapshot] }
    }

    const SPENT: Spent = Spent {
        flush: Duration::from_micros(7),
        call: Duration::from_micros(90),
        wait: Some(Duration::from_millis(2)),
    };

    #[test]
    fn a_checkpoint_in_lines_and_json() {
        assert_eq!(
            checkpoint_lines(&reply(), SPENT),
            ["d0-ckpt@3 disk=d0 downtime_us=2 dirty_bytes=4096 elapsed_us=90 flush_us=7"]
        );
        let value = checkpoint_json(&reply(), None, "k", SPENT);
        assert_eq!(value["snapshots"][0]["state"], "pending");
        assert_eq!(value["elapsed_us"], 90);
        let mut stable = Snapshot { image: "d0-ckpt".into(), number: 3, ..Default::default() };
        stable.set_state(SnapshotState::Stable);
        let value = checkpoint_json(&reply(), Some(&[stable]), "k", SPENT);
        assert_eq!(value["snapshots"][0]["state"], "stable");
    }

    #[test]
    fn a_disk_without_a_checkpoint_has_none() {
        let disk =
            Disk { name: "d0".into(), image: "debian".into(), snapshot: 1, ..Disk::default() };
        let status =
            VmStatusReply { vm: "web".into(), disks: vec![disk], groups: vec!["mpi".into()] };
        assert_eq!(status_json(&status)["disks"][0]["checkpoint_image"], Value::Null);
        assert!(status_lines(&status)[0].contains("checkpoint_image=- "));
        assert_eq!(status_json(&status)["groups"], json!(["mpi"]));
    }

    #[test]
    fn a_set_in_a_line_and_json() {
        let mut set = VmSet {
            group: "mpi".into(),
            sequence: 12,
            expected_vms: 4,
            joined_vms: 3,
            ..VmSet::default()
        };
        set.set_state(SetState::Incomplete);
        assert_eq!(set_line(&set), "mpi:12:4 incomplete joined_vms=3");
        assert_eq!(set_json(&set)["state"], "incomplete");
    }
}
