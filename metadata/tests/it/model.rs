//! Random histories with crashes, against a model in a few lines.
//!
//! Each step asks the version manager and the model the same; the kind of answer must be the same,
//! and so must everything that is stored. A step may crash in any of its swaps, before or after it
//! took effect: then the store must hold what the model had before the step, or what it has after.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blobcr_metadata::Error;
use blobcr_metadata::clock::testing::ManualClock;
use blobcr_metadata::records::{
    Counter, CounterRecord, ImageNameRecord, ImageRecord, KeyKind, LeaseRecord, LeaseWorkRecord,
    RemovalRecord, SnapshotRecord, decode,
};
use blobcr_metadata::store::memory::MemoryStore;
use blobcr_metadata::store::sled::SledStore;
use blobcr_metadata::store::{Entry, Key, MetaStore, Page, StoreError, Swap, Version, Watch};
use blobcr_metadata::version_manager::VersionManager;
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;
use proptest::prelude::*;
use tempfile::TempDir;

use crate::fixture::{
    Kind, START_MS, TTL_MS, at, begin, clone, create, fail, kind, manager, named, publish, records,
    root,
};

#[derive(Debug)]
enum Plan {
    Fine,
    CrashAfter { swaps: u32, applied: bool },
    Crashed,
}

type Meanwhile = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A store that a process loses in the middle of its work, or where others come first.
pub(crate) struct Flaky {
    inner: Arc<dyn MetaStore>,
    plan: Mutex<Plan>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl std::fmt::Debug for Flaky {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flaky").field("plan", &self.plan).finish_non_exhaustive()
    }
}

pub(crate) fn flaky(inner: &Arc<dyn MetaStore>) -> Arc<Flaky> {
    Arc::new(Flaky {
        inner: Arc::clone(inner),
        plan: Mutex::new(Plan::Fine),
        meanwhile: Mutex::new(None),
    })
}

impl Flaky {
    /// After so many swaps, the next one fails for its caller, and everything after it. `applied`:
    /// it happens all the same.
    pub(crate) fn crash_after(&self, swaps: u32, applied: bool) {
        *self.plan.lock().unwrap() = Plan::CrashAfter { swaps, applied };
    }

    /// Does this first when the next swap comes: after everything that the swap was decided on.
    pub(crate) fn before_next_swap(&self, others: impl Future<Output = ()> + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::pin(others));
    }

    /// Whether what was to come first has come.
    pub(crate) fn met(&self) -> bool {
        self.meanwhile.lock().unwrap().is_none()
    }

    pub(crate) fn as_store(self: &Arc<Self>) -> Arc<dyn MetaStore> {
        Arc::clone(self) as Arc<dyn MetaStore>
    }

    fn gone() -> StoreError {
        StoreError::Unavailable { detail: "the test cut it off".to_owned() }
    }

    fn alive(&self) -> Result<(), StoreError> {
        match *self.plan.lock().unwrap() {
            Plan::Crashed => Err(Self::gone()),
            Plan::Fine | Plan::CrashAfter { .. } => Ok(()),
        }
    }

    /// `None`: go on. Otherwise crash, after the swap or before it.
    fn crash(&self) -> Option<bool> {
        let mut plan = self.plan.lock().unwrap();
        match &mut *plan {
            Plan::CrashAfter { swaps: 0, applied } => {
                let applied = *applied;
                *plan = Plan::Crashed;
                Some(applied)
            }
            Plan::CrashAfter { swaps, .. } => {
                *swaps -= 1;
                None
            }
            Plan::Fine | Plan::Crashed => None,
        }
    }
}

#[async_trait]
impl MetaStore for Flaky {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.alive()?;
        self.inner.get(key).await
    }

    async fn swap(&self, swap: Swap) -> Result<Version, StoreError> {
        self.alive()?;
        let others = self.meanwhile.lock().unwrap().take();
        if let Some(others) = others {
            others.await;
        }
        match self.crash() {
            None => self.inner.swap(swap).await,
            Some(applied) => {
                if applied {
                    // What it answered is lost.
                    drop(self.inner.swap(swap).await);
                }
                Err(Self::gone())
            }
        }
    }

    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.alive()?;
        self.inner.list(prefix, after, limit).await
    }

    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError> {
        self.alive()?;
        self.inner.watch(prefix).await
    }
}

