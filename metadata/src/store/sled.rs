//! The embedded backend: sled 0.34 in one directory, with the syncs that it leaves out.
//!
//! # What makes an acknowledged swap survive power loss
//! sled's own `flush` writes its log with `pwrite` and `sync_file_range`, which flushes neither the
//! device's cache nor the file's size and extents. So this backend commits in groups on one thread:
//!
//! 1. the swaps that wait are checked against the tree and against each other;
//! 2. those that may happen go to sled as one batch, which its recovery takes whole or not at all;
//! 3. `flush` writes sled's log, then **`fdatasync` of its file** makes it durable;
//! 4. only then are the new values shown to readers and watchers, and the swaps acknowledged.
//!
//! sled runs without its flush thread, so nothing reaches the file behind the back of step 3.
//! sled may give a segment of its log to new records once whatever replaced the old ones is
//! *stable*, which to sled means `sync_file_range`. That is too early only when the replacing and the
//! overwriting records are in one group, between two syncs; a group is far smaller than a segment
//! ([`GROUP_BYTES_MAX`], [`SEGMENT_BYTES`]) and a segment is given away only after the next one has
//! begun, so it cannot be. When the store opens, everything that an earlier process left in the page
//! cache is synced before sled reads it, because sled trusts what it reads.
//!
//! sled puts values above a quarter of a segment into files of their own, which it never syncs;
//! [`super::VALUE_BYTES_MAX`] keeps its pages below that.
//!
//! A write or sync that fails poisons the store: it refuses everything until it is opened again.
//!
//! # What finds that sled lost something
//! sled takes a damaged record of its log for the end of the log and silently forgets what follows.
//! So the newest acknowledged version is also noted in a file of our own, [`acknowledged`], after
//! each group and before its swaps are acknowledged. That costs no sync: the file can only be behind.
//! A store whose newest version is older than the note does not open.
//!
//! # Layout
//! In sled's default tree: `k` + key → version (8 bytes, big endian) + value; `r` → the newest
//! version, so that versions are not given twice after a delete. Beside sled's files: `acknowledged`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use self::acknowledged::Acknowledged;
use self::commit::{Committer, Pending};
use self::tree::{REVISION_KEY, Shared, damaged, parse, tree_value};
use super::watchers::Watchers;
use super::{Entry, Key, MetaStore, Page, StoreError, Swap, Version, Watch, check_key, page_limit};
use crate::directory::Directory;

mod acknowledged;
mod commit;
mod tree;

/// Swaps in one group at most: bounds how long the first of them waits.
pub const GROUP_SWAPS_MAX: usize = 256;

/// Bytes of the swaps of one group at most (one more swap may cross it). With what sled adds this
/// stays far below [`SEGMENT_BYTES`]; see the module.
pub const GROUP_BYTES_MAX: usize = 256 << 10;

/// sled's log segment. Eight times its default, so that a page of the largest values stays below
/// the quarter at which sled would write it to a file of its own.
const SEGMENT_BYTES: usize = 4 << 20;

/// Memory for sled's page cache: the records of some hundred thousand snapshots.
const CACHE_BYTES: u64 = 64 << 20;

/// Swaps that wait for the commit thread before callers wait for room.
const QUEUE_SWAPS_MAX: usize = 1024;

/// How long opening waits for sled's file lock. A store that was just closed in this process lets go
/// of it a moment later, when sled's own threads end.
const OPEN_WAIT: Duration = Duration::from_secs(5);
const OPEN_RETRY: Duration = Duration::from_millis(5);

/// Makes what sled has written durable. Separate so that tests can make it fail.
pub trait Durability: Send + 'static {
    /// Returns when every byte written to sled's file before the call is durable.
    ///
    /// # Errors
    /// When that cannot be said: the store is then poisoned.
    fn sync(&mut self) -> io::Result<()>;
}

