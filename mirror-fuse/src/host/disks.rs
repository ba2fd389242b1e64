//! What is done with the disks of a mirror.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::{DiskName, v1};
use tokio::task::spawn_blocking;

use super::{Host, HostError, lock};
use crate::disk::{Committed, Disk, DiskSpec, Source};
use crate::inode;
use crate::registry::{Closed, Entry, Served, Taken};

/// How long a disk that is in use may take to be closed, before a caller is refused.
const LAST_CLOSE_WAIT: Duration = Duration::from_millis(500);
const LAST_CLOSE_POLL: Duration = Duration::from_millis(5);

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

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

    fn describe(&self, served: &Served) -> v1::Disk {
        let mut disk = served.disk.status();
        disk.path = self.disk_path(&disk.name);
        if disk.stalled.is_empty() {
            disk.stalled = served.bases.stalled().unwrap_or_default();
        }
        disk
    }

    /// Makes a writable disk of a snapshot, and its file in the mount. Costs the same for every
    /// size: nothing is fetched.
    ///
    /// # Errors
    /// When the name is bad or taken, the snapshot is not there or not stable, or the size is less
    /// than the snapshot's.
    pub async fn attach(&self, request: v1::AttachDiskRequest) -> Result<v1::Disk, HostError> {
        self.check_running()?;
        let name = DiskName::new(request.disk)?;
        let place = self.0.disks.reserve(&name).map_err(|taken| match taken {
            Taken::Name => HostError::Exists(name.to_string()),
            Taken::Inode => HostError::Invalid(format!("choose another name than {name}")),
        })?;
        let wanted = request.source.ok_or_else(|| {
            HostError::Invalid("an attach request must name a snapshot".to_owned())
        })?;
        let (image, snapshot) = self.0.repository.snapshot(wanted).await?;
        let spec = self.spec(&name, &image, &snapshot, request.size_bytes)?;
        self.pin(&name, (image.id, snapshot.number)).await?;
        let dir = self.disk_dir(name.as_str());
        let (bases, deps) = self.deps();
        let created = spawn_blocking(move || Disk::create(&dir, spec, deps)).await?;
        let disk = match created {
            Ok(disk) => disk,
            Err(error) => {
                self.unpin(&name, &[(image.id, snapshot.number)]).await;
                return Err(error.into());
            }
        };
        let served = self.serve(disk, bases);
        place.serve(Arc::clone(&served));
        tracing::info!(disk = %name, image = image.name, snapshot = snapshot.number, "attached");
        Ok(self.describe(&served))
    }

    fn spec(
        &self,
        name: &DiskName,
        image: &v1::Image,
        snapshot: &v1::Snapshot,
        size_bytes: u64,
    ) -> Result<DiskSpec, HostError> {
        let label = format!("{}@{}", image.name, snapshot.number);
        if snapshot.state() != v1::SnapshotState::Stable {
            let state = snapshot.state().as_str_name().to_lowercase();
            let state = state.trim_start_matches("snapshot_state_");
            return Err(HostError::Precondition(format!(
                "snapshot {label} is {state}; only a stable one can be attached \
                 (`blobcr snapshot list {}` shows them)",
                image.name
            )));
        }
        let root = snapshot.root.clone().ok_or_else(|| {
            HostError::Precondition(format!("snapshot {label} has no tree; verify it"))
        })?;
        let size_bytes = if size_bytes == 0 { root.size_bytes } else { size_bytes };
        if !(root.size_bytes..=IMAGE_SIZE_MAX).contains(&size_bytes) {
            return Err(HostError::Invalid(format!(
                "a disk of {label} has {} to {IMAGE_SIZE_MAX} bytes; {size_bytes} were asked for",
                root.size_bytes
            )));
        }
        Ok(DiskSpec {
            name: name.clone(),
            uid: rand::random(),
            source: Source {
                image: image.name.clone(),
                image_id: image.id,
                number: snapshot.number,
                pool: image.pool,
                root,
            },
            size_bytes,
            writer: self.0.writer.clone(),
            created_unix_ms: unix_ms(),
        })
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
            match served.close() {
                Ok(closed) => return Ok(closed),
                Err(_) if Instant::now() < until => tokio::time::sleep(LAST_CLOSE_POLL).await,
                Err(open) => return Err(self.in_use(served.disk.name(), open)),
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
