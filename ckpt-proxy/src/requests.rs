//! What CHECKPOINT, WaitStable and Status do, whether a guest or a tool of the host asked.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1::{
    AddToSetRequest, CheckpointReply, CheckpointRequest, DiskSnapshot, SetMember, SetMembership,
    Snapshot, SnapshotState, VmStatusReply, WaitStableReply, WaitStableRequest,
};
use blobcr_proto::{DiskName, VmName};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};

use crate::answers::{Answers, Claim, Ticket};
use crate::limits::{CHECKPOINTS_MAX, KEY_BYTES_MAX, Limits, WAITS_MAX};
use crate::lines::Lines;
use crate::records::VmRecord;
use crate::sets;
use crate::upstream::Upstream;

/// How long one call waits for a snapshot that is followed for the log.
const FOLLOW_STEP: Duration = Duration::from_secs(30);
/// The pause before a wait asks again about a snapshot that nobody could tell about yet.
const WAIT_PAUSE: Duration = Duration::from_millis(20);
/// The pause after a call that failed while a snapshot is followed.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);

/// What every request needs, whichever VM it is of.
pub(crate) struct Backend {
    pub(crate) upstream: Upstream,
    pub(crate) limits: Limits,
    /// Everything that runs on behind an answer.
    pub(crate) tasks: TaskTracker,
    pub(crate) stopping: CancellationToken,
}

/// A VM of this host.
pub(crate) struct Vm {
    pub(crate) record: VmRecord,
    answers: Answers,
    waits: Semaphore,
    follows: Arc<Semaphore>,
    pub(crate) begun: sets::Begun,
    lines: Lines,
}

impl Vm {
    pub(crate) fn new(record: VmRecord) -> Self {
        Self {
            record,
            answers: Answers::default(),
            waits: Semaphore::new(WAITS_MAX),
            follows: Arc::new(Semaphore::new(2 * CHECKPOINTS_MAX)),
            begun: sets::Begun::default(),
            lines: Lines::default(),
        }
    }

    pub(crate) fn name(&self) -> &VmName {
        &self.record.name
    }

    /// Whether there may be one more line in the log about what this VM did.
    pub(crate) fn may_log(&self) -> bool {
        self.lines.allow(self.name().as_str())
    }
}

/// Commits all disks of the VM; answers as soon as the guest may go on.
///
/// The work is finished even when whoever asked is gone: it will ask again with the same key.
pub(crate) async fn checkpoint(
    backend: &Arc<Backend>,
    vm: &Arc<Vm>,
    request: CheckpointRequest,
) -> Result<CheckpointReply, Status> {
    let mut set = request.set;
    if let Some(set) = &mut set {
        sets::check_membership(vm, set)?;
    }
    let key = check_key(request.idempotency_key)?;
    let answer = match vm.answers.claim(&key, set.as_ref())? {
        Claim::Repeated(answer) => {
            if vm.may_log() {
                tracing::info!(vm = %vm.name(), key, "a checkpoint was asked for again");
            }
            answer
        }
        Claim::First(ticket, answer) => {
            if vm.may_log() {
                tracing::info!(vm = %vm.name(), key, ?set, "checkpoint requested");
            }
            let work = run(Arc::clone(backend), Arc::clone(vm), key, set, ticket);
            let stopping = backend.stopping.clone();
            backend.tasks.spawn(async move { stopping.run_until_cancelled(work).await });
            answer
        }
    };
    answer.get().await
}

async fn run(
    backend: Arc<Backend>,
    vm: Arc<Vm>,
    key: String,
    set: Option<SetMembership>,
    ticket: Ticket,
) {
    let began = Instant::now();
    let outcome = commit(&backend, &vm, &key, set).await;
    let elapsed_us = began.elapsed().as_micros() as u64;
    match &outcome {
        Ok(reply) => {
            for snapshot in &reply.snapshots {
                tracing::info!(
                    vm = %vm.name(), key, disk = snapshot.disk, image = snapshot.image,
                    number = snapshot.number, dirty_bytes = snapshot.dirty_bytes,
                    downtime_ns = snapshot.downtime_ns, elapsed_us, "checkpoint taken, pending"
                );
            }
            follow(&backend, &vm, &reply.snapshots);
        }
        Err(status) if vm.may_log() => tracing::warn!(
            vm = %vm.name(), key, elapsed_us, code = ?status.code(), error = status.message(),
            "checkpoint failed"
        ),
        Err(_) => {}
    }
    ticket.finish(outcome);
}

