//! What a disk is made of.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::DiskName;
use tokio::runtime::Handle;

use super::budget::Budgets;
use super::io::{FileIo, HostFiles};
use super::strategy::Strategy;
use super::upstreams::{BaseOpener, Source, Upstream};

/// What a disk is; it never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its name on this host.
    pub name: DiskName,
    /// Unlike that of any other disk ever: random.
    pub uid: u128,
    /// The snapshot that it was attached from.
    pub source: Source,
    /// Bytes of the disk: at least those of the source. What is behind the source reads as zeros.
    pub size_bytes: u64,
    /// Names this host's mirror towards the repository; alone may add to the checkpoint image.
    pub writer: String,
    /// When it was attached.
    pub created_unix_ms: u64,
}

/// What a disk works with.
#[derive(Clone)]
pub struct DiskDeps {
    /// Opens the snapshot below the disk.
    pub bases: Arc<dyn BaseOpener>,
    /// The repository.
    pub upstream: Arc<dyn Upstream>,
    /// Room for copies aside, shared by the disks of the host.
    pub budgets: Arc<Budgets>,
    /// The host's file system.
    pub io: Arc<dyn FileIo>,
    /// Names the present run of the host's kernel: another one means that the page cache is gone.
    pub boot_id: String,
    /// Where what a guest waits for is done.
    pub runtime: Handle,
    /// Where the disk's persister runs.
    pub background: Handle,
    /// How a snapshot is kept as it was while the guest writes on.
    pub strategy: Strategy,
    /// How long after a COMMIT the persister wakes, unless somebody waits for the snapshot.
    pub persist_after: Duration,
}

impl std::fmt::Debug for DiskDeps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskDeps").field("boot_id", &self.boot_id).finish_non_exhaustive()
    }
}

impl DiskDeps {
    /// On this host's own file system, kernel and current runtime.
    ///
    /// # Errors
    /// When the kernel does not tell its boot id.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(
        bases: Arc<dyn BaseOpener>,
        upstream: Arc<dyn Upstream>,
        budgets: Arc<Budgets>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            bases,
            upstream,
            budgets,
            io: Arc::new(HostFiles),
            boot_id: std::fs::read_to_string(BOOT_ID)?.trim().to_owned(),
            runtime: Handle::current(),
            background: Handle::current(),
            strategy: Strategy::default(),
            persist_after: Duration::ZERO,
        })
    }
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
