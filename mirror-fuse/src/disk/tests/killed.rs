//! A real process that is really killed.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::super::*;
use super::support::{CHUNK, spec};

const CHUNKS: u64 = 16;
const SIZE: u64 = CHUNKS * CHUNK as u64;
const SLOTS: u64 = 64;
const DIRECTORY: &str = "BLOBCR_TEST_KILLED_DIRECTORY";

/// A repository that nobody reaches, but for its first answer.
struct Offline;

#[async_trait]
impl Upstream for Offline {
    async fn clone_image(
        &self,
        name: &str,
        _source: &v1::SnapshotRef,
        _writer: &str,
    ) -> Result<v1::CloneImageResponse, UpstreamError> {
        let image = v1::Image { id: 2, name: name.into(), ..v1::Image::default() };
        let snapshot = v1::Snapshot { number: 1, ..v1::Snapshot::default() };
        Ok(v1::CloneImageResponse { image: Some(image), snapshot: Some(snapshot) })
    }

    async fn begin(&self, _key: &SnapshotKey) -> Result<(), UpstreamError> {
        Err(UpstreamError::Unavailable("offline".into()))
    }

    async fn persist(
        &self,
        _key: &SnapshotKey,
        _work: Work<'_>,
    ) -> Result<Persisted, UpstreamError> {
        Err(UpstreamError::Refused("it was never begun".into()))
    }

    async fn publish(
        &self,
        _key: &SnapshotKey,
        _persisted: &Persisted,
    ) -> Result<v1::Snapshot, UpstreamError> {
        Err(UpstreamError::Refused("it was never begun".into()))
    }

    async fn fail(&self, _key: &SnapshotKey, _reason: &str) -> Result<(), UpstreamError> {
        Err(UpstreamError::Unavailable("offline".into()))
    }

    async fn pin(&self, _image: u64, _number: u64, _holder: &str) -> Result<(), UpstreamError> {
        Ok(())
    }

    async fn unpin(&self, _image: u64, _number: u64, _holder: &str) -> Result<(), UpstreamError> {
        Err(UpstreamError::Unavailable("offline".into()))
    }

    async fn snapshot(&self, _image: u64, _number: u64) -> Result<v1::Snapshot, UpstreamError> {
        Err(UpstreamError::Unavailable("offline".into()))
    }

    async fn pending(&self, _image: u64) -> Result<Vec<u64>, UpstreamError> {
        Err(UpstreamError::Unavailable("offline".into()))
    }
}

/// A snapshot of zeros.
struct Zeros;

#[async_trait]
impl Base for Zeros {
    fn size_bytes(&self) -> u64 {
        SIZE
    }

    fn read_local(&self, _chunk: u64, _within: u64, out: &mut [u8]) -> Result<bool, BaseError> {
        out.fill(0);
        Ok(true)
    }

    async fn fetch(&self, _chunk: u64) -> Result<Option<Bytes>, BaseError> {
        Ok(None)
    }

    fn may_have_data(&self, _chunk: u64) -> Option<bool> {
        Some(false)
    }
}

struct ZeroBases;

impl BaseOpener for ZeroBases {
    fn open(&self, _source: &Source) -> Result<Arc<dyn Base>, BaseError> {
        Ok(Arc::new(Zeros))
    }
}

fn deps() -> DiskDeps {
    DiskDeps::new(Arc::new(ZeroBases), Arc::new(Offline), Budgets::new(16 << 20, 0)).unwrap()
}

fn place(number: u64) -> u64 {
    let slot = number % SLOTS;
    // Odd offsets and lengths, over sector borders.
    slot % CHUNKS * CHUNK as u64 + slot / CHUNKS * 9000 + 300
}

/// What is killed: says what is acknowledged.
#[tokio::test]
#[ignore = "started by the test below"]
async fn child() {
    let Ok(directory) = std::env::var(DIRECTORY) else { return };
    let disk = Disk::create(Path::new(&directory), spec("disk", SIZE), deps()).unwrap();
    disk.ensure_clone().await.unwrap();
    for number in 1u64.. {
        let data = number.to_le_bytes().repeat(1000);
        assert_eq!(disk.try_write(place(number), &data).unwrap(), Attempt::Done);
        println!("\nwrote {number}");
        if number % 500 == 0 && disk.try_commit().unwrap().is_some() {
            println!("\ncommitted {number}");
        }
    }
}

#[tokio::test]
async fn what_a_killed_process_acknowledged_is_there() {
    for life_ms in [1, 30, 150] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg(format!("{}::child", module_path!().split_once("::").unwrap().1))
            .env(DIRECTORY, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut wrote, mut committed) = (0, 0);
        let mut first = None;
        let mut killed = false;
        // Also what is in the pipe after its death was acknowledged before.
        while let Some(Ok(line)) = lines.next() {
            if let Some(number) = line.strip_prefix("wrote ") {
                wrote = number.parse().unwrap();
                first.get_or_insert_with(Instant::now);
            }
            committed += u64::from(line.starts_with("committed "));
            let old = first.is_some_and(|first| first.elapsed() > Duration::from_millis(life_ms));
            if old && !killed {
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed && wrote > 0, "it ran until it was killed");
        let disk = Disk::open(&path, deps()).unwrap();
        let all = disk.all().await;
        for slot in 0..SLOTS {
            let data = &all[place(slot) as usize..][..8000];
            let number = u64::from_le_bytes(data[..8].try_into().unwrap());
            let last = (1..=wrote).rev().take(SLOTS as usize).find(|n| n % SLOTS == slot);
            if number <= wrote {
                assert_eq!(number, last.unwrap_or(0), "slot {slot} of {wrote}");
                assert_eq!(data, number.to_le_bytes().repeat(1000), "slot {slot}");
            } else {
                // The one write that was under way.
                assert_eq!((number, number % SLOTS), (wrote + 1, slot));
            }
        }
        let pending = disk.status().pending.len() as u64;
        assert!(pending >= committed.min(2), "{pending} of {committed}");
    }
}
