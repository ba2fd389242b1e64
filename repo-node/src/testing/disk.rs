//! A disk that forgets what was not synced, tears writes, runs full and fails, as told.
//!
//! After [`SimDisk::crash`], each 512-byte sector written since a file's last sync is there or
//! not, each create, rename and unlink since the last directory sync has happened or not, and
//! lengths are anything in between, by the dice of a seed. That is harsher than real file systems.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SECTOR: usize = 512;

/// What happens to the operation whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The power goes; this and all later operations fail.
    PowerCut,
    /// This write fails, part of it done.
    WriteFails,
    /// This sync fails, and what it should have synced may never reach the disk.
    SyncFails,
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Inode {
    /// What a reader sees.
    pub(super) seen: Vec<u8>,
    /// What is on the medium.
    pub(super) durable: Vec<u8>,
    /// What is on its way there.
    pub(super) pending: Vec<Change>,
    /// Room taken by `allocate`.
    pub(super) allocated: usize,
}

#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Unlink(String),
}

pub(super) fn apply_name(names: &mut BTreeMap<String, usize>, change: &NameChange) {
    match change {
        NameChange::Create(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        NameChange::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        NameChange::Unlink(name) => {
            names.remove(name);
        }
    }
}

pub(super) fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { offset, bytes } => {
            let end = offset + bytes.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[*offset..end].copy_from_slice(bytes);
        }
        Change::Truncate(len) => content.resize(*len, 0),
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) inodes: Vec<Inode>,
    pub(super) names: BTreeMap<String, usize>,
    pub(super) durable_names: BTreeMap<String, usize>,
    pub(super) pending_names: Vec<NameChange>,
    pub(super) capacity: usize,
    /// It says that it has room even when it has none, as with a quota.
    pub(super) boasts: bool,
    /// Operations that change something, so far.
    pub(super) operations: u64,
    pub(super) fault: Option<(u64, Fault)>,
    pub(super) dead: bool,
    pub(super) syncs: u64,
    pub(super) dice: StdRng,
}

impl State {
    pub(super) fn used(&self) -> usize {
        self.names.values().map(|inode| &self.inodes[*inode]).map(Inode::room).sum()
    }

    /// Counts an operation; fails when the power is gone. Says whether its turn for a fault came.
    pub(super) fn step(&mut self) -> io::Result<Option<Fault>> {
        if self.dead {
            return Err(gone());
        }
        self.operations += 1;
        match self.fault {
            Some((at, fault)) if self.operations >= at => {
                // A failing write or sync waits for one.
                if fault == Fault::PowerCut {
                    self.fault = None;
                    self.dead = true;
                }
                Ok(Some(fault))
            }
            _ => Ok(None),
        }
    }
}

impl Inode {
    pub(super) fn room(&self) -> usize {
        self.seen.len().max(self.allocated)
    }

    /// What a power cut leaves.
    pub(super) fn after_power_cut(&self, dice: &mut StdRng) -> Vec<u8> {
        let mut content = self.durable.clone();
        // Sometimes all of it got there, sometimes nothing, mostly something.
        let odds = [0.0, 0.3, 0.7, 0.95, 1.0][dice.random_range(0..5)];
        for change in &self.pending {
            match change {
                Change::Truncate(_) if dice.random_bool(odds) => apply(&mut content, change),
                Change::Truncate(_) => {}
                Change::Write { offset, bytes } => {
                    let mut at = 0;
                    while at < bytes.len() {
                        let end = bytes.len().min(at + SECTOR - (offset + at) % SECTOR);
                        let piece = bytes[at..end].to_vec();
                        if dice.random_bool(odds) {
                            apply(
                                &mut content,
                                &Change::Write { offset: offset + at, bytes: piece },
                            );
                        }
                        at = end;
                    }
                }
            }
        }
        content
    }
}

