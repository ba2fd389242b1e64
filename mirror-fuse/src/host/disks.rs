//! What is done with the disks of a mirror.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use super::{Host, HostError, lock};
use crate::disk::{Committed, Disk};
use crate::inode;
use crate::registry::{Closed, Entry, Served};

/// How long a disk that is in use may take to be closed, before a caller is refused.
const LAST_CLOSE_WAIT: Duration = Duration::from_millis(500);

impl Host {
    fn served(&self, name: &str) -> Result<Arc<Served>, HostError> {
        match self.0.disks.get(name) {
            Some(Entry::Served(served)) => Ok(served),
            Some(Entry::Broken(why)) => {
                Err(HostError::Precondition(format!("disk {name} could not be opened: {why}")))
            }
            Some(Entry::Reserved) | None => Err(HostError::NoDisk(name.to_owned())),
        }
    }

    fn disk_path(&self, name: &str) -> String {
        let file = self.0.mount_point.join("disks").join(format!("{name}.raw"));
        file.to_string_lossy().into_owned()
    }

    pub(super) fn describe(&self, served: &Served) -> v1::Disk {
        let mut disk = served.disk.status();
        disk.path = self.disk_path(&disk.name);
        if disk.stalled.is_empty() {
            disk.stalled = served.bases.stalled().unwrap_or_default();
        }
        served.bases.describe(&mut disk);
        disk
    }

    /// Removes a disk and what is kept of it on this host. Its snapshots stay in the repository.
    ///
    /// # Errors
    /// When its file is open, or it has changes that are in no stable snapshot (unless they are to
    /// be thrown away).
    pub async fn detach(&self, name: &str, discard_changes: bool) -> Result<(), HostError> {
        self.check_running()?;
        if let Some(Entry::Broken(why)) = self.0.disks.get(name) {
            return self.detach_broken(name, &why, discard_changes).await;
        }
        let served = self.served(name)?;
        let closed = self.close(&served).await?;
        let status = served.disk.status();
        if !discard_changes && (status.dirty_bytes > 0 || !status.pending.is_empty()) {
            return Err(HostError::Precondition(format!(
                "disk {name} has changes that are in no stable snapshot ({} bytes since the last \
                 checkpoint, {} snapshots being persisted); checkpoint it with --wait first, or \
                 throw them away with --discard-changes",
                status.dirty_bytes,
                status.pending.len()
            )));
        }
        let disk = Arc::clone(&served.disk);
        drop(served);
        let (disk_name, pins) = (disk.spec().name.clone(), disk.needed_pins());
        // Nobody attaches a disk of this name while pins are taken away.
        let _place = self.0.disks.retire(&disk_name);
        self.forget_name(name).await;
        disk.remove().await?;
        drop(closed);
        self.unpin(&disk_name, &pins).await;
        tracing::info!(disk = name, "detached");
        Ok(())
    }

    async fn detach_broken(
        &self,
        name: &str,
        why: &str,
        discard_changes: bool,
    ) -> Result<(), HostError> {
        if !discard_changes {
            return Err(HostError::Precondition(format!(
                "disk {name} could not be opened ({why}), so nobody knows what it holds; mend its \
                 files and restart the mirror, or throw it away with --discard-changes"
            )));
        }
        let dir = self.disk_dir(name);
        let path = dir.clone();
        spawn_blocking(move || std::fs::remove_dir_all(dir))
            .await?
            .map_err(|source| HostError::Io { path, source })?;
        self.0.disks.remove(name);
        Ok(())
    }

    /// Keeps everybody from opening the disk. The kernel tells of a last close a moment after it, so
    /// somebody who has just stopped a virtual machine is not refused at once.
    async fn close(&self, served: &Arc<Served>) -> Result<Closed, HostError> {
        let until = Instant::now() + LAST_CLOSE_WAIT;
        loop {
            let released = served.released();
            let open = match served.close() {
                Ok(closed) => return Ok(closed),
                Err(open) => open,
            };
            if timeout_at(until, released).await.is_err() {
                return Err(self.in_use(served.disk.name(), open));
            }
        }
    }

    fn in_use(&self, name: &str, open: u64) -> HostError {
        HostError::Precondition(match open {
            0 => format!("disk {name} is just being changed; try again"),
            open => format!(
                "disk {name} is in use: its file is open {open} times; stop the virtual machine \
                 first (`fuser {}` tells who has it)",
                self.disk_path(name)
            ),
        })
    }

    async fn forget_name(&self, name: &str) {
        let (inner, file) = (Arc::clone(&self.0), format!("{name}.raw"));
        let forgot = spawn_blocking(move || {
            if let Some(mounted) = &*lock(&inner.mounted) {
                mounted.forget(inode::DISKS, &file);
            }
        });
        if let Err(error) = forgot.await {
            tracing::warn!(%error, "the kernel was not told that a disk is gone");
        }
    }

    /// All disks, by name; those that could not be opened too.
    #[must_use]
    pub fn list(&self) -> Vec<v1::Disk> {
        let entries = self.0.disks.all().into_iter();
        let disks = entries.filter_map(|(name, entry)| match entry {
            Entry::Served(served) => Some(self.describe(&served)),
            Entry::Broken(why) => {
                let stalled = format!("could not be opened: {why}");
                Some(v1::Disk { name, stalled, ..v1::Disk::default() })
            }
            Entry::Reserved => None,
        });
        disks.collect()
    }

    /// One disk.
    ///
    /// # Errors
    /// When there is none of this name, or it could not be opened.
    pub fn get(&self, name: &str) -> Result<v1::Disk, HostError> {
        Ok(self.describe(&*self.served(name)?))
    }

    /// CLONE where it is the first, then COMMIT of all the disks behind one barrier. Returns as soon
    /// as their guests may go on. A repeated key returns the first answer.
    ///
    /// # Errors
    /// When there is no such disk, a disk is named twice or none is, or a disk does not do it.
    pub async fn checkpoint(
        &self,
        names: &[String],
        idempotency_key: &str,
    ) -> Result<Vec<v1::DiskSnapshot>, HostError> {
        self.check_running()?;
        let mut disks = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                return Err(HostError::Invalid(format!("disk {name} is named twice")));
            }
            disks.push(Arc::clone(&self.served(name)?.disk));
        }
        if disks.is_empty() {
            return Err(HostError::Invalid("a checkpoint needs at least one disk".to_owned()));
        }
        let committed = Disk::commit_all(&disks, idempotency_key).await?;
        Ok(committed
            .into_iter()
            .zip(names)
            .map(|(commit, name)| snapshot_of(name, commit))
            .collect())
    }

    /// Puts a disk back to a snapshot of its checkpoint image (0: the newest stable one).
    ///
    /// # Errors
    /// When its file is open, or there is no such stable snapshot.
    pub async fn rollback(&self, name: &str, number: u64) -> Result<v1::Disk, HostError> {
        self.check_running()?;
        let served = self.served(name)?;
        let _closed = self.close(&served).await?;
        served.disk.rollback(number).await?;
        served.touch();
        Ok(self.describe(&served))
    }
}

fn snapshot_of(disk: &str, commit: Committed) -> v1::DiskSnapshot {
    v1::DiskSnapshot {
        disk: disk.to_owned(),
        image: commit.image,
        image_id: commit.image_id,
        number: commit.number,
        dirty_bytes: commit.dirty_bytes,
        downtime_ns: u64::try_from(commit.downtime.as_nanos()).unwrap_or(u64::MAX),
    }
}
