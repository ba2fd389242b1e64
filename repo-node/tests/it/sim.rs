//! A disk that forgets what was not synced, tears writes, runs full and fails, as told.
//!
//! After [`SimDisk::crash`], each 512-byte sector written since a file's last sync is there or
//! not, each create, rename and unlink since the last directory sync has happened or not, and
//! lengths are anything in between, by the dice of a seed. That is harsher than real file systems.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard};

use blobcr_repo_node::disk::{Disk, DiskFile, Space};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SECTOR: usize = 512;

/// What happens to the operation whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The power goes; this and all later operations fail.
    PowerCut,
    /// This write fails, part of it done.
    WriteFails,
    /// This sync fails, and what it should have synced may never reach the disk.
    SyncFails,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

#[derive(Clone, Debug, Default)]
struct Inode {
    /// What a reader sees.
    seen: Vec<u8>,
    /// What is on the medium.
    durable: Vec<u8>,
    /// What is on its way there.
    pending: Vec<Change>,
    /// Room taken by `allocate`.
    allocated: usize,
}

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Unlink(String),
}

fn apply_name(names: &mut BTreeMap<String, usize>, change: &NameChange) {
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

fn apply(content: &mut Vec<u8>, change: &Change) {
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
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    pending_names: Vec<NameChange>,
    capacity: usize,
    /// It says that it has room even when it has none, as with a quota.
    boasts: bool,
    /// Operations that change something, so far.
    operations: u64,
    fault: Option<(u64, Fault)>,
    dead: bool,
    syncs: u64,
    dice: StdRng,
}

impl State {
    fn used(&self) -> usize {
        self.names.values().map(|inode| &self.inodes[*inode]).map(Inode::room).sum()
    }

    /// Counts an operation; fails when the power is gone. Says whether its turn for a fault came.
    fn step(&mut self) -> io::Result<Option<Fault>> {
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
    fn room(&self) -> usize {
        self.seen.len().max(self.allocated)
    }

    /// What a power cut leaves.
    fn after_power_cut(&self, dice: &mut StdRng) -> Vec<u8> {
        let mut content = self.durable.clone();
        // Sometimes all of it got there, sometimes nothing, mostly something.
        let odds = *[0.0, 0.3, 0.7, 0.95, 1.0].get(dice.random_range(0..5)).unwrap();
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

fn gone() -> io::Error {
    io::Error::other("the power is gone")
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug)]
pub(crate) struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    pub(crate) fn new(seed: u64) -> Self {
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

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The disk after the power came back: a new one, so that the old store cannot touch it.
    pub(crate) fn crash(&self) -> Self {
        let mut state = self.lock();
        state.dead = true;
        let state = &mut *state;
        let mut names = state.durable_names.clone();
        let odds = *[0.0, 0.5, 0.9, 1.0].get(state.dice.random_range(0..4)).unwrap();
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
    pub(crate) fn kill(&self) -> Self {
        let mut state = self.lock();
        state.dead = true;
        let after = Self::with(
            BTreeMap::new(),
            Vec::new(),
            StdRng::seed_from_u64(state.dice.random()),
            state.capacity,
        );
        let mut new = after.lock();
        new.inodes = state.inodes.clone();
        new.names = state.names.clone();
        new.durable_names = state.durable_names.clone();
        new.pending_names = state.pending_names.clone();
        drop(new);
        after
    }

    /// Lets `fault` happen to the operation `after` more from now.
    pub(crate) fn fault(&self, after: u64, fault: Fault) {
        let mut state = self.lock();
        state.fault = Some((state.operations + after, fault));
    }

    pub(crate) fn no_fault(&self) {
        self.lock().fault = None;
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Makes the disk so large that `free` bytes are left.
    pub(crate) fn leave(&self, free: usize) {
        let mut state = self.lock();
        state.capacity = state.used() + free;
    }

    /// Lets it say that it has room even when it has none.
    pub(crate) fn boast(&self, boasts: bool) {
        self.lock().boasts = boasts;
    }

    /// Bytes that its files take.
    pub(crate) fn used(&self) -> usize {
        self.lock().used()
    }

    pub(crate) fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    pub(crate) fn files(&self) -> Vec<String> {
        self.lock().names.keys().cloned().collect()
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl Disk for SimDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.lock();
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = state.inodes.len();
        let change = NameChange::Create(name.to_owned(), inode);
        let cut = state.step()?.is_some() && state.dead;
        state.inodes.push(Inode::default());
        apply_name(&mut state.names, &change);
        state.pending_names.push(change);
        if cut { Err(gone()) } else { Ok(Arc::new(SimFile { disk: self.clone(), inode })) }
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.lock();
        let inode = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files())
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        let mut state = self.lock();
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.step()?;
        let change = NameChange::Unlink(name.to_owned());
        apply_name(&mut state.names, &change);
        state.pending_names.push(change);
        if state.dead { Err(gone()) } else { Ok(()) }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.step()?;
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        apply_name(&mut state.names, &change);
        state.pending_names.push(change);
        if state.dead { Err(gone()) } else { Ok(()) }
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.lock();
        if state.step()? == Some(Fault::SyncFails) {
            state.fault = None;
            return Err(io::Error::other("the sync failed"));
        }
        if state.dead {
            return Err(gone());
        }
        state.durable_names = state.names.clone();
        state.pending_names.clear();
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let state = self.lock();
        let free = state.capacity.saturating_sub(state.used());
        let free = if state.boasts { usize::MAX >> 1 } else { free };
        Ok(Space { capacity: state.capacity as u64, free: free as u64 })
    }
}

impl DiskFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.lock().inodes[self.inode].seen.len() as u64)
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let state = self.disk.lock();
        let seen = &state.inodes[self.inode].seen;
        let start = (offset as usize).min(seen.len());
        Ok(seen[start..(start + len).min(seen.len())].to_vec())
    }

    fn write_at(&self, offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut state = self.disk.lock();
        let fails = state.step()? == Some(Fault::WriteFails);
        if fails {
            state.fault = None;
        }
        let mut bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        let end = offset as usize + bytes.len();
        let room = state.inodes[self.inode].room();
        let free = state.capacity.saturating_sub(state.used());
        // As a real disk, it writes what there is room for before it complains.
        let cut = end.saturating_sub(room + free);
        bytes.truncate(bytes.len().saturating_sub(cut));
        if state.dead || fails {
            let some = state.dice.random_range(0..=bytes.len());
            bytes.truncate(some);
        }
        let change = Change::Write { offset: offset as usize, bytes };
        let inode = &mut state.inodes[self.inode];
        apply(&mut inode.seen, &change);
        inode.pending.push(change);
        match () {
            () if state.dead => Err(gone()),
            () if fails => Err(io::Error::other("the write failed")),
            () if cut > 0 => Err(io::ErrorKind::StorageFull.into()),
            () => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.lock();
        let fault = state.step()?;
        state.syncs += 1;
        let mut dice = StdRng::seed_from_u64(state.dice.random());
        let dead = state.dead;
        if fault == Some(Fault::SyncFails) {
            state.fault = None;
        }
        let inode = &mut state.inodes[self.inode];
        match fault {
            None | Some(Fault::WriteFails) => {
                // Not what is seen: pages that an earlier sync failed to write count as clean.
                for change in std::mem::take(&mut inode.pending) {
                    apply(&mut inode.durable, &change);
                }
                Ok(())
            }
            Some(_) if dead => Err(gone()),
            Some(_) => {
                // The pages are clean now, and some never reached the medium: readers still see
                // them, until they do not.
                inode.durable = inode.after_power_cut(&mut dice);
                inode.pending.clear();
                Err(io::Error::other("the sync failed"))
            }
        }
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.step()?;
        let inode = &mut state.inodes[self.inode];
        let change = Change::Truncate(len as usize);
        apply(&mut inode.seen, &change);
        inode.allocated = inode.allocated.min(len as usize);
        inode.pending.push(change);
        if state.dead { Err(gone()) } else { Ok(()) }
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.step()?;
        let free = state.capacity.saturating_sub(state.used());
        let inode = &mut state.inodes[self.inode];
        let more = (len as usize).saturating_sub(inode.room());
        if more > free {
            return Err(io::ErrorKind::StorageFull.into());
        }
        inode.allocated = inode.allocated.max(len as usize);
        if state.dead { Err(gone()) } else { Ok(()) }
    }
}
