//! A whole disk from files that were changed anywhere.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_mirror_fuse::disk::{
    Base, BaseError, BaseOpener, Budgets, Disk, DiskDeps, DiskSpec, HostFiles, Persisted,
    SnapshotKey, Source, Strategy, Upstream, UpstreamError, Work,
};
use blobcr_proto::{ChunkSize, DiskName, v1};
use bytes::Bytes;

use super::seal;
use crate::input::Input;
use crate::{Target, block_on, scratch};

/// Opening a disk: every sector is that of the snapshot or that of the delta, a second start finds
/// the same bytes, and what is written then is kept.
pub const DISK: Target = Target { check: disk, seeds: disk_seeds };

const SECTOR: usize = 4096;
const CHUNK: u64 = ChunkSize::MIN.bytes();
/// The last chunk and the last sector are cut.
const SIZE: u64 = 3 * CHUNK + 9000;
/// What the snapshot is full of, and what was written.
const BASE: u8 = 0xbb;
const WRITTEN: u8 = 0xdd;
/// What is written in the end.
const NEW: u8 = 0x11;
const NAMES: [&str; 5] = ["record", "state", "gen-1/map", "gen-1/journal", "gen-1/delta"];

struct Snapshot;

#[async_trait]
impl Base for Snapshot {
    fn size_bytes(&self) -> u64 {
        SIZE
    }

    fn read_local(&self, _chunk: u64, _within: u64, out: &mut [u8]) -> Result<bool, BaseError> {
        out.fill(BASE);
        Ok(true)
    }

    async fn fetch(&self, _chunk: u64) -> Result<Option<Bytes>, BaseError> {
        Ok(Some(Bytes::from(vec![BASE; ChunkSize::MIN.len()])))
    }

    fn may_have_data(&self, _chunk: u64) -> Option<bool> {
        Some(true)
    }
}

impl BaseOpener for Snapshot {
    fn open(&self, _source: &Source) -> Result<Arc<dyn Base>, BaseError> {
        Ok(Arc::new(Self))
    }
}

/// A repository that is away.
struct Away;

fn away<T>() -> Result<T, UpstreamError> {
    Err(UpstreamError::Unavailable("it is away".to_owned()))
}

#[async_trait]
impl Upstream for Away {
    async fn clone_image(
        &self,
        _name: &str,
        _source: &v1::SnapshotRef,
        _writer: &str,
    ) -> Result<v1::CloneImageResponse, UpstreamError> {
        away()
    }

    async fn begin(&self, _snapshot: &SnapshotKey) -> Result<(), UpstreamError> {
        away()
    }

    async fn persist(
        &self,
        _snapshot: &SnapshotKey,
        _work: Work<'_>,
    ) -> Result<Persisted, UpstreamError> {
        away()
    }

    async fn publish(
        &self,
        _snapshot: &SnapshotKey,
        _persisted: &Persisted,
    ) -> Result<v1::Snapshot, UpstreamError> {
        away()
    }

    async fn fail(&self, _snapshot: &SnapshotKey, _reason: &str) -> Result<(), UpstreamError> {
        away()
    }

    async fn snapshot(&self, _image_id: u64, _number: u64) -> Result<v1::Snapshot, UpstreamError> {
        away()
    }

    async fn pin(&self, _image_id: u64, _number: u64, _holder: &str) -> Result<(), UpstreamError> {
        away()
    }

    async fn unpin(
        &self,
        _image_id: u64,
        _number: u64,
        _holder: &str,
    ) -> Result<(), UpstreamError> {
        away()
    }

    async fn pending(&self, _image_id: u64) -> Result<Vec<u64>, UpstreamError> {
        away()
    }
}

/// Needs a runtime around it.
fn deps(boot_id: &str) -> DiskDeps {
    DiskDeps {
        bases: Arc::new(Snapshot),
        upstream: Arc::new(Away),
        budgets: Budgets::new(4 * CHUNK, 4 * CHUNK),
        io: Arc::new(HostFiles),
        boot_id: boot_id.to_owned(),
        runtime: tokio::runtime::Handle::current(),
        background: tokio::runtime::Handle::current(),
        strategy: Strategy::default(),
        persist_after: Duration::ZERO,
    }
}

type Files = BTreeMap<&'static str, Vec<u8>>;

