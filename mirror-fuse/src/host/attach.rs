//! Attach and fork: writable disks of a snapshot.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::{DiskName, v1};
use tokio::task::spawn_blocking;

use super::{Host, HostError};
use crate::disk::{Disk, DiskSpec, Plan, Source};
use crate::registry::{Served, Taken};

/// Disks of one fork at most: bounds its time and its answer.
const FORKS_MAX: usize = 4096;

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Host {
    /// Makes a writable disk of a snapshot, and its file in the mount. Costs the same for every
    /// size: nothing is fetched.
    ///
    /// # Errors
    /// When the name is bad or taken, the snapshot is not there or not stable, or the size is less
    /// than the snapshot's.
    pub async fn attach(&self, request: v1::AttachDiskRequest) -> Result<v1::Disk, HostError> {
        let v1::AttachDiskRequest { source, disk, size_bytes } = request;
        let mut made = self.make_disks(source, vec![disk], size_bytes).await?;
        Ok(made.pop().unwrap_or_default())
    }

    /// The same for several disks of one snapshot: all of them are made, or none.
    ///
    /// # Errors
    /// As [`Self::attach`], and when a name is there twice, or there are none or too many.
    pub async fn fork(&self, request: v1::ForkDisksRequest) -> Result<Vec<v1::Disk>, HostError> {
        let v1::ForkDisksRequest { source, disks, size_bytes } = request;
        if disks.is_empty() || disks.len() > FORKS_MAX {
            let text = format!("a fork makes 1 to {FORKS_MAX} disks, not {}", disks.len());
            return Err(HostError::Invalid(text));
        }
        self.make_disks(source, disks, size_bytes).await
    }

    async fn make_disks(
        &self,
        source: Option<v1::SnapshotRef>,
        names: Vec<String>,
        size_bytes: u64,
    ) -> Result<Vec<v1::Disk>, HostError> {
        self.check_running()?;
        let names: Vec<DiskName> =
            names.into_iter().map(DiskName::new).collect::<Result<_, _>>()?;
        let places = self.0.disks.reserve_all(&names).map_err(|(name, taken)| match taken {
            Taken::Name => HostError::Exists(name.to_string()),
            Taken::Inode => HostError::Invalid(format!("choose another name than {name}")),
        })?;
        let wanted = source.ok_or_else(|| {
            HostError::Invalid("the snapshot of a new disk must be named".to_owned())
        })?;
        let (image, snapshot) = self.0.repository.snapshot(wanted).await?;
        let specs = names.iter().map(|name| self.spec(name, &image, &snapshot, size_bytes));
        let specs: Vec<DiskSpec> = specs.collect::<Result<_, _>>()?;
        let below = (image.id, snapshot.number);
        let made = match self.pin(&names, below).await {
            Ok(()) => self.create(specs).await,
            Err(error) => Err(error.into()),
        };
        let served = match made {
            Ok(served) => served,
            Err(error) => {
                self.unpin_unmade(&names, below).await;
                return Err(error);
            }
        };
        self.0.disks.serve(places.into_iter().zip(served.iter().map(Arc::clone)));
        for name in &names {
            tracing::info!(disk = %name, image = image.name, snapshot = below.1, "attached");
        }
        Ok(served.iter().map(|served| self.describe(served)).collect())
    }

    async fn create(&self, specs: Vec<DiskSpec>) -> Result<Vec<Arc<Served>>, HostError> {
        let (mut bases, mut plans) = (Vec::new(), Vec::new());
        for spec in specs {
            let (of_disk, deps) = self.deps();
            bases.push(of_disk);
            plans.push(Plan { dir: self.disk_dir(spec.name.as_str()), spec, deps });
        }
        let made = spawn_blocking(move || Disk::create_all(&plans)).await??;
        Ok(made.into_iter().zip(bases).map(|(disk, bases)| self.serve(disk, bases)).collect())
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
}
