//! Random histories with crashes, against a model in a few lines.
//!
//! Each step asks the version manager and the model the same; the kind of answer must be the same,
//! and so must everything that is stored. A step may crash in any of its swaps, before or after it
//! took effect: then the store must hold what the model had before the step, or what it has after.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blobcr_metadata::Error;
use blobcr_metadata::clock::testing::ManualClock;
use blobcr_metadata::records::{
    Counter, CounterRecord, ImageNameRecord, ImageRecord, KeyKind, LeaseRecord, LeaseWorkRecord,
    RemovalRecord, SnapshotRecord, decode,
};
use blobcr_metadata::store::MetaStore;
use blobcr_metadata::store::memory::MemoryStore;
use blobcr_metadata::store::sled::SledStore;
use blobcr_metadata::version_manager::VersionManager;
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;
use proptest::prelude::*;
use tempfile::TempDir;

use crate::fixture::{
    Kind, START_MS, TTL_MS, at, begin, clone, create, fail, kind, manager, named, publish, records,
    root,
};
use crate::flaky::{Flaky, flaky};

mod rules;

use rules::{MImage, MSnapshot, Model, NAMES, Number, Op, Step, View, WRITERS, step};

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
