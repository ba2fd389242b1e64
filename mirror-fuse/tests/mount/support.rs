//! A mirror over a repository in memory, mounted in a temporary directory. It is unmounted when it
//! is dropped, by a panic too.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blobcr_mirror_fuse::{Host, HostError, HostOptions};
use blobcr_proto::{ChunkSize, v1};
use blobcr_repository::import::{NewImage, SparseSource, import};
use blobcr_repository::testing::{MemoryCatalog, MemoryPool, memory_repository};
use blobcr_repository::{
    CatalogError, ChunkSource, Identified, LEASE_TTL, LeaseKeeper, PersistLimits, Repository,
    SourceError,
};
use tokio::runtime::Runtime;

/// The smallest chunks: the most borders in the least bytes.
pub(crate) const CHUNK: u64 = ChunkSize::MIN.bytes();

/// A whole disk in memory.
struct Memory(Vec<u8>);

#[async_trait]
impl ChunkSource for Memory {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError> {
        let at = (index * CHUNK) as usize;
        let mut chunk = self.0[at..self.0.len().min(at + CHUNK as usize)].to_vec();
        chunk.resize(CHUNK as usize, 0);
        Ok(Identified::of(chunk.into()))
    }
}

#[async_trait]
impl SparseSource for Memory {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    async fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, SourceError> {
        let chunks = self.size_bytes().div_ceil(CHUNK);
        Ok((from < chunks).then_some(from..chunks))
    }
}

/// Bytes that tell where they are, with every third chunk a hole.
pub(crate) fn pattern(len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..len.div_ceil(8)).flat_map(|word| (word ^ 0x5EED_0000_0000).to_le_bytes()).collect();
    bytes.truncate(len as usize);
    for chunk in bytes.chunks_mut(CHUNK as usize).skip(2).step_by(3) {
        chunk.fill(0);
    }
    bytes
}

/// A repository and a place for a mirror of it.
pub(crate) struct World {
    pub(crate) runtime: Runtime,
    pub(crate) repository: Repository,
    pub(crate) catalog: MemoryCatalog,
    pub(crate) pool: MemoryPool,
    /// Holds the mirror's directory and the mount point.
    pub(crate) dir: Place,
}

/// A temporary directory, or one that belongs to another process.
pub(crate) enum Place {
    Own(tempfile::TempDir),
    Lent(PathBuf),
}

impl Place {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Lent(dir) => dir,
        }
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Other users must be able to reach the mount point.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        Self::on(Place::Own(dir))
    }

    /// In the place of another process's world, with an empty repository of its own.
    pub(crate) fn at(dir: PathBuf) -> Self {
        Self::on(Place::Lent(dir))
    }

    fn on(dir: Place) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (repository, catalog, pool) = memory_repository();
        Self { runtime, repository, catalog, pool, dir }
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    pub(crate) fn options(&self) -> HostOptions {
        let mut options =
            HostOptions::new(self.dir.path().join("mirror"), self.dir.path().join("mnt"));
        options.cache_bytes = 256 << 20;
        options.keep_free_bytes = 0;
        // Others may be let in by root, or where the system's settings say so.
        options.allow_other = rustix::process::geteuid().is_root();
        options
    }

    /// Makes an image whose first snapshot holds `bytes`.
    pub(crate) fn image(&self, name: &str, bytes: Vec<u8>) -> (v1::Image, v1::Snapshot) {
        self.block_on(async {
            let catalog = Arc::clone(self.repository.catalog());
            let lease = LeaseKeeper::start(catalog, "test", LEASE_TTL);
            let image = NewImage {
                name: name.to_owned(),
                chunk_size: ChunkSize::MIN,
                ..NewImage::default()
            };
            let limits = PersistLimits::default();
            import(&self.repository, &lease, &Memory(bytes), image, limits, &|_| {}).await.unwrap()
        })
    }

    /// Waits until a snapshot that was handed out is stable. The repository may hear of it later
    /// than the guest.
    pub(crate) fn wait_stable(&self, image: &str, number: u64) -> v1::Snapshot {
        let image = Some(v1::ImageRef { name: image.to_owned(), id: 0 });
        let snapshot = Some(v1::SnapshotRef { image, number });
        let request = v1::WaitSnapshotRequest { snapshot, timeout_ms: 60_000 };
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let wait = self.repository.catalog().wait_snapshot(request.clone());
            match self.block_on(wait) {
                Err(CatalogError::NotFound(_)) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                waited => {
                    let done = waited.unwrap();
                    assert_eq!(done.state(), v1::SnapshotState::Stable, "{}", done.reason);
                    return done;
                }
            }
        }
    }

    pub(crate) fn start(&self) -> Mirror<'_> {
        self.try_start(self.options()).expect("mounting needs /dev/fuse, and root or fusermount3")
    }

    pub(crate) fn try_start(&self, options: HostOptions) -> Result<Mirror<'_>, HostError> {
        let mount = options.mount.clone();
        let host = self.block_on(Host::start(options, self.repository.clone()))?;
        Ok(Mirror { world: self, host: Some(host), mount })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What a killed mirror left.
        let mount = self.dir.path().join("mnt");
        if matches!(self.dir, Place::Own(_)) && is_mounted(&mount) {
            let _ = std::process::Command::new("umount").arg("-l").arg(&mount).status();
        }
    }
}

