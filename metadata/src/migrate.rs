//! From the embedded store to an etcd.
//!
//! 1. The directory's lock is taken: no server uses it.
//! 2. The repository in etcd is claimed: it is empty, and servers refuse it until step 5.
//! 3. Every record is copied, then both sides are read and compared.
//! 4. The directory is marked as moved: servers refuse it from now on. Its store stays as it is.
//! 5. The repository in etcd is released.
//!
//! So at no instant may both be used. Broken off anywhere, it can be run again with the same arguments.

use std::path::Path;

use crate::directory::{Directory, DirectoryError};
use crate::store::etcd::{Claim, EtcdOpenError, EtcdStore, EtcdTarget};
use crate::store::sled::{SledOpenError, SledStore};
use crate::store::{
    Entry, Expect, Key, MetaStore, PAGE_ENTRIES_MAX, SWAP_BYTES_MAX, SWAP_KEYS_MAX, StoreError,
    Swap,
};

/// Why records were not moved.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Its store cannot be opened.
    #[error(transparent)]
    Sled(#[from] SledOpenError),
    /// The repository in etcd cannot be claimed or released.
    #[error(transparent)]
    Etcd(#[from] EtcdOpenError),
    /// A record could not be read or written.
    #[error("cannot copy the records: {0}")]
    Copy(#[from] StoreError),
    /// The copy is not the original.
    #[error("the copy differs at key {key:?}; the directory is as it was; run it again")]
    Differs {
        /// The first key that differs.
        key: Key,
    },
}

/// What was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// How many records.
    pub records: u64,
    /// Their keys and values together.
    pub bytes: u64,
}

/// Moves the records of the directory `from` to the repository that `to` names.
///
/// # Errors
/// See [`MigrateError`]. Unless the directory was marked as moved, it can be used as before.
pub async fn migrate(from: &Path, to: &EtcdTarget) -> Result<Migrated, MigrateError> {
    let directory = Directory::open_to_move(from, &to.to_string())?;
    let source = SledStore::open(&directory.store()).await?;
    let claim = Claim::new(to).await?;
    let moved = copy(&source, claim.store()).await?;
    compare(&source, claim.store()).await?;
    if !directory.is_moved() {
        directory.mark_moved(&to.to_string())?;
    }
    claim.finish().await?;
    Ok(moved)
}

/// All records of a store, page after page.
struct Walk<'a> {
    store: &'a dyn MetaStore,
    page: std::vec::IntoIter<Entry>,
    after: Option<Key>,
    more: bool,
}

impl<'a> Walk<'a> {
    fn new(store: &'a dyn MetaStore) -> Self {
        Self { store, page: Vec::new().into_iter(), after: None, more: true }
    }

    async fn next(&mut self) -> Result<Option<Entry>, StoreError> {
        loop {
            if let Some(entry) = self.page.next() {
                self.after = Some(entry.key.clone());
                return Ok(Some(entry));
            }
            if !self.more {
                return Ok(None);
            }
            let page = self.store.list(b"", self.after.as_ref(), PAGE_ENTRIES_MAX).await?;
            self.more = page.more;
            self.page = page.entries.into_iter();
        }
    }
}

async fn copy(source: &SledStore, to: &EtcdStore) -> Result<Migrated, StoreError> {
    let mut moved = Migrated { records: 0, bytes: 0 };
    let mut walk = Walk::new(source);
    let mut swap = Swap::new();
    while let Some(Entry { key, value, .. }) = walk.next().await? {
        let bytes = key.as_slice().len() + value.len();
        if swap.ops().len() == SWAP_KEYS_MAX || swap.bytes() + bytes > SWAP_BYTES_MAX {
            put(to, std::mem::take(&mut swap)).await?;
        }
        moved.records += 1;
        moved.bytes += bytes as u64;
        // Nobody else writes, so it may be written twice.
        swap = swap.put(key, Expect::Any, value);
    }
    put(to, swap).await?;
    Ok(moved)
}

/// Attempts at one swap: an etcd that has lost a member for longer is not waited for.
const PUT_ATTEMPTS: u32 = 3;

async fn put(to: &EtcdStore, swap: Swap) -> Result<(), StoreError> {
    let mut attempts = 1;
    loop {
        match to.swap(swap.clone()).await {
            Ok(_) => return Ok(()),
            Err(StoreError::Unavailable { .. }) if attempts < PUT_ATTEMPTS => attempts += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Whether both hold the same keys with the same values.
async fn compare(source: &SledStore, to: &EtcdStore) -> Result<(), MigrateError> {
    let (mut ours, mut theirs) = (Walk::new(source), Walk::new(to));
    loop {
        match (ours.next().await?, theirs.next().await?) {
            (None, None) => return Ok(()),
            (Some(a), Some(b)) if (&a.key, &a.value) == (&b.key, &b.value) => {}
            (Some(a), Some(b)) => return Err(MigrateError::Differs { key: a.key.min(b.key) }),
            (Some(one), None) | (None, Some(one)) => {
                return Err(MigrateError::Differs { key: one.key });
            }
        }
    }
}
