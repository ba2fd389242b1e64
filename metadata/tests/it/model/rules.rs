//! The model: what each operation does, in a few lines, and what is asked of it.

use std::collections::BTreeMap;

use blobcr_proto::v1::SnapshotState;
use proptest::prelude::*;

use crate::fixture::{Kind, TTL_MS};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Number {
    /// Let the service choose.
    Next,
    /// So far above all that were begun.
    Above(u64),
    /// This one, whatever it is.
    Exactly(u64),
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
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

pub(crate) const NAMES: [&str; 4] = ["a", "b", "c", "d"];
pub(crate) const WRITERS: [&str; 3] = ["", "w1", "w2"];

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
pub(crate) struct Step {
    pub(crate) op: Op,
    pub(crate) crash: Option<(u32, bool)>,
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let crash = prop::option::weighted(0.15, (0..3u32, any::<bool>()));
    (op(), crash).prop_map(|(op, crash)| Step { op, crash })
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MSnapshot {
    pub(crate) state: SnapshotState,
    pub(crate) content: Option<u8>,
    pub(crate) writer: &'static str,
    pub(crate) lease: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MImage {
    pub(crate) id: u64,
    pub(crate) name: &'static str,
    pub(crate) writer: &'static str,
    pub(crate) removed: bool,
    pub(crate) latest: u64,
    pub(crate) highest: u64,
    pub(crate) snapshots: BTreeMap<u64, MSnapshot>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MLease {
    pub(crate) id: u64,
    pub(crate) expires: u64,
    pub(crate) ended: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) now: u64,
    pub(crate) started: u64,
    pub(crate) images: Vec<MImage>,
    pub(crate) leases: Vec<MLease>,
}

impl Model {
    fn live(&self, lease: u64) -> bool {
        let found = self.leases.iter().find(|l| l.id == lease && !l.ended);
        found.is_some_and(|l| self.now < l.expires.max(self.started + TTL_MS))
    }

    fn named(&self, name: usize) -> Option<usize> {
        self.images.iter().position(|image| image.name == NAMES[name] && !image.removed)
    }

    pub(crate) fn image(&self, index: usize) -> Option<usize> {
        (!self.images.is_empty()).then(|| index % self.images.len())
    }

    pub(crate) fn lease_id(&self, index: usize) -> u64 {
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
    pub(crate) fn apply(&mut self, op: &Op) -> Kind {
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
    pub(crate) fn learn_image(&mut self, id: u64) {
        self.images.last_mut().unwrap().id = id;
    }

    pub(crate) fn view(&self) -> View {
        let images = self.images.iter().map(|image| (image.id, image.clone())).collect();
        let leases = self.leases.iter().filter(|l| !l.ended).map(|l| (l.id, l.expires)).collect();
        View { images, leases }
    }
}

/// Everything that is stored about images, snapshots and leases.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) images: BTreeMap<u64, MImage>,
    pub(crate) leases: BTreeMap<u64, u64>,
}
