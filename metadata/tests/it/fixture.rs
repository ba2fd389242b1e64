//! A version manager over a store in memory, with a clock that stands still.

use std::sync::Arc;

use blobcr_metadata::Error;
use blobcr_metadata::clock::testing::{ManualClock, SeededEntropy};
use blobcr_metadata::records::{KeyKind, Record, decode, prefix_of};
use blobcr_metadata::store::memory::MemoryStore;
use blobcr_metadata::store::{MetaStore, PAGE_ENTRIES_MAX};
use blobcr_metadata::version_manager::VersionManager;
use blobcr_proto::v1;

pub(crate) const START_MS: u64 = 1_700_000_000_000;
pub(crate) const TTL_MS: u64 = 10_000;

pub(crate) struct Fixture {
    pub(crate) store: Arc<dyn MetaStore>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) manager: Arc<VersionManager>,
}

impl Fixture {
    /// Over a store in memory, with the pool "default".
    pub(crate) async fn new() -> Self {
        Self::over(Arc::new(MemoryStore::new())).await
    }

    pub(crate) async fn over(store: Arc<dyn MetaStore>) -> Self {
        let clock = Arc::new(ManualClock::new(START_MS));
        let manager = manager(&store, &clock, 1);
        manager.ensure_pool("default", "replica:1").await.unwrap();
        Self { store, clock, manager }
    }

    /// Another process over the same store.
    pub(crate) fn restarted(&self) -> Self {
        let manager = manager(&self.store, &self.clock, 2);
        Self { store: Arc::clone(&self.store), clock: Arc::clone(&self.clock), manager }
    }

    pub(crate) async fn lease(&self) -> u64 {
        let r = v1::AcquireLeaseRequest { holder: "test".to_owned(), ttl_ms: TTL_MS };
        self.manager.acquire_lease(r).await.unwrap().id
    }

    pub(crate) async fn image(&self, name: &str, writer: &str) -> v1::Image {
        self.manager.create_image(create(name, writer)).await.unwrap()
    }

    pub(crate) async fn get(&self, name: &str) -> Result<v1::Image, Error> {
        self.manager.get_image(named(name)).await
    }

    /// An image with stable snapshots 1 to `count`.
    pub(crate) async fn image_with(&self, name: &str, writer: &str, count: u64) -> v1::Image {
        let image = self.image(name, writer).await;
        let lease = self.lease().await;
        for number in 1..=count {
            self.manager.begin_snapshot(begin(image.id, number, lease, writer)).await.unwrap();
            let r = publish(image.id, number, lease, writer, number as u8);
            self.manager.publish_snapshot(r).await.unwrap();
        }
        let r = v1::ReleaseLeaseRequest { lease_id: lease };
        self.manager.release_lease(r).await.unwrap();
        self.get(name).await.unwrap()
    }

    pub(crate) async fn snapshot(&self, name: &str, number: u64) -> Result<v1::Snapshot, Error> {
        self.manager.get_snapshot(at(name, number)).await
    }

    /// All records of a kind, also those that the interface does not show any more.
    pub(crate) async fn records<R: Record>(&self, kind: KeyKind) -> Vec<R> {
        records(&self.store, kind).await
    }
}

pub(crate) async fn records<R: Record>(store: &Arc<dyn MetaStore>, kind: KeyKind) -> Vec<R> {
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let prefix = prefix_of(kind);
        let page = store.list(prefix.as_slice(), after.as_ref(), PAGE_ENTRIES_MAX).await.unwrap();
        all.extend(page.entries.iter().map(|e| decode::<R>(&e.key, &e.value).unwrap()));
        after = page.entries.last().map(|entry| entry.key.clone());
        if !page.more {
            return all;
        }
    }
}

pub(crate) fn manager(
    store: &Arc<dyn MetaStore>,
    clock: &Arc<ManualClock>,
    seed: u64,
) -> Arc<VersionManager> {
    let clock = Arc::clone(clock);
    Arc::new(VersionManager::new(Arc::clone(store), clock, Arc::new(SeededEntropy::new(seed))))
}

pub(crate) fn named(name: &str) -> v1::ImageRef {
    v1::ImageRef { name: name.to_owned(), id: 0 }
}

pub(crate) fn at(name: &str, number: u64) -> v1::SnapshotRef {
    v1::SnapshotRef { image: Some(named(name)), number }
}

pub(crate) fn create(name: &str, writer: &str) -> v1::CreateImageRequest {
    v1::CreateImageRequest {
        name: name.to_owned(),
        pool: "default".to_owned(),
        chunk_size: 0,
        writer: writer.to_owned(),
    }
}

pub(crate) fn clone(source: v1::SnapshotRef, name: &str, writer: &str) -> v1::CloneImageRequest {
    let (name, writer) = (name.to_owned(), writer.to_owned());
    v1::CloneImageRequest { source: Some(source), name, writer }
}

pub(crate) fn begin(
    image_id: u64,
    number: u64,
    lease_id: u64,
    writer: &str,
) -> v1::BeginSnapshotRequest {
    v1::BeginSnapshotRequest { image_id, number, lease_id, writer: writer.to_owned() }
}

pub(crate) fn root(byte: u8) -> v1::TreeRoot {
    let node = vec![byte; 32].into();
    v1::TreeRoot { size_bytes: 1 << 30, chunk_size: 256 << 10, fan_out: 64, node }
}

pub(crate) fn publish(
    image_id: u64,
    number: u64,
    lease_id: u64,
    writer: &str,
    content: u8,
) -> v1::PublishSnapshotRequest {
    v1::PublishSnapshotRequest {
        image_id,
        number,
        lease_id,
        writer: writer.to_owned(),
        root: Some(root(content)),
        stats: Some(v1::SnapshotStats { dirty_chunks: content.into(), ..Default::default() }),
    }
}

pub(crate) fn fail(image_id: u64, number: u64, writer: &str) -> v1::FailSnapshotRequest {
    let (writer, reason) = (writer.to_owned(), "a test".to_owned());
    v1::FailSnapshotRequest { image_id, number, writer, reason }
}

/// What kind of answer it is: everything that a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ok,
    NotFound,
    Exists,
    Invalid,
    Precondition,
    Timeout,
    Other,
}

pub(crate) fn kind<T>(result: &Result<T, Error>) -> Kind {
    match result {
        Ok(_) => Kind::Ok,
        Err(Error::NotFound { .. }) => Kind::NotFound,
        Err(Error::AlreadyExists { .. }) => Kind::Exists,
        Err(Error::Invalid(_)) => Kind::Invalid,
        Err(Error::Precondition { .. }) => Kind::Precondition,
        Err(Error::Timeout { .. }) => Kind::Timeout,
        Err(Error::Contended { .. } | Error::Store(_) | Error::Record(_)) => Kind::Other,
    }
}

/// The answer is an error of this kind, whose message has all these parts.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(
    result: Result<T, Error>,
    expected: Kind,
    parts: &[&str],
) {
    assert_eq!(kind(&result), expected, "{result:?}");
    let message = result.unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}
