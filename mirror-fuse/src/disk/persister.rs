//! The persister of a disk: makes the pending snapshots durable in the background, one at a time
//! and in order (algorithm 3 of the paper).

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1::{self, SnapshotState};
use futures::FutureExt;

use super::capture::Captures;
use super::facts::Pending;
use super::generation::Generation;
use super::shared::Shared;
use super::upstreams::{Persisted, SnapshotKey, Work};
use super::{CheckpointImage, DiskError, Settled, UpstreamError};

/// The first and the longest pause between two tries of a call that failed for want of a
/// repository. Long enough not to hammer it, short enough that nobody notices once it is back.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(5);

/// Why a snapshot cannot become stable.
struct Failed(String);

impl Failed {
    fn because(error: impl ToString) -> Self {
        Self(error.to_string())
    }
}

/// Runs until it is aborted.
pub(super) async fn run(shared: Arc<Shared>) {
    settle_strays(&shared).await;
    loop {
        shared.may_persist().await;
        let generation = shared.generation.load_full();
        match (generation.epochs.oldest(), shared.checkpoint.get()) {
            (Some(snapshot), Some(image)) => persist(&shared, &generation, image, snapshot).await,
            _ => shared.woken().await,
        }
    }
}

/// Calls until the answer is one that waiting does not change.
async fn retry<T, F: Future<Output = Result<T, UpstreamError>>>(
    shared: &Shared,
    mut call: impl FnMut() -> F,
) -> Result<T, UpstreamError> {
    let mut pause = RETRY_FIRST;
    loop {
        match call().await {
            Err(error) if error.is_transient() => {
                shared.set_stalled(Some(error.to_string()));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_LONGEST);
            }
            answer => {
                shared.set_stalled(None);
                return answer;
            }
        }
    }
}

/// Snapshots that an earlier process began and this one knows nothing of were lost in a host
/// crash, or failed while nobody could be told: they fail now.
async fn settle_strays(shared: &Shared) {
    let Some(image) = shared.checkpoint.get() else { return };
    let upstream = &shared.common.deps.upstream;
    let begun = match retry(shared, || upstream.pending(image.id)).await {
        Ok(begun) => begun,
        Err(error) => {
            tracing::warn!(disk = shared.disk(), %error, "cannot ask for stray snapshots");
            return;
        }
    };
    let known = shared.generation.load().epochs.pending();
    for number in begun {
        if number < shared.first_number && known.iter().all(|snapshot| snapshot.number != number) {
            report_failed(shared, image, number, LOST).await;
        }
    }
    // Nobody else adds to the image: what is newest there is this disk's newest.
    if let Ok(newest) = retry(shared, || upstream.snapshot(image.id, 0)).await {
        let is_own = |facts: &super::state_file::Durable| newest.number > facts.last_stable;
        if newest.number > 1 && is_own(&shared.state.get()) {
            update_state(shared, newest.number);
        }
    }
}

const LOST: &str = "the host or the mirror stopped before it was persisted";

async fn report_failed(shared: &Shared, image: &CheckpointImage, number: u64, reason: &str) {
    let key = shared.key(image, number);
    let upstream = &shared.common.deps.upstream;
    if let Err(error) = retry(shared, || upstream.fail(&key, reason)).await {
        tracing::warn!(disk = shared.disk(), number, %error, "cannot report a failed snapshot");
    }
}

fn update_state(shared: &Shared, last_stable: u64) {
    let updated = shared.state.update(|facts| facts.last_stable = last_stable);
    if let Err(error) = updated {
        // Only what `status` tells after a host crash depends on it, until the repository is asked.
        tracing::warn!(disk = shared.disk(), %error, "cannot record the newest stable snapshot");
    }
}

async fn persist(
    shared: &Arc<Shared>,
    generation: &Arc<Generation>,
    image: &CheckpointImage,
    snapshot: Pending,
) {
    let number = snapshot.number;
    if shared.wants_numbers()
        && let Err(error) = shared.reserve_numbers()
    {
        tracing::warn!(disk = shared.disk(), %error, "cannot reserve snapshot numbers ahead");
    }
    // A fault in here must not end the persister: whoever waits for it would wait for ever.
    let attempt = AssertUnwindSafe(attempt(shared, generation, image, &snapshot)).catch_unwind();
    match attempt.await.unwrap_or_else(|_| Err(Failed::because("the persister panicked"))) {
        Ok(root) => {
            shared.settle(number, Settled::Stable);
            generation.epochs.stable(&generation.map, root);
            generation.drop_asides();
            update_state(shared, number);
            shared.changed();
        }
        Err(Failed(reason)) => {
            tracing::warn!(disk = shared.disk(), number, reason, "snapshot failed");
            shared.settle(number, Settled::Failed { reason: reason.clone() });
            let of_blocking = Arc::clone(generation);
            if shared.common.in_background(move || of_blocking.give_back(&snapshot)).await.is_err()
            {
                // The disk is stopped: the snapshot is as it was, for the next process.
                return std::future::pending().await;
            }
            shared.changed();
            report_failed(shared, image, number, &reason).await;
        }
    }
}