async fn commit(
    backend: &Backend,
    vm: &Vm,
    key: &str,
    set: Option<SetMembership>,
) -> Result<CheckpointReply, Status> {
    let unique = format!("{}/{key}", vm.name());
    let snapshots = backend.upstream.checkpoint_disks(&vm.record.disks, &unique).await?;
    let answered = snapshots.iter().map(|s| s.disk.as_str());
    if !answered.eq(vm.record.disks.iter().map(DiskName::as_str)) {
        return Err(Status::internal(format!(
            "the mirror did not answer with one snapshot for each disk of the VM {}, in order",
            vm.name()
        )));
    }
    if let Some(set) = set {
        join_set(backend, vm, set, &snapshots).await?;
    }
    Ok(CheckpointReply { vm: vm.name().to_string(), snapshots })
}

async fn join_set(
    backend: &Backend,
    vm: &Vm,
    set: SetMembership,
    snapshots: &[DiskSnapshot],
) -> Result<(), Status> {
    let member = |snapshot: &DiskSnapshot| SetMember {
        vm: vm.name().to_string(),
        disk: snapshot.disk.clone(),
        image: snapshot.image.clone(),
        number: snapshot.number,
    };
    let request = AddToSetRequest {
        group: set.group,
        sequence: set.sequence,
        expected_vms: set.expected_vms,
        members: snapshots.iter().map(member).collect(),
    };
    let set = backend.upstream.add_to_set(request).await?;
    tracing::info!(
        vm = %vm.name(), group = set.group, sequence = set.sequence, complete = set.complete,
        "joined a checkpoint set"
    );
    Ok(())
}

/// Waits until none of the snapshots is pending. Without any, those of the newest checkpoint.
pub(crate) async fn wait_stable(
    backend: &Backend,
    vm: &Vm,
    request: WaitStableRequest,
) -> Result<WaitStableReply, Status> {
    let Ok(_permit) = vm.waits.try_acquire() else {
        return Err(Status::resource_exhausted(format!(
            "{WAITS_MAX} waits of the VM {} are running; wait for one of them",
            vm.name()
        )));
    };
    let wanted = match request.timeout_ms {
        0 => backend.limits.wait_default,
        ms => Duration::from_millis(ms),
    };
    let until = Instant::now() + wanted.min(backend.limits.wait_max);
    let mut snapshots = Vec::new();
    for wanted in waited_for(backend, vm, &request.snapshots).await? {
        let snapshot = wait_one(backend, &wanted, until).await?;
        tracing::debug!(vm = %vm.name(), ?wanted, state = ?snapshot.state(), "waited for");
        snapshots.push(snapshot);
    }
    Ok(WaitStableReply { snapshots })
}

/// A snapshot of one of the VM's disks.
#[derive(Debug)]
struct Wanted<'a> {
    disk: &'a DiskName,
    image: String,
    number: u64,
}

/// Waits until the snapshot is no longer pending; DEADLINE_EXCEEDED when it still is then.
async fn wait_one(
    backend: &Backend,
    wanted: &Wanted<'_>,
    until: Instant,
) -> Result<Snapshot, Status> {
    let Wanted { disk, image, number } = wanted;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let error = match backend.upstream.wait_snapshot(image, *number, left).await {
            Ok(snapshot) => return Ok(snapshot),
            Err(error) => error,
        };
        match error.code() {
            // The metadata service waits no longer than it likes to at a time.
            Code::DeadlineExceeded => {}
            // The mirror has taken it, and has yet to tell the metadata service.
            Code::NotFound if backend.upstream.disk(disk).await?.pending.contains(number) => {}
            // It may have told just between the two questions.
            Code::NotFound => {
                return backend.upstream.wait_snapshot(image, *number, Duration::ZERO).await;
            }
            _ => return Err(error),
        }
        if Instant::now() >= until {
            return Err(Status::deadline_exceeded(format!("{image}@{number} is still pending")));
        }
        tokio::time::sleep(WAIT_PAUSE.min(until.saturating_duration_since(Instant::now()))).await;
    }
}

