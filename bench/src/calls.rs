//! The calls that the commands make, without the start of a process and of its connections.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blobcr_proto::v1;
use blobcr_proto::v1::mirror_client::MirrorClient;
use blobcr_repository::tree::diff;
use blobcr_repository::{ConnectOptions, Repository};
use blobcr_tests::cluster::Cluster;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// A snapshot: its image and its number.
pub type Snapshot<'a> = (&'a str, u64);

/// Snapshots in one page of a listing, as the command asks for them.
const PAGE: u32 = 500;

/// Open connections to the services of a cluster. Each call returns how long it took.
#[derive(Debug)]
pub struct Calls {
    runtime: Runtime,
    mirror: MirrorClient<Channel>,
    repository: Repository,
}

fn snapshot_ref((image, number): Snapshot<'_>) -> v1::SnapshotRef {
    let image = v1::ImageRef { name: image.to_owned(), id: 0 };
    v1::SnapshotRef { image: Some(image), number }
}

impl Calls {
    /// Connects.
    ///
    /// # Errors
    /// When the cluster does not answer.
    pub fn to(cluster: &Cluster) -> anyhow::Result<Self> {
        let runtime = Runtime::new()?;
        let address = cluster.daemon()?.address().to_owned();
        let options = ConnectOptions::default();
        let (mirror, repository) = runtime.block_on(async {
            let channel = blobcr_repository::client::channel(&address, &options)?;
            // All roles of a `blobcr up` are at one address.
            let repository = Repository::connect(&[address], options).await?;
            anyhow::Ok((MirrorClient::new(channel), repository))
        })?;
        Ok(Self { runtime, mirror, repository })
    }

    /// The repository, and what to wait in for it.
    #[must_use]
    pub fn repository(&self) -> (&Runtime, &Repository) {
        (&self.runtime, &self.repository)
    }

    /// `image clone`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn clone_image(&self, source: Snapshot<'_>, name: &str) -> anyhow::Result<Duration> {
        let request = v1::CloneImageRequest {
            source: Some(snapshot_ref(source)),
            name: name.to_owned(),
            writer: String::new(),
        };
        let began = Instant::now();
        self.runtime.block_on(self.repository.catalog().clone_image(request))?;
        Ok(began.elapsed())
    }

    /// `disk attach`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn attach(&self, source: Snapshot<'_>, disk: &str) -> anyhow::Result<Duration> {
        let (source, disk) = (Some(snapshot_ref(source)), disk.to_owned());
        let request = v1::AttachDiskRequest { source, disk, size_bytes: 0 };
        let began = Instant::now();
        self.runtime.block_on(self.mirror.clone().attach_disk(request))?;
        Ok(began.elapsed())
    }

    /// `disk fork`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn fork(&self, source: Snapshot<'_>, disks: Vec<String>) -> anyhow::Result<Duration> {
        let wanted = disks.len();
        let request =
            v1::ForkDisksRequest { source: Some(snapshot_ref(source)), disks, size_bytes: 0 };
        let began = Instant::now();
        let made = self.runtime.block_on(self.mirror.clone().fork_disks(request))?;
        let took = began.elapsed();
        ensure!(made.into_inner().disks.len() == wanted, "not all disks were made");
        Ok(took)
    }

    /// `disk detach --discard-changes`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn detach(&self, disk: &str) -> anyhow::Result<Duration> {
        let request = v1::DetachDiskRequest { disk: disk.to_owned(), discard_changes: true };
        let began = Instant::now();
        self.runtime.block_on(self.mirror.clone().detach_disk(request))?;
        Ok(began.elapsed())
    }

    /// `disk rollback`, to the newest stable snapshot.
    ///
    /// # Errors
    /// When it is refused.
    pub fn rollback(&self, disk: &str) -> anyhow::Result<Duration> {
        let request = v1::RollbackDiskRequest { disk: disk.to_owned(), number: 0 };
        let began = Instant::now();
        self.runtime.block_on(self.mirror.clone().rollback_disk(request))?;
        Ok(began.elapsed())
    }

    /// `disk list`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn list_disks(&self) -> anyhow::Result<Duration> {
        let began = Instant::now();
        self.runtime.block_on(self.mirror.clone().list_disks(v1::ListDisksRequest {}))?;
        Ok(began.elapsed())
    }

    /// The newest snapshots of an image in `snapshot list`: one page.
    ///
    /// # Errors
    /// When it is refused.
    pub fn list_snapshots(&self, (image, newest): Snapshot<'_>) -> anyhow::Result<Duration> {
        let image = Some(v1::ImageRef { name: image.to_owned(), id: 0 });
        let after_number = newest.saturating_sub(u64::from(PAGE));
        let request = v1::ListSnapshotsRequest { image, after_number, limit: PAGE };
        let began = Instant::now();
        let page = self.runtime.block_on(self.repository.catalog().list_snapshots(request))?;
        ensure!(page.snapshots.last().map(|s| s.number) == Some(newest), "snapshots are missing");
        Ok(began.elapsed())
    }

    /// `snapshot diff`: how long it took, and how many chunks differ.
    ///
    /// # Errors
    /// When it is refused.
    pub fn diff(&self, old: Snapshot<'_>, new: Snapshot<'_>) -> anyhow::Result<(Duration, u64)> {
        let began = Instant::now();
        let differ = self.runtime.block_on(async {
            let (image, _, a) = self.repository.open(snapshot_ref(old)).await?;
            let (_, _, b) = self.repository.open(snapshot_ref(new)).await?;
            let nodes = self.repository.nodes(image.pool).await?;
            let mut differ = 0;
            diff(&*nodes, a.root(), b.root(), &mut |_, _, _| differ += 1).await?;
            anyhow::Ok(differ)
        });
        Ok((began.elapsed(), differ.context("diff")?))
    }
}