impl Generation {
    /// Makes the changes of a failed snapshot, the oldest pending one, part of the next.
    fn give_back(&self, snapshot: &Pending) -> Result<(), DiskError> {
        let _busy = self.common.busy();
        self.check()?;
        self.uncapture(snapshot, &self.epochs.chunks(snapshot.number));
        self.epochs.failed(&self.map);
        self.drop_asides();
        Ok(())
    }
}

/// Makes one snapshot stable, and returns its root.
async fn attempt(
    shared: &Arc<Shared>,
    generation: &Arc<Generation>,
    image: &CheckpointImage,
    snapshot: &Pending,
) -> Result<v1::TreeRoot, Failed> {
    let key = shared.key(image, snapshot.number);
    let upstream = &shared.common.deps.upstream;
    if snapshot.number < shared.first_number
        && let Some(root) = earlier(shared, generation, &key, snapshot).await?
    {
        return Ok(root);
    }
    retry(shared, || upstream.begin(&key)).await.map_err(Failed::because)?;
    let of_blocking = Arc::clone(generation);
    let number = snapshot.number;
    let sort = move || Ok(of_blocking.epochs.chunks(number));
    let chunks = shared.common.in_background(sort).await.map_err(Failed::because)?;
    let base = generation.epochs.facts().stable_root;
    let of_stalls = Arc::clone(shared);
    let stalled: Arc<dyn Fn(Option<String>) + Send + Sync> =
        Arc::new(move |why| of_stalls.set_stalled(why));
    let captures = Captures::new(Arc::clone(generation), snapshot.clone(), Arc::clone(&stalled));
    let work = Work {
        pool: generation.source.pool,
        base: base.unwrap_or_else(|| generation.source.root.clone()),
        size_bytes: generation.shape.size_bytes,
        chunks,
        source: &captures,
        stalled: &*stalled,
    };
    let persisted = upstream.persist(&key, work).await;
    shared.set_stalled(None);
    let persisted = persisted.map_err(Failed::because)?;
    let root = publish(shared, &key, persisted).await.map_err(Failed::because)?;
    shared.common.shape.check_root(&root).map_err(Failed::because)?;
    Ok(root)
}

async fn publish(
    shared: &Shared,
    key: &SnapshotKey,
    persisted: Persisted,
) -> Result<v1::TreeRoot, UpstreamError> {
    let upstream = &shared.common.deps.upstream;
    let Err(refusal) = retry(shared, || upstream.publish(key, &persisted)).await else {
        return Ok(persisted.root);
    };
    // An earlier try may have done it, and only its answer was lost.
    match retry(shared, || upstream.snapshot(key.image_id, key.number)).await {
        Ok(found) if found.root.as_ref() == Some(&persisted.root) => Ok(persisted.root),
        _ => Err(refusal),
    }
}

/// How far an earlier process got with a snapshot: its root when it is stable, nothing when it is
/// to be persisted now.
async fn earlier(
    shared: &Shared,
    generation: &Generation,
    key: &SnapshotKey,
    snapshot: &Pending,
) -> Result<Option<v1::TreeRoot>, Failed> {
    let upstream = &shared.common.deps.upstream;
    match retry(shared, || upstream.snapshot(key.image_id, key.number)).await {
        Ok(found) => match (found.state(), found.root) {
            (SnapshotState::Stable | SnapshotState::Obsolete, Some(root)) => {
                shared.common.shape.check_root(&root).map_err(Failed::because)?;
                return Ok(Some(root));
            }
            (SnapshotState::Failed, _) => return Err(Failed::because(found.reason)),
            _ => {}
        },
        Err(UpstreamError::NotFound(_)) => {}
        Err(error) => return Err(Failed::because(error)),
    }
    if generation.map.is_broken(snapshot.last) {
        // Some of its bytes were in the memory of the daemon that died. Its number is taken before
        // this process forgets it: when it dies too, the next one finds it among the strays.
        retry(shared, || upstream.begin(key)).await.map_err(Failed::because)?;
        return Err(Failed::because(LOST));
    }
    Ok(None)
}
