//! CLONE (algorithm 1 of the paper) and COMMIT (algorithm 2).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blobcr_proto::name::NAME_BYTES_MAX;
use blobcr_proto::v1;
use futures::future::try_join_all;

use super::epochs::{Cut, NoCut};
use super::facts::Answer;
use super::generation::Generation;
use super::shared::{NUMBERS_RESERVED, Shared};
use super::{CheckpointImage, Committed, Disk, DiskError, DiskSpec, KEY_BYTES_MAX, PENDING_MAX};

/// The name of a disk's checkpoint image: the same at every try, and unlike that of any other disk
/// of the same name.
fn checkpoint_name(spec: &DiskSpec) -> String {
    let suffix = format!("-{:08x}", spec.uid >> 96);
    let name = spec.name.as_str();
    // Names are ASCII.
    let kept = name.len().min(NAME_BYTES_MAX - suffix.len());
    format!("{}{suffix}", &name[..kept])
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Shared {
    pub(super) async fn ensure_clone(&self) -> Result<CheckpointImage, DiskError> {
        if let Some(image) = self.checkpoint.get() {
            return Ok(image.clone());
        }
        let _one = self.clone.lock().await;
        if let Some(image) = self.checkpoint.get() {
            return Ok(image.clone());
        }
        self.generation.load().check()?;
        let source = &self.spec.source;
        let reference = v1::SnapshotRef {
            image: Some(v1::ImageRef { name: String::new(), id: source.image_id }),
            number: source.number,
        };
        let name = checkpoint_name(&self.spec);
        let upstream = &self.common.deps.upstream;
        let made = upstream.clone_image(&name, &reference, &self.spec.writer).await;
        let made = made.map_err(|error| self.upstream_error(error))?;
        let image = made.image.unwrap_or_default();
        let first = made.snapshot.map_or(1, |snapshot| snapshot.number);
        let next = image.highest_number.max(first) + 1;
        let pinned = upstream.pin(image.id, first, &self.pin_holder()).await;
        pinned.map_err(|error| self.upstream_error(error))?;
        self.generation.load().check()?;
        let image = CheckpointImage { name: image.name, id: image.id };
        self.state.update(|facts| {
            facts.checkpoint = Some(image.clone());
            facts.reserved_until = next + NUMBERS_RESERVED;
        })?;
        self.reserved_until.store(next + NUMBERS_RESERVED, Ordering::Release);
        let generation = self.generation.load();
        generation.epochs.set_next_number(&generation.map, next);
        let _ = self.checkpoint.set(image.clone());
        Ok(image)
    }

    /// Cuts; the commit lock must be held, and the persister is to be woken afterwards. `None`: two are
    /// pending.
    fn cut(&self, key: &str, since: Instant) -> Result<Option<Committed>, DiskError> {
        let image = self.checkpoint()?;
        let generation = self.generation.load();
        generation.check()?;
        let answer = |cut: Cut| {
            (!key.is_empty()).then(|| Answer {
                key: key.to_owned(),
                number: cut.number,
                dirty_bytes: generation.listed_bytes(cut.listed),
                downtime_ns: nanos(since.elapsed()),
            })
        };
        let reserved = self.reserved_until.load(Ordering::Acquire);
        let cut = match generation.epochs.cut(&generation.map, reserved, answer) {
            Ok(cut) => cut,
            Err(NoCut::Busy) => return Ok(None),
            Err(NoCut::NoNumber) => {
                self.reserve_numbers()?;
                return self.cut(key, since);
            }
        };
        Ok(Some(Committed {
            number: cut.number,
            image: image.name.clone(),
            image_id: image.id,
            dirty_bytes: generation.listed_bytes(cut.listed),
            downtime: since.elapsed(),
        }))
    }

    /// Waits until fewer than two snapshots are pending. With the commit lock held, that stays so.
    async fn slot(&self) -> Result<(), DiskError> {
        let mut changes = self.changes();
        loop {
            changes.borrow_and_update();
            let generation = self.generation.load_full();
            generation.check()?;
            if generation.epochs.pending().len() < PENDING_MAX {
                return Ok(());
            }
            self.persist_now();
            // The sender is in `self`.
            let _ = changes.changed().await;
        }
    }

    /// The answer to an earlier COMMIT with this key.
    fn answer(&self, key: &str) -> Option<Committed> {
        let image = self.checkpoint.get()?;
        let answer = self.generation.load().epochs.facts().answer?;
        (answer.key == key).then(|| Committed {
            number: answer.number,
            image: image.name.clone(),
            image_id: image.id,
            dirty_bytes: answer.dirty_bytes,
            downtime: Duration::from_nanos(answer.downtime_ns),
        })
    }
}

impl Generation {
    /// Bytes of so many listed chunks, of which some may be listed twice.
    pub(super) fn listed_bytes(&self, listed: u64) -> u64 {
        listed.saturating_mul(self.shape.chunk_size.bytes()).min(self.shape.size_bytes)
    }
}

/// Has a snapshot that was just cut persisted, once it is dropped: whoever waits for the COMMIT is to be
/// answered before that takes processors from it.
#[must_use]
#[derive(Debug)]
pub(crate) struct PersistOnDrop(Arc<Shared>);

impl Drop for PersistOnDrop {
    fn drop(&mut self) {
        self.0.persist_soon();
    }
}

impl Disk {
    /// COMMIT (algorithm 2): what the disk holds now becomes a snapshot. Costs the same however
    /// much has changed. `None`: two are being persisted already, another COMMIT is under way, or
    /// the strategy has it take long. A persister that sleeps is not woken before what comes with it is
    /// dropped.
    ///
    /// # Errors
    /// [`DiskError::NotCloned`], and when the host fails.
    pub(crate) fn try_commit_held(&self) -> Result<Option<(Committed, PersistOnDrop)>, DiskError> {
        if self.shared.strategy().holds_writers() {
            return Ok(None);
        }
        let since = Instant::now();
        // Somebody else who commits or rolls back: wait for that with the asynchronous form.
        let Ok(_one) = self.shared.commit.try_lock() else { return Ok(None) };
        let committed = self.shared.cut("", since)?;
        Ok(committed.map(|committed| (committed, PersistOnDrop(Arc::clone(&self.shared)))))
    }

    pub(super) async fn commit_when_possible(&self) -> Result<Committed, DiskError> {
        self.shared.ensure_clone().await?;
        let _one = self.shared.commit.lock().await;
        loop {
            self.shared.slot().await?;
            let since = Instant::now();
            let held = self.shared.hold_writers();
            if let Some(mut committed) = self.shared.cut("", since)? {
                self.shared.persist_soon();
                if held.is_some() {
                    self.shared.before_writers_go_on(committed.number).await?;
                    committed.downtime = since.elapsed();
                }
                return Ok(committed);
            }
        }
    }

    pub(super) async fn commit_behind_barrier(
        disks: &[Arc<Self>],
        key: &str,
    ) -> Result<Vec<Committed>, DiskError> {
        if key.len() > KEY_BYTES_MAX {
            return Err(DiskError::KeyTooLong);
        }
        // In one order whoever calls, so that two calls cannot wait for each other; each disk once.
        let by_uid: BTreeMap<u128, &Arc<Shared>> =
            disks.iter().map(|disk| (disk.shared.spec.uid, &disk.shared)).collect();
        let mut locks = Vec::with_capacity(by_uid.len());
        for disk in by_uid.values() {
            disk.ensure_clone().await?;
            locks.push(disk.commit.lock().await);
        }
        let answers = || disks.iter().map(|disk| disk.shared.answer(key)).collect::<Option<_>>();
        // Only when all disks have it: an answer of some would be of another barrier than ours.
        if let Some(answers) = (!key.is_empty()).then(answers).flatten() {
            return Ok(answers);
        }
        for disk in by_uid.values() {
            disk.slot().await?;
            if disk.wants_numbers() {
                disk.reserve_numbers()?;
            }
        }
        let made = cut_and_hold(&by_uid, key).await?;
        Ok(disks.iter().map(|disk| made[&disk.shared.spec.uid].clone()).collect())
    }
}

/// The barrier, and what the strategy of the disks does behind it.
async fn cut_and_hold(
    disks: &BTreeMap<u128, &Arc<Shared>>,
    key: &str,
) -> Result<BTreeMap<u128, Committed>, DiskError> {
    let since = Instant::now();
    let held: Vec<_> = disks.values().filter_map(|disk| disk.hold_writers()).collect();
    let made = cut_all(disks, key);
    // Not sooner: a persister would take the processor while writes are held up. Those that were cut
    // before an error are persisted, too.
    disks.values().for_each(|disk| disk.persist_soon());
    let mut made = made?;
    if !held.is_empty() {
        let each = disks.iter().map(|(uid, disk)| disk.before_writers_go_on(made[uid].number));
        try_join_all(each).await?;
        drop(held);
        let downtime = since.elapsed();
        made.values_mut().for_each(|committed| committed.downtime = downtime);
    }
    Ok(made)
}

/// The barrier itself: see [`super::gate`].
fn cut_all(
    disks: &BTreeMap<u128, &Arc<Shared>>,
    key: &str,
) -> Result<BTreeMap<u128, Committed>, DiskError> {
    let since = Instant::now();
    let gates: Vec<_> = disks.values().map(|disk| disk.gate.close()).collect();
    let mut made = BTreeMap::new();
    for (uid, disk) in disks {
        let cut = disk.cut(key, since)?;
        made.insert(*uid, cut.expect("a slot was free, and the commit lock keeps it so"));
    }
    drop(gates);
    let downtime = since.elapsed();
    made.values_mut().for_each(|committed| committed.downtime = downtime);
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tests::support::spec;

    #[test]
    fn checkpoint_names_are_names() {
        let mut spec = spec("root", 1 << 20);
        spec.uid = 0xdead_beef << 96 | 7;
        assert_eq!(checkpoint_name(&spec), "root-deadbeef");
        spec.name = blobcr_proto::DiskName::new("n".repeat(NAME_BYTES_MAX)).unwrap();
        assert!(blobcr_proto::ImageName::new(checkpoint_name(&spec)).is_ok());
    }
}