pub(super) fn gone() -> io::Error {
    io::Error::other("the power is gone")
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    /// An empty disk whose faults follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with(BTreeMap::new(), Vec::new(), StdRng::seed_from_u64(seed), usize::MAX / 2)
    }

    fn with(
        names: BTreeMap<String, usize>,
        contents: Vec<Vec<u8>>,
        dice: StdRng,
        capacity: usize,
    ) -> Self {
        let inode = |content: Vec<u8>| Inode {
            seen: content.clone(),
            durable: content,
            ..Inode::default()
        };
        Self(Arc::new(Mutex::new(State {
            inodes: contents.into_iter().map(inode).collect(),
            durable_names: names.clone(),
            names,
            pending_names: Vec::new(),
            capacity,
            boasts: false,
            operations: 0,
            fault: None,
            dead: false,
            syncs: 0,
            dice,
        })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk after the power came back: a new one, so that the old store cannot touch it.
    #[must_use]
    pub fn crash(&self) -> Self {
        let mut state = self.lock();
        state.dead = true;
        let state = &mut *state;
        let mut names = state.durable_names.clone();
        let odds = [0.0, 0.5, 0.9, 1.0][state.dice.random_range(0..4)];
        for change in &state.pending_names {
            if state.dice.random_bool(odds) {
                apply_name(&mut names, change);
            }
        }
        let contents =
            state.inodes.iter().map(|inode| inode.after_power_cut(&mut state.dice)).collect();
        Self::with(names, contents, StdRng::seed_from_u64(state.dice.random()), state.capacity)
    }

    /// The disk after the process was killed: nothing is lost, and nothing more is durable.
    #[must_use]
    pub fn kill(&self) -> Self {
        self.cut();
        self.copy()
    }

    /// Another disk with the same on it.
    #[must_use]
    pub fn copy(&self) -> Self {
        let mut state = self.lock();
        let dice = StdRng::seed_from_u64(state.dice.random());
        let after = Self::with(BTreeMap::new(), Vec::new(), dice, state.capacity);
        let mut new = after.lock();
        new.inodes = state.inodes.clone();
        new.names = state.names.clone();
        new.durable_names = state.durable_names.clone();
        new.pending_names = state.pending_names.clone();
        drop(new);
        after
    }

    /// Lets `fault` happen to the operation `after` more from now.
    pub fn fault(&self, after: u64, fault: Fault) {
        let mut state = self.lock();
        state.fault = Some((state.operations + after, fault));
    }

    /// The power goes now.
    pub fn cut(&self) {
        self.lock().dead = true;
    }

    /// Lets no fault happen.
    pub fn no_fault(&self) {
        self.lock().fault = None;
    }

    /// Whether its power is gone.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Flips one bit of one file at rest; says in which file, if any has bits.
    pub fn flip(&self) -> Option<String> {
        let mut state = self.lock();
        let state = &mut *state;
        let with_bytes = |inode: &usize| !state.inodes[*inode].seen.is_empty();
        let files: Vec<(String, usize)> = state
            .names
            .iter()
            .filter(|(_, i)| with_bytes(i))
            .map(|(n, i)| (n.clone(), *i))
            .collect();
        let (name, at) = files.get(state.dice.random_range(0..files.len().max(1)))?.clone();
        let inode = &mut state.inodes[at];
        let bit = state.dice.random_range(0..inode.seen.len() * 8);
        for bytes in [&mut inode.seen, &mut inode.durable] {
            if let Some(byte) = bytes.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
        }
        Some(name)
    }

    /// Makes the disk so large that `free` bytes are left.
    pub fn leave(&self, free: usize) {
        let mut state = self.lock();
        state.capacity = state.used() + free;
    }

    /// Lets it say that it has room even when it has none.
    pub fn boast(&self, boasts: bool) {
        self.lock().boasts = boasts;
    }

    /// Bytes that its files take.
    #[must_use]
    pub fn used(&self) -> usize {
        self.lock().used()
    }

    /// Syncs of files so far.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// The names of its files.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        self.lock().names.keys().cloned().collect()
    }
}
