//! Stand-ins for the world around a disk: a repository whose steps a test can hold, an attached
//! snapshot, and a file system that knows what a power failure would leave.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::MutexGuard;

use async_trait::async_trait;
use blobcr_proto::{ChunkSize, DiskName, Hash};
use blobcr_repository::Identified;
use tokio::sync::Semaphore;

use super::super::*;
use v1::SnapshotState;

pub(crate) const CHUNK: usize = 64 << 10;

/// Bytes of a snapshot: chunks that are not there are zeros.
pub(crate) type Content = BTreeMap<u64, Bytes>;

pub(crate) fn content_of(bytes: &[u8]) -> Content {
    let mut content = Content::new();
    for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            let mut whole = chunk.to_vec();
            whole.resize(CHUNK, 0);
            content.insert(index as u64, whole.into());
        }
    }
    content
}

pub(crate) fn bytes_of(content: &Content, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; (size as usize).next_multiple_of(CHUNK)];
    for (index, chunk) in content {
        bytes[*index as usize * CHUNK..][..CHUNK].copy_from_slice(chunk);
    }
    bytes.truncate(size as usize);
    bytes
}

#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) state: SnapshotState,
    pub(crate) root: Option<v1::TreeRoot>,
    pub(crate) reason: String,
    pub(crate) dirty_chunks: u64,
}

#[derive(Debug, Default)]
struct Image {
    name: String,
    writer: String,
    snapshots: BTreeMap<u64, Record>,
}

#[derive(Debug, Default)]
struct Repo {
    images: BTreeMap<u64, Image>,
    trees: HashMap<Vec<u8>, Arc<Content>>,
    /// By image, snapshot and holder.
    pins: BTreeSet<(u64, u64, String)>,
    /// Chunks of the attached snapshot that are on this host.
    local: HashSet<(u64, u64)>,
    /// Calls that fail next, by name: whether for good.
    failures: HashMap<&'static str, Vec<Failure>>,
    calls: HashMap<&'static str, u64>,
    fetches: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    Transient,
    Permanent,
    /// It is done, but the answer is lost.
    AnswerLost,
    Panic,
}

/// The repository, as a double of [`Upstream`] and [`BaseOpener`].
#[derive(Debug)]
pub(crate) struct World {
    repo: Mutex<Repo>,
    /// Steps that the persister may take while it is held.
    steps: Semaphore,
    held: std::sync::atomic::AtomicBool,
    /// Somebody waits for a step.
    pub(crate) waiting: std::sync::atomic::AtomicUsize,
    taken: std::sync::atomic::AtomicUsize,
    jitter_us: std::sync::atomic::AtomicUsize,
}

