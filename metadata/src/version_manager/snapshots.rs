//! Snapshots: begin, publish, fail, wait, remove.

use std::time::Duration;

use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use super::{Held, RecordSwap, VersionManager, check_writer, list_limit, until_won};
use crate::error::Error;
use crate::records::{
    ImageRecord, LeaseWorkRecord, PinRecord, ReadTraceRecord, SNAPSHOT_NUMBER_MAX, SnapshotRecord,
    check_root,
};
use crate::store::{Expect, StoreError, Swap};

/// The longest reason of a failure that is kept, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;

/// The longest wait for a snapshot that one call makes: whoever waits longer calls again.
pub const WAIT_MS_MAX: u64 = 60 * 60 * 1000;

const LIST_SNAPSHOTS: &str = "`blobcr snapshot list` shows what there is";

/// How messages call a snapshot.
pub(super) fn describe(image: &str, number: u64) -> String {
    format!("snapshot {image}@{number}")
}

pub(super) fn describe_id(image_id: u64, number: u64) -> String {
    format!("snapshot {number} of the image with the id {image_id}")
}

/// The state as people call it.
pub(super) fn state_name(snapshot: &SnapshotRecord) -> &'static str {
    match snapshot.state() {
        SnapshotState::Unspecified => "unknown",
        SnapshotState::Pending => "pending",
        SnapshotState::Stable => "stable",
        SnapshotState::Failed => "failed",
        SnapshotState::Obsolete => "obsolete",
    }
}

fn owns(image: &ImageRecord, writer: &str) -> Result<(), Error> {
    if image.writer.is_empty() || image.writer == writer {
        return Ok(());
    }
    Err(Error::precondition(
        format!("image {:?}", image.name),
        "belongs to another writer; clone it and write to the clone",
    ))
}

fn work_of(snapshot: &SnapshotRecord) -> LeaseWorkRecord {
    let SnapshotRecord { image_id, number, lease_id, .. } = *snapshot;
    LeaseWorkRecord { lease_id, image_id, number }
}

impl VersionManager {
    /// Begins a snapshot: from now on its number is taken. A number that the same writer began and
    /// that is still pending is handed out again, under the new lease: the request may be a
    /// repetition, or the writer has come back after a restart. That needs a writer with a name.
    ///
    /// # Errors
    /// [`Error::Precondition`] when the lease is dead, the image belongs to another writer, or the
    /// number is not above every number begun before.
    pub async fn begin_snapshot(&self, r: v1::BeginSnapshotRequest) -> Result<v1::Snapshot, Error> {
        check_writer(&r.writer)?;
        if r.number > SNAPSHOT_NUMBER_MAX {
            return Err(Error::invalid(format!("{} is no snapshot number", r.number)));
        }
        let _turn = self.image_turn(r.image_id).await;
        until_won!(self, describe_id(r.image_id, r.number), self.try_begin(&r).await)
    }

    async fn try_begin(&self, r: &v1::BeginSnapshotRequest) -> Result<v1::Snapshot, Error> {
        let image = self.image_record(&id_ref(r.image_id)).await?;
        owns(&image.value, &r.writer)?;
        let lease = self.live_lease(r.lease_id).await?;
        let highest = image.value.highest_number;
        if r.number != 0 && r.number <= highest {
            return self.try_adopt(r, &image).await;
        }
        let number = if r.number == 0 { highest + 1 } else { r.number };
        let snapshot = SnapshotRecord {
            image_id: r.image_id,
            number,
            state: SnapshotState::Pending.into(),
            created_unix_ms: self.now(),
            writer: r.writer.clone(),
            lease_id: r.lease_id,
            ..SnapshotRecord::default()
        };
        let begun = ImageRecord { highest_number: number, ..image.value.clone() };
        let swap = Swap::new()
            .unchanged(&lease)
            .update(&image, &begun)
            .create(&snapshot)
            .create(&work_of(&snapshot));
        self.store.swap(swap).await?;
        Ok(snapshot.to_wire(&image.value.name))
    }

