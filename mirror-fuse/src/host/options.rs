//! How a mirror is set up.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use crate::base::FetchLimits;
use crate::disk::Strategy;
use crate::prefetch::Prefetch;
use crate::registry::Access;

/// How a mirror is set up.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Where everything of the mirror is kept. One process at a time.
    pub dir: PathBuf,
    /// Where it is mounted: an empty directory.
    pub mount: PathBuf,
    /// Bytes of clean chunks kept on this host at most.
    pub cache_bytes: u64,
    /// Bytes of the host's file system that the cache leaves free for the disks.
    pub keep_free_bytes: u64,
    /// Memory for copies aside of all disks together.
    pub aside_bytes: u64,
    /// Spill files for copies aside of all disks together.
    pub spill_bytes: u64,
    /// How long a read waits for a repository that cannot be reached, before it fails.
    pub repository_wait: Duration,
    /// What is fetched before a guest asks for it.
    pub prefetch: Prefetch,
    /// Bytes a second that are fetched so for all disks together, at most; `None`: no limit.
    pub prefetch_rate: Option<NonZeroU64>,
    /// How a snapshot is kept as it was while the guest writes on.
    pub strategy: Strategy,
    /// Threads that take requests from the kernel.
    pub threads: usize,
    /// For how long a thread that has answered looks out for the next request before it sleeps, while
    /// requests come one by one; zero: not at all.
    pub halt_poll: Duration,
    /// Steps of `nice(1)` by which the threads that persist snapshots are below the others.
    pub persist_nice: u8,
    /// Let other users than this one into the mount. Hypervisors commonly run as another one.
    pub allow_other: bool,
    /// Permissions of a disk's file; `None`: read and write for all who are let into the mount.
    pub disk_mode: Option<u32>,
    /// Owner of the disks' files; `None`: the user of this process.
    pub disk_uid: Option<u32>,
    /// Group of the disks' files; `None`: the group of this process.
    pub disk_gid: Option<u32>,
    /// How long a stop waits for snapshots that are being persisted. Those that are not ready go on
    /// at the next start, as far as they do not need what was in memory only.
    pub settle: Duration,
}

impl HostOptions {
    /// Sensible for a host of a few dozen virtual machines.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, mount: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            mount: mount.into(),
            cache_bytes: 32 << 30,
            keep_free_bytes: 1 << 30,
            aside_bytes: 256 << 20,
            spill_bytes: 4 << 30,
            repository_wait: FetchLimits::default().wait,
            prefetch: Prefetch::default(),
            prefetch_rate: None,
            strategy: Strategy::default(),
            // Measured: two are best at queue depth 1, four at 32.
            halt_poll: Duration::ZERO,
            threads: std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4)),
            persist_nice: 0,
            allow_other: true,
            disk_mode: None,
            disk_uid: None,
            disk_gid: None,
            settle: Duration::from_secs(5),
        }
    }

    pub(super) fn access(&self) -> Access {
        let all = if self.allow_other { 0o666 } else { 0o600 };
        Access {
            mode: self.disk_mode.unwrap_or(all) & 0o777,
            uid: self.disk_uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()),
            gid: self.disk_gid.unwrap_or_else(|| rustix::process::getegid().as_raw()),
        }
    }
}
