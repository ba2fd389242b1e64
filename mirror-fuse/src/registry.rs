//! The disks of a host by name and by inode, and who has them open.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use blobcr_proto::DiskName;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::base::DiskBases;
use crate::cache::ChunkCache;
use crate::disk::Disk;
use crate::inode;

/// Who may open a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What the cache gives at a time to a disk that finds the host full: enough for a while, and little
/// enough to be given at once.
const ROOM_BYTES: u64 = 64 << 20;

#[derive(Debug, Default)]
struct Use {
    open: u64,
    /// Somebody is about to change what lies below the file: nobody may open it now.
    closed: bool,
}

/// A disk and its file in the mount.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) disk: Arc<Disk>,
    /// What lies below it.
    pub(crate) bases: Arc<DiskBases>,
    /// Gives way when the host is full.
    cache: Arc<ChunkCache>,
    pub(crate) ino: u64,
    access: Mutex<Access>,
    usage: Mutex<Use>,
    /// Told when nobody has the disk open any more, and when it may be opened again.
    released: Notify,
    modified_unix_ns: AtomicU64,
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is changed in one step each.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Served {
    pub(crate) fn new(
        disk: Arc<Disk>,
        bases: Arc<DiskBases>,
        cache: Arc<ChunkCache>,
        access: Access,
    ) -> Arc<Self> {
        let created = Duration::from_millis(disk.spec().created_unix_ms);
        Arc::new(Self {
            ino: inode::of_disk(disk.name()),
            access: Mutex::new(access),
            usage: Mutex::default(),
            released: Notify::new(),
            modified_unix_ns: AtomicU64::new(u64::try_from(created.as_nanos()).unwrap_or(0)),
            disk,
            bases,
            cache,
        })
    }

    /// Asks the cache to give way, after the host was found full: whether it did, so that another
    /// try may do better. Blocks.
    pub(crate) fn make_room(&self) -> bool {
        self.cache.give_back(ROOM_BYTES) > 0
    }

    pub(crate) fn access(&self) -> Access {
        *lock(&self.access)
    }

    /// Until the mirror ends; after that the file is the configured owner's again.
    pub(crate) fn change_access(&self, change: impl FnOnce(&mut Access)) {
        change(&mut lock(&self.access));
    }

    /// Counts a file handle, until the result is dropped. `None` while the disk is being changed.
    pub(crate) fn open(self: &Arc<Self>) -> Option<OpenDisk> {
        let mut usage = lock(&self.usage);
        (!usage.closed).then(|| {
            usage.open += 1;
            OpenDisk(Arc::clone(self))
        })
    }

    /// Keeps everybody from opening the disk, until the result is dropped. `Err`: that many have
    /// it open already; 0: somebody else has closed it.
    pub(crate) fn close(self: &Arc<Self>) -> Result<Closed, u64> {
        let mut usage = lock(&self.usage);
        if usage.open > 0 || usage.closed {
            return Err(usage.open);
        }
        usage.closed = true;
        Ok(Closed(Arc::clone(self)))
    }

    /// Ends when another try to close the disk may succeed, if that becomes so after the call.
    pub(crate) fn released(&self) -> Notified<'_> {
        self.released.notified()
    }

    pub(crate) fn modified(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.modified_unix_ns.load(Ordering::Relaxed))
    }

    pub(crate) fn touch(&self) {
        self.modified_unix_ns.store(now_ns(), Ordering::Relaxed);
    }
}

/// A file handle.
#[derive(Debug)]
pub(crate) struct OpenDisk(Arc<Served>);

impl std::ops::Deref for OpenDisk {
    type Target = Arc<Served>;
    fn deref(&self) -> &Arc<Served> {
        &self.0
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        let mut usage = lock(&self.0.usage);
        usage.open -= 1;
        if usage.open == 0 {
            self.0.released.notify_waiters();
        }
    }
}

/// Nobody can open the disk.
#[derive(Debug)]
pub(crate) struct Closed(Arc<Served>);

impl Drop for Closed {
    fn drop(&mut self) {
        lock(&self.0.usage).closed = false;
        self.0.released.notify_waiters();
    }
}