/// `fdatasync` of sled's file. The descriptor was opened before sled wrote, so it sees every
/// write-back error of the file.
#[derive(Debug)]
struct FileDurability(File);

impl Durability for FileDurability {
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// See the module.
#[derive(Debug)]
pub struct SledStore {
    shared: Arc<Shared>,
    queue: Option<mpsc::Sender<Pending>>,
    committer: Option<JoinHandle<()>>,
    // Dropped last.
    _directory: Option<Directory>,
}

/// Why a store was not opened.
#[derive(Debug, thiserror::Error)]
pub enum SledOpenError {
    /// A file or directory could not be made, read or synced.
    #[error("cannot open the metadata store at {}: {source}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// sled refused its files.
    #[error("cannot open the metadata store at {}: {source}; restore it from a copy", path.display())]
    Sled {
        /// Its directory.
        path: PathBuf,
        /// What sled said.
        source: sled::Error,
    },
    /// Its content is not ours.
    #[error("cannot open the metadata store at {}: {source}", path.display())]
    Content {
        /// Its directory.
        path: PathBuf,
        /// What was found.
        source: StoreError,
    },
}

impl SledStore {
    /// Opens the store in `dir`, which is made when it is not there. Only one at a time may be open;
    /// the caller holds a lock to that end.
    ///
    /// # Errors
    /// When the directory cannot be used or its content is damaged.
    pub async fn open(dir: &Path) -> Result<Self, SledOpenError> {
        Self::open_elsewhere(dir, None).await
    }

    /// As [`SledStore::open`], with syncs that a test decides about.
    ///
    /// # Errors
    /// As [`SledStore::open`].
    #[cfg(any(test, feature = "testing"))]
    pub async fn open_with(
        dir: &Path,
        durability: Box<dyn Durability>,
    ) -> Result<Self, SledOpenError> {
        Self::open_elsewhere(dir, Some(durability)).await
    }

    async fn open_elsewhere(
        dir: &Path,
        durability: Option<Box<dyn Durability>>,
    ) -> Result<Self, SledOpenError> {
        let path = dir.to_owned();
        let task = tokio::task::spawn_blocking(move || Self::open_blocking(&path, durability));
        // sled panics over some kinds of damage.
        task.await.unwrap_or_else(|error| {
            let detail = format!("opening it failed: {error}");
            let source = StoreError::Damaged { detail };
            Err(SledOpenError::Content { path: dir.to_owned(), source })
        })
    }

    /// Keeps the lock of a directory for as long as the store is open.
    #[must_use]
    pub fn holding(mut self, directory: Directory) -> Self {
        self._directory = Some(directory);
        self
    }

    fn open_blocking(
        dir: &Path,
        durability: Option<Box<dyn Durability>>,
    ) -> Result<Self, SledOpenError> {
        let io = |source| SledOpenError::Io { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(io)?;
        // What an earlier process left in the page cache: sled is about to trust it.
        sync_tree(dir).map_err(io)?;
        let db = open_sled(dir)?;
        let file = File::open(dir.join("db")).map_err(io)?;
        let content = |source| SledOpenError::Content { path: dir.to_owned(), source };
        let tree = (*db).clone();
        let (acknowledged, revision) = check_revision(dir, &db).map_err(content)?;
        // What sled made: its files, their names, and the name of the directory itself.
        sync_tree(dir).map_err(io)?;
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(io)?;
        }
        let shared = Arc::new(Shared {
            tree,
            before: RwLock::default(),
            watchers: Watchers::default(),
            poison: OnceLock::new(),
        });
        let durability = durability.unwrap_or_else(|| Box::new(FileDurability(file)));
        let (queue, pending) = mpsc::channel(QUEUE_SWAPS_MAX);
        let committer =
            Committer::new(db, Arc::clone(&shared), durability, (acknowledged, revision));
        let committer = std::thread::Builder::new()
            .name("metadata-commit".to_owned())
            .spawn(move || committer.run(pending))
            .map_err(io)?;
        Ok(Self { shared, queue: Some(queue), committer: Some(committer), _directory: None })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.shared.alive()?;
        let shared = Arc::clone(&self.shared);
        match tokio::task::spawn_blocking(move || read(&shared)).await {
            Ok(result) => result,
            Err(error) => Err(self.shared.poison(format!("a read failed: {error}"))),
        }
    }
}

impl Drop for SledStore {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(committer) = self.committer.take()
            && committer.join().is_err()
        {
            tracing::error!("the commit thread of the metadata store had panicked");
        }
        self.shared.watchers.close();
    }
}

