//! A host's file system that knows what is durable: what a file held at its last fsync, and the
//! names that a directory had at its last. From that it makes what a power failure would leave,
//! where every block that was written since the last fsync may or may not have reached the disk.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::*;

/// Tells files apart even when their inode number is used again.
type Identity = (u64, SystemTime);

const BLOCK: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The daemon is killed: the page cache stays.
    Kill,
    /// The host goes down.
    Host,
}

#[derive(Debug)]
struct Armed {
    crash: Crash,
    /// Calls to go.
    calls: u32,
    from: PathBuf,
    to: PathBuf,
}

#[derive(Debug)]
struct Inner {
    rng: StdRng,
    synced: HashMap<Identity, Vec<u8>>,
    names: HashMap<PathBuf, BTreeMap<String, Option<Identity>>>,
    armed: Option<Armed>,
    /// Which files cannot grow.
    full: Vec<Which>,
    /// Whose next sync fails.
    failing: Option<Which>,
    syncs: HashMap<Which, u64>,
    started: HashMap<Which, u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct CrashFiles(Mutex<Inner>);

fn identity(file: &File) -> Identity {
    let metadata = file.metadata().unwrap();
    (metadata.ino(), metadata.created().unwrap())
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn full() -> io::Error {
    io::Error::from(io::ErrorKind::StorageFull)
}

impl CrashFiles {
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner {
            rng: StdRng::seed_from_u64(seed),
            synced: HashMap::new(),
            names: HashMap::new(),
            armed: None,
            full: Vec::new(),
            failing: None,
            syncs: HashMap::new(),
            started: HashMap::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_full(&self, files: &[Which]) {
        self.inner().full = files.to_vec();
    }

    pub(crate) fn fail_next_sync(&self, which: Which) {
        self.inner().failing = Some(which);
    }

    pub(crate) fn syncs(&self, which: Which) -> u64 {
        self.inner().syncs.get(&which).copied().unwrap_or(0)
    }

    /// How often it was begun to write the file out.
    pub(crate) fn started(&self, which: Which) -> u64 {
        self.inner().started.get(&which).copied().unwrap_or(0)
    }

    /// Makes `to` what a crash now would leave of the disk in `from`.
    pub(crate) fn crash(&self, crash: Crash, from: &Path, to: &Path) {
        self.inner().take(crash, from, to);
    }

    /// The same in front of the `calls`-th call from now.
    pub(crate) fn arm(&self, crash: Crash, calls: u32, from: &Path, to: &Path) {
        let (from, to) = (from.to_owned(), to.to_owned());
        self.inner().armed = Some(Armed { crash, calls, from, to });
    }

    /// Whether it came to that.
    pub(crate) fn disarm(&self) -> bool {
        self.inner().armed.take().is_none()
    }

    fn call(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner();
        match &mut inner.armed {
            Some(armed) if armed.calls == 0 => {
                let Armed { crash, from, to, .. } = inner.armed.take().unwrap();
                inner.take(crash, &from, &to);
            }
            Some(armed) => armed.calls -= 1,
            None => {}
        }
        inner
    }
}

impl Inner {
    fn take(&mut self, crash: Crash, from: &Path, to: &Path) {
        std::fs::create_dir(to).unwrap();
        let names = match self.names.get(from) {
            Some(durable) if crash == Crash::Host && self.rng.random() => {
                durable.keys().cloned().collect()
            }
            _ => listing(from),
        };
        for name in names {
            let (source, target) = (from.join(&name), to.join(&name));
            let durable = self.names.get(from).and_then(|names| names.get(&name)).copied();
            let is_directory = source.is_dir() || (!source.exists() && durable == Some(None));
            if is_directory {
                self.take(crash, &source, &target);
                continue;
            }
            let present = File::open(&source).ok().map(|file| (identity(&file), content(&file)));
            let bytes = match (crash, present, durable.flatten()) {
                (Crash::Kill, Some((_, now)), _) => now,
                // Just deleted in the background: an old generation.
                (Crash::Kill, None, _) => continue,
                (Crash::Host, Some((id, now)), _) => {
                    let synced = self.synced.get(&id).cloned().unwrap_or_default();
                    self.mix(synced, now)
                }
                (Crash::Host, None, Some(id)) => self.synced.get(&id).cloned().unwrap_or_default(),
                (Crash::Host, None, None) => continue,
            };
            std::fs::write(&target, &bytes).unwrap();
            let id = identity(&File::open(&target).unwrap());
            self.synced.insert(id, bytes);
        }
        self.sync_names(to);
    }

    /// Some blocks as they were synced, some as they are now.
    fn mix(&mut self, synced: Vec<u8>, now: Vec<u8>) -> Vec<u8> {
        let share: f64 = [0.0, 0.5, 1.0][self.rng.random_range(0..3)];
        let longer = self.rng.random_bool(share);
        let len = if longer { now.len() } else { synced.len() };
        let mut mixed = vec![0; len];
        for start in (0..len).step_by(BLOCK) {
            let from = if self.rng.random_bool(share) { &now } else { &synced };
            let end = (start + BLOCK).min(len).min(from.len());
            if start < end {
                mixed[start..end].copy_from_slice(&from[start..end]);
            }
        }
        mixed
    }

    fn sync_names(&mut self, directory: &Path) {
        let mut names = BTreeMap::new();
        for name in listing(directory) {
            let path = directory.join(&name);
            let file = path.is_file().then(|| identity(&File::open(&path).unwrap()));
            names.insert(name, file);
        }
        self.names.insert(directory.to_owned(), names);
    }
}

fn listing(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

impl FileIo for CrashFiles {
    fn write_all_at(&self, which: Which, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.call();
        if inner.full.contains(&which) {
            // Some of it still fits, up to a border of blocks.
            let end = offset as usize + inner.rng.random_range(0..=bytes.len());
            let fits = (end / BLOCK * BLOCK).saturating_sub(offset as usize);
            file.write_all_at(&bytes[..fits], offset)?;
            return Err(full());
        }
        file.write_all_at(bytes, offset)
    }

    fn sync_data(&self, which: Which, file: &File) -> io::Result<()> {
        let mut inner = self.call();
        if inner.failing == Some(which) {
            inner.failing = None;
            return Err(io::Error::other("planned"));
        }
        *inner.syncs.entry(which).or_default() += 1;
        inner.synced.insert(identity(file), content(file));
        Ok(())
    }

    fn start_write_out(&self, which: Which, _file: &File) {
        *self.inner().started.entry(which).or_default() += 1;
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.call().sync_names(path);
        Ok(())
    }

    fn allocate(&self, which: Which, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let inner = self.call();
        if inner.full.contains(&which) {
            return Err(full());
        }
        HostFiles.allocate(which, file, offset, len)
    }

    fn punch_hole(&self, which: Which, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let _inner = self.call();
        HostFiles.punch_hole(which, file, offset, len)
    }
}