impl World {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            repo: Mutex::default(),
            steps: Semaphore::new(0),
            held: false.into(),
            waiting: 0.into(),
            taken: 0.into(),
            jitter_us: 0.into(),
        })
    }

    fn repo(&self) -> MutexGuard<'_, Repo> {
        self.repo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a stable image; returns what a disk is attached from.
    pub(crate) fn image(&self, name: &str, bytes: &[u8]) -> Source {
        let mut repo = self.repo();
        let root = repo.store(content_of(bytes), bytes.len() as u64);
        let image_id = repo.images.len() as u64 + 1;
        let mut image = Image { name: name.into(), ..Image::default() };
        let record = Record {
            state: SnapshotState::Stable,
            root: Some(root.clone()),
            reason: String::new(),
            dirty_chunks: 0,
        };
        image.snapshots.insert(1, record);
        repo.images.insert(image_id, image);
        Source { image: name.into(), image_id, number: 1, pool: 1, root }
    }

    /// From now on the persister takes steps only as it is given them.
    pub(crate) fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.steps.add_permits(1_000_000);
    }

    /// Lets a held persister take one step.
    pub(crate) fn permit(&self) {
        self.steps.add_permits(1);
    }

    /// Makes every step take up to so long.
    pub(crate) fn set_jitter(&self, most: Duration) {
        self.jitter_us.store(most.as_micros() as usize, Ordering::SeqCst);
    }

    async fn step(&self) {
        let jitter = self.jitter_us.load(Ordering::SeqCst);
        if jitter > 0 {
            let some = rand::random_range(0..jitter as u64);
            tokio::time::sleep(Duration::from_micros(some)).await;
        }
        if !self.held.load(Ordering::SeqCst) {
            return;
        }
        struct Waits<'a>(&'a World);
        impl Drop for Waits<'_> {
            fn drop(&mut self) {
                self.0.waiting.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let permit = {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let _waits = Waits(self);
            self.steps.acquire().await.unwrap()
        };
        if self.held.load(Ordering::SeqCst) {
            permit.forget();
        }
        self.taken.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets somebody who waits take one step, and waits until it is taken.
    pub(crate) async fn take_step(&self) {
        let before = self.taken.load(Ordering::SeqCst);
        self.permit();
        while self.taken.load(Ordering::SeqCst) == before {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn fail_next(&self, call: &'static str, failure: Failure) {
        self.repo().failures.entry(call).or_default().push(failure);
    }

    pub(crate) fn forget_failures(&self) {
        self.repo().failures.clear();
    }

    pub(crate) fn calls(&self, call: &'static str) -> u64 {
        self.repo().calls.get(call).copied().unwrap_or(0)
    }

    pub(crate) fn fetches(&self) -> u64 {
        self.repo().fetches
    }

    fn enter(&self, call: &'static str) -> Result<Option<Failure>, UpstreamError> {
        let mut repo = self.repo();
        *repo.calls.entry(call).or_default() += 1;
        let planned = repo.failures.get_mut(call).filter(|plan| !plan.is_empty());
        match planned.map(|plan| plan.remove(0)) {
            Some(Failure::Transient) => Err(UpstreamError::Unavailable("planned".into())),
            Some(Failure::Permanent) => Err(UpstreamError::Refused("planned".into())),
            Some(Failure::Panic) => {
                drop(repo);
                panic!("planned")
            }
            other => Ok(other),
        }
    }

    pub(crate) fn record(&self, image: u64, number: u64) -> Option<Record> {
        self.repo().images[&image].snapshots.get(&number).cloned()
    }

    pub(crate) fn records(&self, image: u64) -> BTreeMap<u64, Record> {
        self.repo().images[&image].snapshots.clone()
    }

    /// The bytes of a stable snapshot.
    pub(crate) fn bytes(&self, image: u64, number: u64) -> Vec<u8> {
        let repo = self.repo();
        let root = repo.images[&image].snapshots[&number].root.clone().unwrap();
        bytes_of(&repo.trees[&root.node.to_vec()], root.size_bytes)
    }

    /// What is pinned, by image and snapshot.
    pub(crate) fn pins(&self) -> Vec<(u64, u64)> {
        self.repo().pins.iter().map(|(image, number, _)| (*image, *number)).collect()
    }

    /// Drops the host's copies of the attached snapshots' chunks.
    pub(crate) fn evict(&self) {
        self.repo().local.clear();
    }
}

impl Repo {
    fn store(&mut self, content: Content, size_bytes: u64) -> v1::TreeRoot {
        let mut all = size_bytes.to_le_bytes().to_vec();
        for (index, chunk) in &content {
            all.extend(index.to_le_bytes());
            all.extend(Hash::of(chunk).0);
        }
        let node = Hash::of(&all).to_bytes();
        self.trees.insert(node.to_vec(), Arc::new(content));
        v1::TreeRoot { size_bytes, chunk_size: CHUNK as u32, fan_out: 64, node }
    }

    fn own(&mut self, key: &SnapshotKey) -> Result<&mut Image, UpstreamError> {
        let image = self.images.get_mut(&key.image_id);
        let image = image.ok_or_else(|| UpstreamError::NotFound("no image".into()))?;
        assert_eq!(image.writer, key.writer, "only the writer adds snapshots");
        Ok(image)
    }
}

#[async_trait]
impl Upstream for World {
    async fn clone_image(
        &self,
        name: &str,
        source: &v1::SnapshotRef,
        writer: &str,
    ) -> Result<v1::CloneImageResponse, UpstreamError> {
        let lost = self.enter("clone_image")?;
        let mut repo = self.repo();
        let from = source.image.as_ref().unwrap().id;
        let record = repo.images[&from].snapshots[&source.number].clone();
        let found = repo.images.iter().find(|(_, image)| image.name == name);
        let id = match found {
            Some((id, image)) if image.writer == writer => *id,
            Some(_) => return Err(UpstreamError::AlreadyExists(format!("{name} is taken"))),
            None => {
                let id = repo.images.len() as u64 + 1;
                let mut image =
                    Image { name: name.into(), writer: writer.into(), ..Image::default() };
                image.snapshots.insert(1, record.clone());
                repo.images.insert(id, image);
                id
            }
        };
        if lost.is_some() {
            return Err(UpstreamError::Unavailable("answer lost".into()));
        }
        let image = v1::Image {
            id,
            name: name.into(),
            latest: 1,
            highest_number: 1,
            ..v1::Image::default()
        };
        let snapshot =
            v1::Snapshot { image_id: id, number: 1, root: record.root, ..v1::Snapshot::default() };
        Ok(v1::CloneImageResponse { image: Some(image), snapshot: Some(snapshot) })
    }

    async fn pin(&self, image: u64, number: u64, holder: &str) -> Result<(), UpstreamError> {
        let lost = self.enter("pin")?;
        let mut repo = self.repo();
        let record = &repo.images[&image].snapshots[&number];
        assert_eq!(record.state, SnapshotState::Stable, "only a stable snapshot is pinned");
        repo.pins.insert((image, number, holder.into()));
        if lost.is_some() { Err(UpstreamError::Unavailable("answer lost".into())) } else { Ok(()) }
    }

    async fn unpin(&self, image: u64, number: u64, holder: &str) -> Result<(), UpstreamError> {
        self.enter("unpin")?;
        self.repo().pins.remove(&(image, number, holder.into()));
        Ok(())
    }

    async fn begin(&self, key: &SnapshotKey) -> Result<(), UpstreamError> {
        self.step().await;
        let lost = self.enter("begin")?;
        let mut repo = self.repo();
        let snapshots = &mut repo.own(key)?.snapshots;
        match snapshots.get(&key.number) {
            Some(record) if record.state == SnapshotState::Pending => {}
            Some(record) => panic!("began {} which is {:?}", key.number, record.state),
            None => {
                let highest = snapshots.keys().next_back().copied().unwrap_or(0);
                assert!(key.number > highest, "numbers grow: {} after {highest}", key.number);
                let record = Record {
                    state: SnapshotState::Pending,
                    root: None,
                    reason: String::new(),
                    dirty_chunks: 0,
                };
                snapshots.insert(key.number, record);
            }
        }
        if lost.is_some() { Err(UpstreamError::Unavailable("answer lost".into())) } else { Ok(()) }
    }

    async fn persist(&self, key: &SnapshotKey, work: Work<'_>) -> Result<Persisted, UpstreamError> {
        assert!(work.chunks.is_sorted_by(|a, b| a < b), "chunks are sorted, each once");
        let base = Arc::clone(&self.repo().trees[&work.base.node.to_vec()]);
        let mut content = Content::clone(&base);
        for chunk in &work.chunks {
            self.step().await;
            self.enter("chunk")?;
            let bytes = work.source.chunk(*chunk).await.map_err(UpstreamError::Refused)?;
            match bytes {
                Some(Identified { id, plain }) => {
                    assert_eq!((id, plain.len()), (Hash::of(&plain), CHUNK));
                    content.insert(*chunk, plain)
                }
                None => content.remove(chunk),
            };
        }
        self.step().await;
        self.enter("persist")?;
        let mut repo = self.repo();
        let root = repo.store(content, work.size_bytes);
        let dirty_chunks = work.chunks.len() as u64;
        repo.own(key)?.snapshots.get_mut(&key.number).unwrap().dirty_chunks = dirty_chunks;
        Ok(Persisted { root, stats: v1::SnapshotStats { dirty_chunks, ..Default::default() } })
    }

    async fn publish(
        &self,
        key: &SnapshotKey,
        persisted: &Persisted,
    ) -> Result<v1::Snapshot, UpstreamError> {
        self.step().await;
        let lost = self.enter("publish")?;
        let mut repo = self.repo();
        let snapshots = &mut repo.own(key)?.snapshots;
        let newer =
            snapshots.range(key.number + 1..).find(|(_, r)| r.state == SnapshotState::Stable);
        assert!(newer.is_none(), "snapshots are published in order");
        let record = snapshots.get_mut(&key.number).unwrap();
        match record.state {
            SnapshotState::Pending => {
                record.state = SnapshotState::Stable;
                record.root = Some(persisted.root.clone());
            }
            SnapshotState::Stable => assert_eq!(record.root.as_ref(), Some(&persisted.root)),
            state => panic!("published {} which is {state:?}", key.number),
        }
        if lost.is_some() {
            return Err(UpstreamError::Unavailable("answer lost".into()));
        }
        Ok(v1::Snapshot::default())
    }

    async fn fail(&self, key: &SnapshotKey, reason: &str) -> Result<(), UpstreamError> {
        self.enter("fail")?;
        let mut repo = self.repo();
        let snapshots = &mut repo.own(key)?.snapshots;
        let record = snapshots.entry(key.number).or_insert(Record {
            state: SnapshotState::Pending,
            root: None,
            reason: String::new(),
            dirty_chunks: 0,
        });
        assert_ne!(record.state, SnapshotState::Stable, "a stable snapshot never fails");
        record.state = SnapshotState::Failed;
        record.reason = reason.into();
        Ok(())
    }

    async fn snapshot(&self, image_id: u64, number: u64) -> Result<v1::Snapshot, UpstreamError> {
        self.enter("snapshot")?;
        let repo = self.repo();
        let snapshots = &repo.images[&image_id].snapshots;
        let found = match number {
            0 => snapshots.iter().rev().find(|(_, r)| r.state == SnapshotState::Stable),
            _ => snapshots.get_key_value(&number),
        };
        let (number, record) = found.ok_or_else(|| UpstreamError::NotFound("none".into()))?;
        Ok(v1::Snapshot {
            image_id,
            number: *number,
            state: record.state.into(),
            root: record.root.clone(),
            reason: record.reason.clone(),
            ..v1::Snapshot::default()
        })
    }

    async fn pending(&self, image_id: u64) -> Result<Vec<u64>, UpstreamError> {
        self.enter("pending")?;
        let repo = self.repo();
        let snapshots = repo.images[&image_id].snapshots.iter();
        let pending = snapshots.filter(|(_, record)| record.state == SnapshotState::Pending);
        Ok(pending.map(|(number, _)| *number).collect())
    }
}

struct WorldBase {
    world: Arc<World>,
    source: Source,
    content: Arc<Content>,
}

/// Opens bases in a [`World`].
pub(crate) struct WorldBases(pub(crate) Arc<World>);

impl BaseOpener for WorldBases {
    fn open(&self, source: &Source) -> Result<Arc<dyn Base>, BaseError> {
        let content = Arc::clone(&self.0.repo().trees[&source.root.node.to_vec()]);
        Ok(Arc::new(WorldBase { world: Arc::clone(&self.0), source: source.clone(), content }))
    }
}

impl WorldBase {
    fn key(&self, chunk: u64) -> (u64, u64) {
        (self.source.image_id << 32 | self.source.number, chunk)
    }
}

#[async_trait]
impl Base for WorldBase {
    fn size_bytes(&self) -> u64 {
        self.source.root.size_bytes
    }

    fn read_local(&self, chunk: u64, within: u64, out: &mut [u8]) -> Result<bool, BaseError> {
        assert!(within as usize + out.len() <= CHUNK, "asked for more than one chunk");
        assert!(chunk < ChunkSize::MIN.chunks_in(self.size_bytes()), "asked behind the end");
        if !self.world.repo().local.contains(&self.key(chunk)) {
            out.fill(0xEE);
            return Ok(false);
        }
        match self.content.get(&chunk) {
            Some(whole) => out.copy_from_slice(&whole[within as usize..][..out.len()]),
            None => out.fill(0),
        }
        Ok(true)
    }

    async fn fetch(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        if self.world.enter("fetch").is_err() {
            return Err(BaseError::Unavailable { chunk, reason: "planned".into() });
        }
        let mut repo = self.world.repo();
        repo.fetches += 1;
        repo.local.insert(self.key(chunk));
        Ok(self.content.get(&chunk).cloned())
    }

    fn may_have_data(&self, chunk: u64) -> Option<bool> {
        // Known for every third chunk only.
        (!chunk.is_multiple_of(3)).then(|| self.content.contains_key(&chunk))
    }
}

pub(crate) fn spec(name: &str, size_bytes: u64) -> DiskSpec {
    let root =
        v1::TreeRoot { size_bytes, chunk_size: CHUNK as u32, fan_out: 64, node: Bytes::new() };
    let source = Source { image: "base".into(), image_id: 1, number: 1, pool: 1, root };
    spec_of(name, source, size_bytes)
}

pub(crate) fn spec_of(name: &str, source: Source, size_bytes: u64) -> DiskSpec {
    DiskSpec {
        name: DiskName::new(name).unwrap(),
        uid: u128::from_be_bytes(Hash::of(name.as_bytes()).0[..16].try_into().unwrap()),
        source,
        size_bytes,
        writer: "host".into(),
        created_unix_ms: 1,
    }
}

/// Room for copies: (memory, spill), in chunks.
pub(crate) fn deps(world: &Arc<World>, room: (u64, u64), boot: &str) -> DiskDeps {
    DiskDeps {
        bases: Arc::new(WorldBases(Arc::clone(world))),
        upstream: Arc::clone(world) as Arc<dyn Upstream>,
        budgets: Budgets::new(room.0 * CHUNK as u64, room.1 * CHUNK as u64),
        io: Arc::new(HostFiles),
        boot_id: boot.into(),
        runtime: tokio::runtime::Handle::current(),
        background: tokio::runtime::Handle::current(),
        strategy: Strategy::default(),
        persist_after: Duration::ZERO,
    }
}

/// Bytes that tell where they are and who wrote them.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

impl Disk {
    /// The whole disk.
    pub(crate) async fn all(&self) -> Vec<u8> {
        self.read(0, self.size_bytes() as usize).await.unwrap().to_vec()
    }

    /// Reads what is on this host, wherever.
    pub(crate) fn try_read(&self, offset: u64, out: &mut [u8]) -> Result<Attempt, DiskError> {
        match self.quick_read(offset, out)? {
            QuickRead::Done => Ok(Attempt::Done),
            QuickRead::Cold(cold) => cold.read(out).map(|()| Attempt::Done),
            QuickRead::NeedsAsync => Ok(Attempt::NeedsAsync { done: 0 }),
        }
    }

    /// Writes as the front end does.
    pub(crate) async fn put(self: &Arc<Self>, offset: u64, data: &[u8]) {
        if let Attempt::NeedsAsync { done } = self.try_write(offset, data).unwrap() {
            let rest = Bytes::copy_from_slice(&data[done as usize..]);
            self.write(offset + done, rest).await.unwrap();
        }
    }

    pub(crate) async fn wipe(self: &Arc<Self>, offset: u64, len: u64, how: Zero) {
        if let Attempt::NeedsAsync { done } = self.try_zero(offset, len, how).unwrap() {
            self.zero(offset + done, len - done, how).await.unwrap();
        }
    }
}