/// A name in the registry.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// Being attached or detached.
    Reserved,
    Served(Arc<Served>),
    /// Its files could not be opened; they are left alone for somebody to mend.
    Broken(Arc<str>),
}

/// All disks.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    by_name: RwLock<BTreeMap<String, Entry>>,
    /// For the threads of the mount: reading it takes no lock.
    by_ino: ArcSwap<HashMap<u64, Arc<Served>>>,
}

/// A name that is taken while its disk is being made or removed. It is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    disks: &'a Disks,
    name: String,
    kept: bool,
}

/// Why a name cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// There is a disk of this name.
    Name,
    /// Another name has the same inode number: the next best name will do.
    Inode,
}

impl Disks {
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Entry>> {
        self.by_name.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reserve(&self, name: &DiskName) -> Result<Reservation<'_>, Taken> {
        let mut reserved = self.reserve_all(std::slice::from_ref(name)).map_err(|taken| taken.1)?;
        Ok(reserved.pop().expect("as many as there are names"))
    }

    /// Reserves all of the names, or none: the first that cannot be had is returned.
    pub(crate) fn reserve_all<'n>(
        &self,
        names: &'n [DiskName],
    ) -> Result<Vec<Reservation<'_>>, (&'n DiskName, Taken)> {
        let mut by_name = self.write();
        let mut inodes: HashSet<u64> = by_name.keys().map(|name| inode::of_disk(name)).collect();
        let mut new = BTreeSet::new();
        for name in names {
            if by_name.contains_key(name.as_str()) || !new.insert(name.as_str()) {
                return Err((name, Taken::Name));
            }
            if !inodes.insert(inode::of_disk(name.as_str())) {
                return Err((name, Taken::Inode));
            }
        }
        let reserve = |name: &DiskName| {
            by_name.insert(name.as_str().to_owned(), Entry::Reserved);
            Reservation { disks: self, name: name.as_str().to_owned(), kept: false }
        };
        Ok(names.iter().map(reserve).collect())
    }

    pub(crate) fn get(&self, name: &str) -> Option<Entry> {
        self.read().get(name).cloned()
    }

    pub(crate) fn served(&self, name: &str) -> Option<Arc<Served>> {
        match self.get(name) {
            Some(Entry::Served(served)) => Some(served),
            _ => None,
        }
    }

    pub(crate) fn by_ino(&self, ino: u64) -> Option<Arc<Served>> {
        self.by_ino.load().get(&ino).cloned()
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<(String, Entry)> {
        self.read().iter().map(|(name, entry)| (name.clone(), entry.clone())).collect()
    }

    pub(crate) fn all_served(&self) -> Vec<Arc<Served>> {
        let served = |entry: &Entry| match entry {
            Entry::Served(served) => Some(Arc::clone(served)),
            _ => None,
        };
        self.read().values().filter_map(served).collect()
    }

    pub(crate) fn insert_broken(&self, name: &str, why: &str) {
        self.write().insert(name.to_owned(), Entry::Broken(why.into()));
    }

    pub(crate) fn remove(&self, name: &str) {
        let mut by_name = self.write();
        by_name.remove(name);
        self.publish(&by_name);
    }

    /// The disk is served no more; its name stays taken until the result is dropped.
    pub(crate) fn retire(&self, name: &DiskName) -> Reservation<'_> {
        let mut by_name = self.write();
        by_name.insert(name.as_str().to_owned(), Entry::Reserved);
        self.publish(&by_name);
        Reservation { disks: self, name: name.as_str().to_owned(), kept: false }
    }

    /// Serves disks under the names that were reserved for them.
    pub(crate) fn serve<'a>(
        &'a self,
        disks: impl IntoIterator<Item = (Reservation<'a>, Arc<Served>)>,
    ) {
        let mut by_name = self.write();
        for (mut place, served) in disks {
            by_name.insert(place.name.clone(), Entry::Served(served));
            place.kept = true;
        }
        self.publish(&by_name);
    }

    fn publish(&self, by_name: &BTreeMap<String, Entry>) {
        let by_ino = by_name.values().filter_map(|entry| match entry {
            Entry::Served(served) => Some((served.ino, Arc::clone(served))),
            _ => None,
        });
        self.by_ino.store(Arc::new(by_ino.collect()));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.disks.write().remove(&self.name);
        }
    }
}