/// What is waited for. A VM may ask about the checkpoints of its own disks and no others.
async fn waited_for<'a>(
    backend: &Backend,
    vm: &'a Vm,
    asked: &[DiskSnapshot],
) -> Result<Vec<Wanted<'a>>, Status> {
    if asked.is_empty() {
        let mut newest = Vec::new();
        for name in &vm.record.disks {
            let disk = backend.upstream.disk(name).await?;
            let number = disk.pending.iter().copied().fold(disk.last_stable, u64::max);
            if disk.checkpoint_image.is_empty() || number == 0 {
                return Err(Status::failed_precondition(format!(
                    "the disk {name} of the VM {} has no checkpoint yet",
                    vm.name()
                )));
            }
            newest.push(Wanted { disk: name, image: disk.checkpoint_image, number });
        }
        return Ok(newest);
    }
    if asked.len() > vm.record.disks.len() {
        return Err(Status::invalid_argument(format!(
            "{} snapshots are waited for and the VM {} has {} disks",
            asked.len(),
            vm.name(),
            vm.record.disks.len()
        )));
    }
    let mut wanted = Vec::new();
    for snapshot in asked {
        let own: &DiskName = vm
            .record
            .disks
            .iter()
            .find(|disk| disk.as_str() == snapshot.disk)
            .ok_or_else(|| not_own(vm, snapshot))?;
        let disk = backend.upstream.disk(own).await?;
        if disk.checkpoint_image != snapshot.image || snapshot.image.is_empty() {
            return Err(not_own(vm, snapshot));
        }
        wanted.push(Wanted { disk: own, image: disk.checkpoint_image, number: snapshot.number });
    }
    Ok(wanted)
}

fn not_own(vm: &Vm, snapshot: &DiskSnapshot) -> Status {
    Status::permission_denied(format!(
        "{}@{} of the disk {:?} is no checkpoint of the VM {}",
        snapshot.image,
        snapshot.number,
        snapshot.disk,
        vm.name()
    ))
}

/// The VM's disks as the mirror sees them.
pub(crate) async fn status(backend: &Backend, vm: &Vm) -> Result<VmStatusReply, Status> {
    let mut disks = Vec::new();
    for disk in &vm.record.disks {
        disks.push(backend.upstream.disk(disk).await?);
    }
    let groups = vm.record.groups.iter().map(ToString::to_string).collect();
    Ok(VmStatusReply { vm: vm.name().to_string(), disks, groups })
}

/// Records in the log how the snapshots end, whether or not anybody waits for them.
fn follow(backend: &Arc<Backend>, vm: &Arc<Vm>, snapshots: &[DiskSnapshot]) {
    let Ok(permit) = Arc::clone(&vm.follows).try_acquire_owned() else {
        tracing::debug!(vm = %vm.name(), "too many snapshots are being followed for the log");
        return;
    };
    let (backend, vm, snapshots) = (Arc::clone(backend), Arc::clone(vm), snapshots.to_vec());
    let tasks = backend.tasks.clone();
    tasks.spawn(async move {
        let _permit = permit;
        let stopping = backend.stopping.clone();
        let all = async {
            for (disk, snapshot) in vm.record.disks.iter().zip(snapshots) {
                let (image, number) = (snapshot.image, snapshot.number);
                follow_one(&backend, vm.name(), &Wanted { disk, image, number }).await;
            }
        };
        stopping.run_until_cancelled(all).await
    });
}

async fn follow_one(backend: &Backend, vm: &VmName, wanted: &Wanted<'_>) {
    let Wanted { image, number, .. } = wanted;
    let until = Instant::now() + backend.limits.follow;
    while Instant::now() < until {
        match wait_one(backend, wanted, until.min(Instant::now() + FOLLOW_STEP)).await {
            Ok(found) if found.state() == SnapshotState::Stable => {
                let stats = found.stats.unwrap_or_default();
                tracing::info!(
                    %vm, image, number, stored_bytes = stats.stored_bytes,
                    persist_ms = stats.persist_ms, "checkpoint is stable"
                );
                return;
            }
            Ok(found) if found.state() != SnapshotState::Pending => {
                tracing::warn!(
                    %vm, image, number, state = ?found.state(), reason = found.reason,
                    "checkpoint is lost"
                );
                return;
            }
            Ok(_) => {}
            Err(status) if status.code() == Code::DeadlineExceeded => {}
            Err(status) if status.code() == Code::NotFound => {
                tracing::warn!(%vm, image, number, "checkpoint is gone before it was stable");
                return;
            }
            Err(status) => {
                tracing::debug!(%vm, image, number, error = status.message(), "cannot follow");
                tokio::time::sleep(FOLLOW_PAUSE).await;
            }
        }
    }
    tracing::warn!(%vm, image, number, "checkpoint is still pending; not following it any longer");
}

/// The key as it was given, or a fresh one: then at least this proxy's own retries are harmless.
fn check_key(key: String) -> Result<String, Status> {
    if key.is_empty() {
        return Ok(format!("{:032x}", rand::random::<u128>()));
    }
    if key.len() > KEY_BYTES_MAX || !key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Status::invalid_argument(format!(
            "an idempotency key has at most {KEY_BYTES_MAX} printable ASCII characters"
        )));
    }
    Ok(key)
}