/// The files of a disk of which some sectors were written and flushed, and then others.
fn template() -> &'static Files {
    static TEMPLATE: OnceLock<Files> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let dir = scratch("template").join("disk");
        let root = v1::TreeRoot {
            size_bytes: SIZE,
            chunk_size: CHUNK as u32,
            fan_out: 64,
            node: vec![7; 32].into(),
        };
        let image = "base".to_owned();
        let spec = DiskSpec {
            name: DiskName::new("disk").expect("a name"),
            uid: 9,
            source: Source { image, image_id: 1, number: 1, pool: 1, root },
            size_bytes: SIZE,
            writer: "host".to_owned(),
            created_unix_ms: 1,
        };
        block_on(async {
            let disk = Disk::create(&dir, spec, deps("boot")).expect("a new disk");
            for offset in [0, CHUNK + 8192, SIZE - 5000] {
                disk.write(offset, vec![WRITTEN; 5000].into()).await.expect("there is room");
                disk.flush().expect("a file system in memory does not fail");
            }
            disk.write(2 * CHUNK, vec![WRITTEN; 4096].into()).await.expect("there is room");
            let read = |name: &'static str| {
                (name, std::fs::read(dir.join(name)).expect("a disk has all files"))
            };
            let files: Files = NAMES.into_iter().map(read).collect();
            disk.shutdown().await.expect("a file system in memory does not fail");
            files
        })
    })
}

fn seal_all(files: &mut Files) {
    for (name, bytes) in files {
        match *name {
            "record" => seal::frame_at(bytes, 0, b"BCDR"),
            "state" => [0, 4096].into_iter().for_each(|at| seal::frame_at(bytes, at, b"BCDS")),
            "gen-1/map" => {
                seal::frame_at(bytes, 0, b"BCDM");
                [4096, 8192].into_iter().for_each(|at| seal::frame_at(bytes, at, b"BCDF"));
            }
            "gen-1/journal" => {
                seal::frame_at(bytes, 0, b"BCDJ");
                seal::batches(bytes, 1, false);
            }
            _ => {}
        }
    }
}

fn disk(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut files = template().clone();
    while !input.is_empty() {
        let (which, at) = (input.u8(), usize::from(input.u16()));
        let bytes = files.entry(NAMES[usize::from(which) % 4]).or_default();
        match which / 4 % 4 {
            0..=1 => {
                let len = usize::from(input.u8() % 64);
                let new = input.take(len);
                let end = bytes.len().min(at + new.len());
                let start = at.min(end);
                bytes[start..end].copy_from_slice(&new[..end - start]);
            }
            2 => bytes.truncate(at),
            _ => bytes.extend(std::iter::repeat_n(0xa5, at % 4096)),
        }
    }
    if flags & 1 != 0 {
        seal_all(&mut files);
    }
    let dir = scratch("disk").join("disk");
    std::fs::create_dir_all(dir.join("gen-1")).expect("the scratch directory can be written");
    for (name, bytes) in &files {
        std::fs::write(dir.join(name), bytes).expect("the scratch directory can be written");
    }
    block_on(opens(&dir, if flags & 2 != 0 { "boot" } else { "another boot" }));
}

async fn content(disk: &Disk) -> Option<Bytes> {
    disk.read(0, usize::try_from(disk.size_bytes()).ok()?).await.ok()
}

async fn opens(dir: &Path, boot: &str) {
    let Ok(disk) = Disk::open(dir, deps(boot)) else { return };
    // A record that was changed may make a disk of terabytes.
    let first = if disk.size_bytes() <= 2 * SIZE { content(&disk).await } else { None };
    let spec = disk.spec().clone();
    for sector in first.iter().flat_map(|bytes| bytes.chunks(SECTOR)) {
        let known = |byte: &u8| [BASE, WRITTEN, 0].contains(byte);
        assert!(sector.iter().all(known), "bytes that were never on the disk");
    }
    disk.shutdown().await.expect("a file system in memory does not fail");
    drop(disk);
    let disk = Disk::open(dir, deps(boot)).expect("what was stopped in order opens");
    assert_eq!(*disk.spec(), spec);
    if first.is_some() {
        assert!(content(&disk).await == first, "a second start finds other bytes");
        disk.write(0, vec![NEW; 100].into()).await.expect("there is room");
        disk.flush().expect("a file system in memory does not fail");
        let read = disk.read(0, 100).await.expect("it was just written");
        assert!(read.iter().all(|byte| *byte == NEW));
    }
    disk.shutdown().await.expect("a file system in memory does not fail");
}

fn disk_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0],
        vec![2],
        vec![3],
        vec![1, 3, 0, 16, 8, 1, 0, 0, 0, 0, 0, 0, 0],
        vec![1, 11, 40, 16],
        vec![3, 2, 0, 64, 16, 2, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 0, 0],
        vec![3, 1, 16, 0, 8, 8, 1, 16, 2, 24, 3, 32, 4],
    ]
}