    /// Hands a pending snapshot to its writer again.
    async fn try_adopt(
        &self,
        r: &v1::BeginSnapshotRequest,
        image: &Held<ImageRecord>,
    ) -> Result<v1::Snapshot, Error> {
        let name = &image.value.name;
        let key = SnapshotRecord::key_of(r.image_id, r.number);
        let refused = || {
            Err(Error::precondition(
                describe(name, r.number),
                format!(
                    "cannot begin: numbers up to {} were begun before; take a higher one",
                    image.value.highest_number
                ),
            ))
        };
        let Some(snapshot) = self.load::<SnapshotRecord>(key).await? else { return refused() };
        let mine = !r.writer.is_empty() && snapshot.value.writer == r.writer;
        if !mine || snapshot.value.state() != SnapshotState::Pending {
            return refused();
        }
        if snapshot.value.lease_id != r.lease_id {
            let adopted = SnapshotRecord { lease_id: r.lease_id, ..snapshot.value.clone() };
            let lease = self.live_lease(r.lease_id).await?;
            let swap = Swap::new()
                .unchanged(&lease)
                .unchanged(image)
                .update(&snapshot, &adopted)
                .clear(&work_of(&snapshot.value))
                .set(&work_of(&adopted));
            self.store.swap(swap).await?;
        }
        Ok(snapshot.value.to_wire(name))
    }

    /// Publishes a snapshot: one swap makes it stable and moves `latest` to it, unless a higher one
    /// was published before. Repeating it with the same root changes nothing.
    ///
    /// # Errors
    /// [`Error::Precondition`] when the snapshot is not pending, the lease is dead, or the writer is
    /// not the one who began it.
    pub async fn publish_snapshot(
        &self,
        r: v1::PublishSnapshotRequest,
    ) -> Result<v1::Snapshot, Error> {
        let root = r.root.as_ref().ok_or_else(|| Error::invalid("a snapshot needs a root"))?;
        check_root(root).map_err(Error::invalid)?;
        let _turn = self.image_turn(r.image_id).await;
        until_won!(self, describe_id(r.image_id, r.number), self.try_publish(&r, root).await)
    }

    async fn try_publish(
        &self,
        r: &v1::PublishSnapshotRequest,
        root: &v1::TreeRoot,
    ) -> Result<v1::Snapshot, Error> {
        let image = self.image_record(&id_ref(r.image_id)).await?;
        let name = &image.value.name;
        let snapshot = self.snapshot_of(&image, r.number).await?;
        let refused = |problem: String| Err(Error::precondition(describe(name, r.number), problem));
        match snapshot.value.state() {
            SnapshotState::Pending => {}
            SnapshotState::Stable if snapshot.value.root.as_ref() == Some(root) => {
                return Ok(snapshot.value.to_wire(name));
            }
            SnapshotState::Stable => {
                return refused("is stable already, with another root; begin a new one".to_owned());
            }
            _ => {
                let state = state_name(&snapshot.value);
                let reason = &snapshot.value.reason;
                return refused(format!("is {state} ({reason}); begin a new one"));
            }
        }
        owns(&image.value, &r.writer)?;
        if snapshot.value.writer != r.writer {
            return refused("was begun by another writer, who alone may publish it".to_owned());
        }
        if root.chunk_size != image.value.chunk_size {
            return Err(Error::invalid(format!(
                "{}: the root has chunks of {} bytes, the image of {}",
                describe(name, r.number),
                root.chunk_size,
                image.value.chunk_size
            )));
        }
        let lease = self.live_lease(r.lease_id).await?;
        let stable = SnapshotRecord {
            state: SnapshotState::Stable.into(),
            root: Some(root.clone()),
            stats: r.stats,
            stable_unix_ms: self.now(),
            ..snapshot.value.clone()
        };
        let swap = Swap::new()
            .unchanged(&lease)
            .update(&snapshot, &stable)
            .clear(&work_of(&snapshot.value));
        let swap = if r.number > image.value.latest {
            swap.update(&image, &ImageRecord { latest: r.number, ..image.value.clone() })
        } else {
            swap.unchanged(&image)
        };
        self.store.swap(swap).await?;
        Ok(stable.to_wire(name))
    }