/// A running mirror.
pub(crate) struct Mirror<'a> {
    world: &'a World,
    host: Option<Host>,
    pub(crate) mount: PathBuf,
}

impl Mirror<'_> {
    pub(crate) fn host(&self) -> &Host {
        self.host.as_ref().unwrap()
    }

    pub(crate) fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.mount.join(below)
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.world.block_on(future)
    }

    /// Attaches the newest snapshot of an image; the path of the disk's file.
    pub(crate) fn attach(&self, image: &str, disk: &str) -> PathBuf {
        self.try_attach(image, 0, disk, 0).unwrap().path.into()
    }

    pub(crate) fn try_attach(
        &self,
        image: &str,
        number: u64,
        disk: &str,
        size_bytes: u64,
    ) -> Result<v1::Disk, HostError> {
        let image = Some(v1::ImageRef { name: image.to_owned(), id: 0 });
        let source = Some(v1::SnapshotRef { image, number });
        let request = v1::AttachDiskRequest { source, disk: disk.to_owned(), size_bytes };
        self.block_on(self.host().attach(request))
    }

    pub(crate) fn checkpoint(&self, disk: &str) -> v1::DiskSnapshot {
        let disks = [disk.to_owned()];
        let mut made = self.block_on(self.host().checkpoint(&disks, "")).unwrap();
        made.pop().unwrap()
    }

    /// Waits until the repository has made a snapshot stable.
    pub(crate) fn wait_stable(&self, snapshot: &v1::DiskSnapshot) -> v1::Snapshot {
        let stable = self.world.wait_stable(&snapshot.image, snapshot.number);
        // The disk hears of it a moment later.
        eventually("the disk's own word of it", || {
            self.host().get(&snapshot.disk).unwrap().last_stable >= snapshot.number
        });
        stable
    }

    pub(crate) fn stop(mut self) {
        let host = self.host.take().unwrap();
        self.block_on(host.stop()).unwrap();
        assert!(!is_mounted(&self.mount), "stop must unmount");
    }
}

impl Drop for Mirror<'_> {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            let stopped = self.block_on(host.stop());
            if !std::thread::panicking() {
                stopped.unwrap();
            }
        }
        if is_mounted(&self.mount) {
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.mount).status();
        }
    }
}

pub(crate) fn is_mounted(point: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = point.to_str().unwrap();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(point))
}

/// Waits for a condition that something else brings about.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Why a call failed.
pub(crate) fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> rustix::io::Errno {
    let error = result.expect_err("the call must fail");
    rustix::io::Errno::from_io_error(&error).unwrap()
}