fn open_sled(dir: &Path) -> Result<sled::Db, SledOpenError> {
    let config = sled::Config::new()
        .path(dir)
        .flush_every_ms(None)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(CACHE_BYTES);
    let since = Instant::now();
    loop {
        match config.open() {
            Ok(db) => return Ok(db),
            Err(sled::Error::Io(error))
                if error.to_string().contains("could not acquire lock")
                    && since.elapsed() < OPEN_WAIT =>
            {
                std::thread::sleep(OPEN_RETRY);
            }
            Err(source) => return Err(SledOpenError::Sled { path: dir.to_owned(), source }),
        }
    }
}

/// The newest version, after a check that it is not older than what was acknowledged. Marks a new
/// store as one.
fn check_revision(dir: &Path, db: &sled::Db) -> Result<(Acknowledged, u64), StoreError> {
    let stored = db.get(REVISION_KEY).map_err(damaged)?.map(|bytes| parse(&bytes)).transpose()?;
    if stored.is_none() {
        // Durable before the note is there: a note without a mark is a loss.
        db.insert(REVISION_KEY, tree_value(Version(0), &[])).map_err(damaged)?;
        db.flush().map_err(damaged)?;
    }
    let (note, acknowledged) = Acknowledged::open(dir, || sync_tree(dir))?;
    match (stored.map(|(version, _)| version.0), acknowledged) {
        (None, None) => Ok((note, 0)),
        (Some(revision), None) => Ok((note, revision)),
        (Some(revision), Some(acknowledged)) if revision >= acknowledged => Ok((note, revision)),
        (stored, Some(acknowledged)) => Err(StoreError::Damaged {
            detail: format!(
                "version {acknowledged} was acknowledged, but its log ends at {}",
                stored.unwrap_or(0)
            ),
        }),
    }
}

/// Syncs every file and directory below `dir`, and `dir` itself.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}

#[async_trait]
impl MetaStore for SledStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        check_key(key)?;
        let key = key.clone();
        self.blocking(move |shared| shared.get(&key)).await
    }

    async fn swap(&self, swap: Swap) -> Result<Version, StoreError> {
        swap.check()?;
        self.shared.alive()?;
        let (reply, answer) = oneshot::channel();
        let ended = || self.shared.poison("the commit thread has ended".to_owned());
        let Some(queue) = &self.queue else { return Err(ended()) };
        queue.send(Pending { swap, reply }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        let limit = page_limit(limit)?;
        let (prefix, after) = (prefix.to_vec(), after.cloned());
        self.blocking(move |shared| shared.list(&prefix, after.as_ref(), limit)).await
    }

    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError> {
        self.shared.alive()?;
        Ok(self.shared.watchers.add(prefix))
    }
}

#[cfg(feature = "fuzzing")]
pub(crate) fn read_acknowledged(bytes: &[u8]) -> Option<Vec<u8>> {
    let version = acknowledged::decode(bytes).ok()?;
    Some(acknowledged::encode(version).to_vec())
}

#[cfg(feature = "fuzzing")]
pub(crate) fn read_value(bytes: &[u8]) -> Option<Vec<u8>> {
    let (version, value) = tree::parse(bytes).ok()?;
    Some(tree::tree_value(version, &value))
}

#[cfg(test)]
mod tests;