    /// Gives a pending snapshot up. Whoever began it may; anybody may once its lease is dead.
    /// Nothing happens to one that has failed or is obsolete already.
    ///
    /// # Errors
    /// [`Error::Precondition`] when it is stable, or pending and another's.
    pub async fn fail_snapshot(&self, r: v1::FailSnapshotRequest) -> Result<v1::Snapshot, Error> {
        until_won!(self, describe_id(r.image_id, r.number), self.try_fail(&r).await)
    }

    async fn try_fail(&self, r: &v1::FailSnapshotRequest) -> Result<v1::Snapshot, Error> {
        // Also of an image that was removed: its writer may be tidying up.
        let image = self.load::<ImageRecord>(ImageRecord::key_of(r.image_id)).await?;
        let unknown = || Error::not_found(describe_id(r.image_id, r.number), LIST_SNAPSHOTS);
        let image = image.ok_or_else(unknown)?;
        let name = &image.value.name;
        let snapshot = self.snapshot_of(&image, r.number).await?;
        match snapshot.value.state() {
            SnapshotState::Pending => {}
            SnapshotState::Failed | SnapshotState::Obsolete => {
                return Ok(snapshot.value.to_wire(name));
            }
            SnapshotState::Stable | SnapshotState::Unspecified => {
                let problem = "is stable and cannot fail any more; remove it instead";
                return Err(Error::precondition(describe(name, r.number), problem));
            }
        }
        if snapshot.value.writer != r.writer && self.lease_lives(snapshot.value.lease_id).await? {
            let problem = "is being written by another writer, whose lease is alive";
            return Err(Error::precondition(describe(name, r.number), problem));
        }
        let failed = failed(&snapshot.value, &r.reason);
        let swap = Swap::new().update(&snapshot, &failed).clear(&work_of(&snapshot.value));
        self.store.swap(swap).await?;
        Ok(failed.to_wire(name))
    }