#[derive(Clone, Copy, Debug)]
enum Number {
    /// Let the service choose.
    Next,
    /// So far above all that were begun.
    Above(u64),
    /// This one, whatever it is.
    Exactly(u64),
}

#[derive(Clone, Debug)]
enum Op {
    Acquire,
    Renew { lease: usize },
    Release { lease: usize },
    Advance { ms: u64 },
    Expire,
    Restart,
    Create { name: usize, writer: usize },
    Clone { from: usize, number: u64, name: usize, writer: usize },
    RemoveImage { name: usize },
    Begin { image: usize, number: Number, lease: usize, writer: usize },
    Publish { image: usize, number: u64, lease: usize, writer: usize, content: u8 },
    Fail { image: usize, number: u64, writer: usize },
    RemoveSnapshot { name: usize, number: u64 },
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const WRITERS: [&str; 3] = ["", "w1", "w2"];

fn op() -> impl Strategy<Value = Op> {
    let image = || any::<prop::sample::Index>().prop_map(|i| i.index(1 << 20));
    let (name, writer) = (|| 0..NAMES.len(), || 0..WRITERS.len());
    let number = || 0..7u64;
    let choice = prop_oneof![
        3 => Just(Number::Next),
        1 => (1..4u64).prop_map(Number::Above),
        2 => (1..7u64).prop_map(Number::Exactly),
    ];
    prop_oneof![
        2 => Just(Op::Acquire),
        1 => image().prop_map(|lease| Op::Renew { lease }),
        1 => image().prop_map(|lease| Op::Release { lease }),
        1 => (0..TTL_MS * 3 / 2).prop_map(|ms| Op::Advance { ms }),
        1 => Just(Op::Expire),
        1 => Just(Op::Restart),
        4 => (name(), writer()).prop_map(|(name, writer)| Op::Create { name, writer }),
        3 => (name(), number(), name(), writer())
            .prop_map(|(from, number, name, writer)| Op::Clone { from, number, name, writer }),
        1 => name().prop_map(|name| Op::RemoveImage { name }),
        9 => (image(), choice, image(), writer())
            .prop_map(|(image, number, lease, writer)| Op::Begin { image, number, lease, writer }),
        9 => (image(), number(), image(), writer(), 1..3u8).prop_map(
            |(image, number, lease, writer, content)| Op::Publish {
                image, number, lease, writer, content,
            }
        ),
        3 => (image(), number(), writer())
            .prop_map(|(image, number, writer)| Op::Fail { image, number, writer }),
        3 => (name(), number()).prop_map(|(name, number)| Op::RemoveSnapshot { name, number }),
    ]
}

#[derive(Clone, Debug)]
struct Step {
    op: Op,
    crash: Option<(u32, bool)>,
}

fn step() -> impl Strategy<Value = Step> {
    let crash = prop::option::weighted(0.15, (0..3u32, any::<bool>()));
    (op(), crash).prop_map(|(op, crash)| Step { op, crash })
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct MSnapshot {
    state: SnapshotState,
    content: Option<u8>,
    writer: &'static str,
    lease: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct MImage {
    id: u64,
    name: &'static str,
    writer: &'static str,
    removed: bool,
    latest: u64,
    highest: u64,
    snapshots: BTreeMap<u64, MSnapshot>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct MLease {
    id: u64,
    expires: u64,
    ended: bool,
}

#[derive(Clone, Debug)]
struct Model {
    now: u64,
    started: u64,
    images: Vec<MImage>,
    leases: Vec<MLease>,
}

impl Model {
    fn live(&self, lease: u64) -> bool {
        let found = self.leases.iter().find(|l| l.id == lease && !l.ended);
        found.is_some_and(|l| self.now < l.expires.max(self.started + TTL_MS))
    }

    fn named(&self, name: usize) -> Option<usize> {
        self.images.iter().position(|image| image.name == NAMES[name] && !image.removed)
    }

    fn image(&self, index: usize) -> Option<usize> {
        (!self.images.is_empty()).then(|| index % self.images.len())
    }

    fn lease_id(&self, index: usize) -> u64 {
        if self.leases.is_empty() { 0 } else { self.leases[index % self.leases.len()].id }
    }

    fn end(&mut self, lease: u64) {
        for known in self.leases.iter_mut().filter(|known| known.id == lease) {
            known.ended = true;
        }
        for snapshot in self.images.iter_mut().flat_map(|image| image.snapshots.values_mut()) {
            if snapshot.lease == lease && snapshot.state == SnapshotState::Pending {
                snapshot.state = SnapshotState::Failed;
            }
        }
    }

    /// What happens, and the kind of answer. New ids are 0 until they are known.
    fn apply(&mut self, op: &Op) -> Kind {
        match *op {
            Op::Acquire => {
                let expires = self.now + TTL_MS;
                self.leases.push(MLease { id: 0, expires, ended: false });
                Kind::Ok
            }
            Op::Renew { lease } => {
                let (id, expires) = (self.lease_id(lease), self.now + TTL_MS);
                if !self.live(id) {
                    return Kind::Precondition;
                }
                self.leases.iter_mut().filter(|l| l.id == id).for_each(|l| l.expires = expires);
                Kind::Ok
            }
            Op::Release { lease } => {
                self.end(self.lease_id(lease));
                Kind::Ok
            }
            Op::Advance { ms } => {
                self.now += ms;
                Kind::Ok
            }
            Op::Expire => {
                let dead: Vec<u64> =
                    self.leases.iter().map(|l| l.id).filter(|id| !self.live(*id)).collect();
                dead.into_iter().for_each(|id| self.end(id));
                Kind::Ok
            }
            Op::Restart => {
                self.started = self.now;
                Kind::Ok
            }
            Op::Create { name, writer } => self.create(name, writer),
            Op::Clone { from, number, name, writer } => {
                self.clone_image(from, number, name, writer)
            }
            Op::RemoveImage { name } => {
                let Some(image) = self.named(name) else { return Kind::NotFound };
                let image = &mut self.images[image];
                image.removed = true;
                image.snapshots.values_mut().for_each(|s| s.state = SnapshotState::Obsolete);
                Kind::Ok
            }
            Op::Begin { image, number, lease, writer } => self.begin(image, number, lease, writer),
            Op::Publish { image, number, lease, writer, content } => {
                self.publish(image, number, self.lease_id(lease), WRITERS[writer], content)
            }
            Op::Fail { image, number, writer } => self.fail(image, number, WRITERS[writer]),
            Op::RemoveSnapshot { name, number } => self.remove_snapshot(name, number),
        }
    }

    fn create(&mut self, name: usize, writer: usize) -> Kind {
        if self.named(name).is_some() {
            return Kind::Exists;
        }
        self.images.push(MImage {
            id: 0,
            name: NAMES[name],
            writer: WRITERS[writer],
            removed: false,
            latest: 0,
            highest: 0,
            snapshots: BTreeMap::new(),
        });
        Kind::Ok
    }

    fn clone_image(&mut self, from: usize, number: u64, name: usize, writer: usize) -> Kind {
        let Some(source) = self.named(from) else { return Kind::NotFound };
        let source = &self.images[source];
        let number = if number == 0 { source.latest } else { number };
        let Some(snapshot) = source.snapshots.get(&number) else { return Kind::NotFound };
        if snapshot.state != SnapshotState::Stable {
            return Kind::Precondition;
        }
        let first = MSnapshot { lease: 0, writer: WRITERS[writer], ..snapshot.clone() };
        let kind = self.create(name, writer);
        if kind == Kind::Ok {
            let image = self.images.last_mut().unwrap();
            (image.latest, image.highest) = (1, 1);
            image.snapshots.insert(1, first);
        }
        kind
    }

    fn begin(&mut self, image: usize, number: Number, lease: usize, writer: usize) -> Kind {
        let Some(image) = self.image(image) else { return Kind::NotFound };
        let (lease, writer) = (self.lease_id(lease), WRITERS[writer]);
        let live = self.live(lease);
        let image = &mut self.images[image];
        if image.removed {
            return Kind::NotFound;
        }
        if !image.writer.is_empty() && image.writer != writer || !live {
            return Kind::Precondition;
        }
        let number = match number {
            Number::Next => image.highest + 1,
            Number::Above(by) => image.highest + by,
            Number::Exactly(number) => number,
        };
        if number <= image.highest {
            let known = image.snapshots.get_mut(&number);
            let mine = |s: &&mut MSnapshot| s.writer == writer && s.state == SnapshotState::Pending;
            let Some(snapshot) = known.filter(mine).filter(|_| !writer.is_empty()) else {
                return Kind::Precondition;
            };
            snapshot.lease = lease;
            return Kind::Ok;
        }
        image.highest = number;
        let snapshot = MSnapshot { state: SnapshotState::Pending, content: None, writer, lease };
        image.snapshots.insert(number, snapshot);
        Kind::Ok
    }

    fn publish(
        &mut self,
        image: usize,
        number: u64,
        lease: u64,
        writer: &str,
        content: u8,
    ) -> Kind {
        let live = self.live(lease);
        let Some(image) = self.image(image) else { return Kind::NotFound };
        let image = &mut self.images[image];
        if image.removed {
            return Kind::NotFound;
        }
        let owned = image.writer.is_empty() || image.writer == writer;
        let Some(snapshot) = image.snapshots.get_mut(&number) else { return Kind::NotFound };
        match snapshot.state {
            SnapshotState::Stable if snapshot.content == Some(content) => return Kind::Ok,
            SnapshotState::Pending if owned && snapshot.writer == writer && live => {}
            _ => return Kind::Precondition,
        }
        snapshot.state = SnapshotState::Stable;
        snapshot.content = Some(content);
        image.latest = image.latest.max(number);
        Kind::Ok
    }

    fn fail(&mut self, image: usize, number: u64, writer: &str) -> Kind {
        let Some(image) = self.image(image) else { return Kind::NotFound };
        let Some(snapshot) = self.images[image].snapshots.get(&number) else {
            return Kind::NotFound;
        };
        match snapshot.state {
            SnapshotState::Failed | SnapshotState::Obsolete => Kind::Ok,
            SnapshotState::Pending if snapshot.writer == writer || !self.live(snapshot.lease) => {
                let snapshot = self.images[image].snapshots.get_mut(&number).unwrap();
                snapshot.state = SnapshotState::Failed;
                Kind::Ok
            }
            _ => Kind::Precondition,
        }
    }

    fn remove_snapshot(&mut self, name: usize, number: u64) -> Kind {
        let Some(image) = self.named(name) else { return Kind::NotFound };
        let image = &mut self.images[image];
        let number = if number == 0 { image.latest } else { number };
        let latest = image.latest;
        let Some(snapshot) = image.snapshots.get_mut(&number) else { return Kind::NotFound };
        if number == latest || snapshot.state == SnapshotState::Pending {
            return Kind::Precondition;
        }
        snapshot.state = SnapshotState::Obsolete;
        Kind::Ok
    }

    /// Gives the newest image its id, once it is known.
    fn learn_image(&mut self, id: u64) {
        self.images.last_mut().unwrap().id = id;
    }

    fn view(&self) -> View {
        let images = self.images.iter().map(|image| (image.id, image.clone())).collect();
        let leases = self.leases.iter().filter(|l| !l.ended).map(|l| (l.id, l.expires)).collect();
        View { images, leases }
    }
}

/// Everything that is stored about images, snapshots and leases.
#[derive(Debug, PartialEq, Eq)]
struct View {
    images: BTreeMap<u64, MImage>,
    leases: BTreeMap<u64, u64>,
}

fn known(text: &str, all: &[&'static str]) -> &'static str {
    all.iter().find(|known| **known == text).unwrap()
}

/// Where the metadata is: in memory, or in a directory that each restart opens again.
enum Backend {
    Memory(Arc<dyn MetaStore>),
    Sled(TempDir),
}

impl Backend {
    async fn open(&self) -> Arc<dyn MetaStore> {
        match self {
            Self::Memory(store) => Arc::clone(store),
            Self::Sled(dir) => Arc::new(SledStore::open(dir.path()).await.unwrap()),
        }
    }
}

struct World {
    backend: Backend,
    clock: Arc<ManualClock>,
    seed: u64,
    store: Arc<dyn MetaStore>,
    flaky: Arc<Flaky>,
    manager: Arc<VersionManager>,
    model: Model,
    /// What was seen of each image and snapshot: what must never change back.
    latest: BTreeMap<u64, u64>,
    states: BTreeMap<(u64, u64), SnapshotState>,
    contents: BTreeMap<(u64, u64), u8>,
}

impl World {
    async fn new(backend: Backend) -> Self {
        let clock = Arc::new(ManualClock::new(START_MS));
        let store = backend.open().await;
        let flaky = flaky(&store);
        let manager = manager(&flaky.as_store(), &clock, 0);
        manager.ensure_pool("default", "replica:1").await.unwrap();
        let model =
            Model { now: START_MS, started: START_MS, images: Vec::new(), leases: Vec::new() };
        let (latest, states, contents) = Default::default();
        Self { backend, clock, seed: 0, store, flaky, manager, model, latest, states, contents }
    }

    async fn restart(&mut self) {
        // Every user of the old store goes before a new one comes.
        let nowhere: Arc<dyn MetaStore> = Arc::new(MemoryStore::new());
        self.flaky = flaky(&nowhere);
        self.manager = manager(&nowhere, &self.clock, 0);
        self.store = nowhere;
        self.store = self.backend.open().await;
        self.flaky = flaky(&self.store);
        self.seed += 1;
        self.manager = manager(&self.flaky.as_store(), &self.clock, self.seed);
    }

    /// Asks the version manager. Returns the kind of answer and the id of what was made.
    async fn execute(&mut self, op: &Op) -> (Kind, u64) {
        fn answer<T>(result: &Result<T, Error>, id: impl Fn(&T) -> u64) -> (Kind, u64) {
            (kind(result), result.as_ref().map_or(0, id))
        }
        let m = Arc::clone(&self.manager);
        let image_id = |index| self.model.image(index).map_or(0, |i| self.model.images[i].id);
        let lease_id = |index| self.model.lease_id(index);
        match *op {
            Op::Acquire => {
                let r = v1::AcquireLeaseRequest { holder: "model".to_owned(), ttl_ms: TTL_MS };
                answer(&m.acquire_lease(r).await, |lease| lease.id)
            }
            Op::Renew { lease } => {
                let r = v1::RenewLeaseRequest { lease_id: lease_id(lease) };
                answer(&m.renew_lease(r).await, |_| 0)
            }
            Op::Release { lease } => {
                let r = v1::ReleaseLeaseRequest { lease_id: lease_id(lease) };
                answer(&m.release_lease(r).await, |_| 0)
            }
            Op::Advance { ms } => {
                self.clock.advance_ms(ms);
                (Kind::Ok, 0)
            }
            Op::Expire => answer(&m.expire_leases().await, |_| 0),
            Op::Restart => {
                drop(m);
                self.restart().await;
                (Kind::Ok, 0)
            }
            Op::Create { name, writer } => {
                let r = create(NAMES[name], WRITERS[writer]);
                answer(&m.create_image(r).await, |image| image.id)
            }
            Op::Clone { from, number, name, writer } => {
                let r = clone(at(NAMES[from], number), NAMES[name], WRITERS[writer]);
                answer(&m.clone_image(r).await, |made| made.image.as_ref().unwrap().id)
            }
            Op::RemoveImage { name } => answer(&m.remove_image(named(NAMES[name])).await, |_| 0),
            Op::Begin { image, number, lease, writer } => {
                let highest = self.model.image(image).map_or(0, |i| self.model.images[i].highest);
                let number = match number {
                    Number::Next => 0,
                    Number::Above(by) => highest + by,
                    Number::Exactly(number) => number,
                };
                let r = begin(image_id(image), number, lease_id(lease), WRITERS[writer]);
                answer(&m.begin_snapshot(r).await, |_| 0)
            }
            Op::Publish { image, number, lease, writer, content } => {
                let writer = WRITERS[writer];
                let r = publish(image_id(image), number, lease_id(lease), writer, content);
                answer(&m.publish_snapshot(r).await, |_| 0)
            }
            Op::Fail { image, number, writer } => {
                let r = fail(image_id(image), number, WRITERS[writer]);
                answer(&m.fail_snapshot(r).await, |_| 0)
            }
            Op::RemoveSnapshot { name, number } => {
                answer(&m.remove_snapshot(at(NAMES[name], number)).await, |_| 0)
            }
        }
    }

    async fn step(&mut self, step: &Step) {
        // Time does not crash, and an expiry that does may leave leases that a restart extends.
        let crash = step.crash.filter(|_| {
            !matches!(step.op, Op::Restart | Op::Expire | Op::Advance { .. } | Op::Acquire)
        });
        match crash {
            None => self.calm_step(&step.op).await,
            Some((swaps, applied)) => self.crashing_step(&step.op, swaps, applied).await,
        }
        self.check_invariants().await;
    }

    async fn calm_step(&mut self, op: &Op) {
        let before = self.model.clone();
        let (kind, id) = self.execute(op).await;
        let expected = self.model.apply(op);
        assert_eq!(kind, expected, "{op:?} after {before:#?}");
        if kind == Kind::Ok {
            match op {
                Op::Acquire => self.model.leases.last_mut().unwrap().id = id,
                Op::Create { .. } | Op::Clone { .. } => self.model.learn_image(id),
                _ => {}
            }
        }
        assert_eq!(self.view().await, self.model.view(), "{op:?} after {before:#?}");
    }

    async fn crashing_step(&mut self, op: &Op, swaps: u32, applied: bool) {
        let before = self.model.clone();
        self.flaky.crash_after(swaps, applied);
        self.execute(op).await;
        self.restart().await;
        self.manager.finish_removals().await.unwrap();
        self.manager.expire_leases().await.unwrap();
        let actual = self.view().await;
        let mut after = before.clone();
        if after.apply(op) == Kind::Ok && matches!(op, Op::Create { .. } | Op::Clone { .. }) {
            let known: BTreeSet<u64> = before.images.iter().map(|image| image.id).collect();
            after.learn_image(
                actual.images.keys().copied().find(|id| !known.contains(id)).unwrap_or(0),
            );
        }
        for mut candidate in [after, before.clone()] {
            candidate.apply(&Op::Restart);
            candidate.apply(&Op::Expire);
            if candidate.view() == actual {
                self.model = candidate;
                return;
            }
        }
        panic!("{op:?} left {actual:#?} of {before:#?}");
    }

    /// What is stored, as it is stored.
    async fn view(&self) -> View {
        let mut images = BTreeMap::new();
        for image in records::<ImageRecord>(&self.store, KeyKind::Image).await {
            let image = MImage {
                id: image.id,
                name: known(&image.name, &NAMES),
                writer: known(&image.writer, &WRITERS),
                removed: image.is_removed(),
                latest: image.latest,
                highest: image.highest_number,
                snapshots: BTreeMap::new(),
            };
            images.insert(image.id, image);
        }
        for snapshot in records::<SnapshotRecord>(&self.store, KeyKind::Snapshot).await {
            let content = snapshot.root.as_ref().map(|root| root.node[0]);
            assert!(content.is_none_or(|content| snapshot.root == Some(root(content))));
            let found = MSnapshot {
                state: snapshot.state(),
                content,
                writer: known(&snapshot.writer, &WRITERS),
                lease: snapshot.lease_id,
            };
            let image = images.get_mut(&snapshot.image_id).expect("a snapshot has an image");
            image.snapshots.insert(snapshot.number, found);
        }
        let leases = records::<LeaseRecord>(&self.store, KeyKind::Lease).await;
        let leases = leases.iter().map(|lease| (lease.id, lease.expires_unix_ms)).collect();
        View { images, leases }
    }

    async fn given(&self, counter: Counter) -> u64 {
        let key = CounterRecord::key_of(counter);
        let entry = self.store.get(&key).await.unwrap();
        entry.map_or(0, |e| decode::<CounterRecord>(&e.key, &e.value).unwrap().given)
    }

    async fn check_invariants(&mut self) {
        let view = self.view().await;
        let names = records::<ImageNameRecord>(&self.store, KeyKind::ImageName).await;
        let named: BTreeMap<&str, u64> =
            names.iter().map(|name| (name.name.as_str(), name.image_id)).collect();
        let alive: Vec<&MImage> = view.images.values().filter(|image| !image.removed).collect();
        let expected: BTreeMap<&str, u64> = alive.iter().map(|i| (i.name, i.id)).collect();
        assert_eq!((named, alive.len()), (expected.clone(), expected.len()), "names");

        let given = self.given(Counter::Image).await;
        let mut pending = BTreeSet::new();
        for image in view.images.values() {
            assert!(image.id <= given, "an id that was never given");
            let past = self.latest.insert(image.id, image.latest).unwrap_or(0);
            assert!(image.latest >= past, "latest went back: {image:?}");
            let latest = image.snapshots.get(&image.latest).map(|snapshot| snapshot.state);
            let right = if image.removed { SnapshotState::Obsolete } else { SnapshotState::Stable };
            assert_eq!(latest, (image.latest != 0).then_some(right), "{image:?}");
            for (number, snapshot) in &image.snapshots {
                let at = (image.id, *number);
                assert!(*number <= image.highest, "a number that was never given");
                self.check_state(at, snapshot);
                if snapshot.state == SnapshotState::Pending {
                    assert!(!image.removed && view.leases.contains_key(&snapshot.lease));
                    pending.insert((snapshot.lease, at.0, at.1));
                }
            }
        }
        let work = records::<LeaseWorkRecord>(&self.store, KeyKind::LeaseWork).await;
        let work = work.iter().map(|w| (w.lease_id, w.image_id, w.number));
        // Work of a removed image goes with its lease.
        let work: BTreeSet<_> = work.filter(|w| !view.images[&w.1].removed).collect();
        assert_eq!(work, pending, "every pending snapshot is found by its lease");
        assert_eq!(records::<RemovalRecord>(&self.store, KeyKind::Removal).await, []);
        self.check_listing(&alive).await;
    }

    fn check_state(&mut self, at: (u64, u64), snapshot: &MSnapshot) {
        use SnapshotState::{Failed, Obsolete, Pending, Stable};
        if snapshot.state == Stable {
            assert!(snapshot.content.is_some(), "stable without a root: {at:?}");
        }
        match (self.states.insert(at, snapshot.state), snapshot.state) {
            // A clone begins stable.
            (None, Pending | Stable | Failed) => {}
            (Some(old), new) if old == new => {}
            (Some(Pending), Stable | Failed | Obsolete) | (Some(Stable | Failed), Obsolete) => {}
            (old, new) => panic!("{at:?} went from {old:?} to {new:?}"),
        }
        if let Some(content) = snapshot.content {
            let old = self.contents.insert(at, content);
            assert!(old.is_none_or(|old| old == content), "{at:?} changed its content");
        }
    }

    /// The interface shows what is stored.
    async fn check_listing(&self, alive: &[&MImage]) {
        let listed = self.manager.list_images(v1::ListImagesRequest::default()).await.unwrap();
        let listed: Vec<(u64, u64)> = listed.images.iter().map(|i| (i.id, i.latest)).collect();
        let mut expected: Vec<&&MImage> = alive.iter().collect();
        expected.sort_unstable_by_key(|image| image.name);
        let expected: Vec<(u64, u64)> = expected.iter().map(|i| (i.id, i.latest)).collect();
        assert_eq!(listed, expected);
        for image in alive {
            let r =
                v1::ListSnapshotsRequest { image: Some(named(image.name)), ..Default::default() };
            let page = self.manager.list_snapshots(r).await.unwrap().snapshots;
            let listed = page.iter().map(|s| (s.number, s.state()));
            assert!(listed.eq(image.snapshots.iter().map(|(n, s)| (*n, s.state))), "{image:?}");
        }
    }
}

fn run(backend: Backend, steps: &[Step]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(backend).await;
        for step in steps {
            world.step(step).await;
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_history_is_that_of_the_model(steps in prop::collection::vec(step(), 1..80)) {
        run(Backend::Memory(Arc::new(MemoryStore::new())), &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_history_on_sled_is_that_of_the_model(steps in prop::collection::vec(step(), 1..60)) {
        run(Backend::Sled(tempfile::tempdir().unwrap()), &steps);
    }
}