    /// A snapshot; number 0 means the newest stable one.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn get_snapshot(&self, r: v1::SnapshotRef) -> Result<v1::Snapshot, Error> {
        let (image, snapshot) = self.snapshot_record(&r).await?;
        Ok(snapshot.value.to_wire(&image.value.name))
    }

    /// The snapshot that a reference means, and its image.
    pub(super) async fn snapshot_record(
        &self,
        r: &v1::SnapshotRef,
    ) -> Result<(Held<ImageRecord>, Held<SnapshotRecord>), Error> {
        let image = self.image_record(&r.image.clone().unwrap_or_default()).await?;
        let number = match r.number {
            0 if image.value.latest == 0 => {
                let object = format!("stable snapshot of image {:?} yet", image.value.name);
                return Err(Error::not_found(object, "wait for its first one"));
            }
            0 => image.value.latest,
            number => number,
        };
        let snapshot = self.snapshot_of(&image, number).await?;
        Ok((image, snapshot))
    }

    async fn snapshot_of(
        &self,
        image: &Held<ImageRecord>,
        number: u64,
    ) -> Result<Held<SnapshotRecord>, Error> {
        let key = SnapshotRecord::key_of(image.value.id, number);
        let snapshot = self.load::<SnapshotRecord>(key).await?;
        snapshot
            .ok_or_else(|| Error::not_found(describe(&image.value.name, number), LIST_SNAPSHOTS))
    }

    /// Snapshots of an image in order of number, whatever their state, behind `after_number`.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such image.
    pub async fn list_snapshots(
        &self,
        r: v1::ListSnapshotsRequest,
    ) -> Result<v1::ListSnapshotsResponse, Error> {
        let image = self.image_record(&r.image.unwrap_or_default()).await?;
        let prefix = SnapshotRecord::prefix_of(image.value.id);
        let after = SnapshotRecord::key_of(image.value.id, r.after_number);
        let (snapshots, more) =
            self.page::<SnapshotRecord>(&prefix, Some(&after), list_limit(r.limit)).await?;
        let wire = |held: &Held<SnapshotRecord>| held.value.to_wire(&image.value.name);
        Ok(v1::ListSnapshotsResponse { snapshots: snapshots.iter().map(wire).collect(), more })
    }

    /// Returns when the snapshot is no longer pending. A timeout of zero looks once.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it is pending all the time.
    pub async fn wait_snapshot(&self, r: v1::WaitSnapshotRequest) -> Result<v1::Snapshot, Error> {
        let (image, snapshot) = self.snapshot_record(&r.snapshot.unwrap_or_default()).await?;
        let number = snapshot.value.number;
        let waited_ms = r.timeout_ms.min(WAIT_MS_MAX);
        let object = describe(&image.value.name, number);
        let settled = self.settled(&image, number);
        match tokio::time::timeout(Duration::from_millis(waited_ms), settled).await {
            Ok(result) => Ok(result?.to_wire(&image.value.name)),
            Err(_) => Err(Error::Timeout { object, waited_ms }),
        }
    }

    async fn settled(
        &self,
        image: &Held<ImageRecord>,
        number: u64,
    ) -> Result<SnapshotRecord, Error> {
        let key = SnapshotRecord::key_of(image.value.id, number);
        loop {
            // Watch first, so that no change falls between.
            let mut watch = self.store.watch(key.as_slice()).await?;
            loop {
                let snapshot = self.snapshot_of(image, number).await?.value;
                if snapshot.state() != SnapshotState::Pending {
                    return Ok(snapshot);
                }
                match watch.next().await {
                    Ok(_) => {}
                    Err(StoreError::WatchLost) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }

    /// Marks a snapshot obsolete. Nothing happens to one that is.
    ///
    /// # Errors
    /// [`Error::Precondition`] for the latest of its image and for one that is pending or pinned.
    pub async fn remove_snapshot(&self, r: v1::SnapshotRef) -> Result<v1::Snapshot, Error> {
        let number = r.number;
        let _turn = self.generation_turn.lock().await;
        until_won!(self, format!("snapshot {number}"), self.try_remove_snapshot(&r).await)
    }

    async fn try_remove_snapshot(&self, r: &v1::SnapshotRef) -> Result<v1::Snapshot, Error> {
        let (image, snapshot) = self.snapshot_record(r).await?;
        let name = &image.value.name;
        let object = describe(name, snapshot.value.number);
        if snapshot.value.number == image.value.latest {
            let problem = "is the latest of its image; remove the image, or commit a newer one";
            return Err(Error::precondition(object, problem));
        }
        match snapshot.value.state() {
            SnapshotState::Obsolete => return Ok(snapshot.value.to_wire(name)),
            SnapshotState::Pending => {
                let problem = "is being persisted; wait until it is stable or has failed";
                return Err(Error::precondition(object, problem));
            }
            SnapshotState::Stable | SnapshotState::Failed | SnapshotState::Unspecified => {}
        }
        let pins = PinRecord::prefix_of(image.value.id, snapshot.value.number);
        self.check_unpinned(&pins, &object).await?;
        let (generation, swap) = self.newest_generation(Swap::new()).await?;
        let obsolete = obsolete(&snapshot.value, generation);
        let trace = ReadTraceRecord::key_of(image.value.id, snapshot.value.number);
        // Making a pin writes the image's record.
        let swap = swap.unchanged(&image).update(&snapshot, &obsolete).delete(trace, Expect::Any);
        self.store.swap(swap).await?;
        Ok(obsolete.to_wire(name))
    }
}

/// A snapshot as an obsolete one, marked while `generation` was the newest.
pub(super) fn obsolete(snapshot: &SnapshotRecord, generation: u64) -> SnapshotRecord {
    SnapshotRecord {
        state: SnapshotState::Obsolete.into(),
        obsolete_generation: generation,
        ..snapshot.clone()
    }
}

/// A pending snapshot as a failed one.
pub(super) fn failed(snapshot: &SnapshotRecord, reason: &str) -> SnapshotRecord {
    let end =
        (0..=reason.len().min(REASON_BYTES_MAX)).rev().find(|at| reason.is_char_boundary(*at));
    let reason = reason.get(..end.unwrap_or(0)).unwrap_or_default().to_owned();
    SnapshotRecord { state: SnapshotState::Failed.into(), reason, ..snapshot.clone() }
}

pub(super) fn id_ref(id: u64) -> v1::ImageRef {
    v1::ImageRef { name: String::new(), id }
}
