//! Where the few mutable facts live: one narrow trait, several real backends.
//!
//! | module | holds |
//! |---|---|
//! | [`sled`] | the embedded backend: one directory, one process |
//! | `etcd` | the backend for several processes (feature `etcd`) |
//! | [`watchers`] | delivery of changes, shared by the backends that live in this process |
//! | `memory` | a backend without durability, for tests (feature `testing`) |
//! | `conformance` | the suite that every backend passes (feature `testing`) |

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;

#[cfg(any(test, feature = "testing"))]
pub mod conformance;
#[cfg(feature = "etcd")]
pub mod etcd;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
pub mod sled;
pub mod watchers;

pub use watchers::Watch;

/// The longest key, in bytes. The longest that we build is a member of a checkpoint set: two names
/// of 128 bytes, a sequence and separators.
pub const KEY_BYTES_MAX: usize = 512;

/// The longest value, in bytes. A sled leaf holds up to 17 values and must stay inside a quarter of
/// one log segment: what is larger goes to a side file that sled never syncs.
pub const VALUE_BYTES_MAX: usize = 48 << 10;

/// Keys in one swap at most: half of what etcd takes in one transaction (128) by default.
pub const SWAP_KEYS_MAX: usize = 64;

/// Bytes of keys and values in one swap at most; etcd refuses requests above 1.5 MiB.
pub const SWAP_BYTES_MAX: usize = 256 << 10;

/// Entries in one page of a listing at most: bounds the memory of one call.
pub const PAGE_ENTRIES_MAX: usize = 1000;

/// A key: bytes in lexicographic order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Bytes);

impl Key {
    /// Takes the bytes as they are; a swap checks their length.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// The version of a value: that of the swap which wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

/// A value as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Its bytes.
    pub value: Bytes,
    /// The swap that wrote it.
    pub version: Version,
}

/// What must hold of a key for a swap to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Any,
    /// The key has no value.
    Absent,
    /// The key has the value that this version wrote.
    Version(Version),
}

impl Expect {
    /// Whether `current` (the version of the key's value, if it has one) is what was expected.
    #[must_use]
    pub fn holds(self, current: Option<Version>) -> bool {
        match self {
            Self::Any => true,
            Self::Absent => current.is_none(),
            Self::Version(version) => current == Some(version),
        }
    }
}

/// What a swap does to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leaves it alone: the key takes part for its expectation only.
    Keep,
    /// Gives it a value.
    Put(Bytes),
    /// Removes its value; nothing happens when it has none.
    Delete,
}

/// One key of a swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// The key.
    pub key: Key,
    /// What must hold of it.
    pub expect: Expect,
    /// What happens to it.
    pub action: Action,
}

/// A compare-and-swap of several keys: all of it happens, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swap {
    ops: Vec<Op>,
}

impl Swap {
    /// A swap of no keys yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key that must be as expected and stays as it is.
    #[must_use]
    pub fn keep(self, key: Key, expect: Expect) -> Self {
        self.with(Op { key, expect, action: Action::Keep })
    }

    /// Adds a key that gets a value.
    #[must_use]
    pub fn put(self, key: Key, expect: Expect, value: impl Into<Bytes>) -> Self {
        self.with(Op { key, expect, action: Action::Put(value.into()) })
    }

    /// Adds a key that loses its value.
    #[must_use]
    pub fn delete(self, key: Key, expect: Expect) -> Self {
        self.with(Op { key, expect, action: Action::Delete })
    }

    fn with(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }

    /// Its keys, in the order in which they were added.
    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Bytes of its keys and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let value = |op: &Op| if let Action::Put(value) = &op.action { value.len() } else { 0 };
        self.ops.iter().map(|op| op.key.as_slice().len() + value(op)).sum()
    }

    /// Checks the limits that every backend has; backends call this first.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when a key is empty, too long or named twice, a value is too long, or
    /// the whole is too large.
    pub fn check(&self) -> Result<(), StoreError> {
        let invalid = |detail: String| Err(StoreError::Invalid { detail });
        if self.ops.len() > SWAP_KEYS_MAX {
            return invalid(format!("{} keys, at most {SWAP_KEYS_MAX}", self.ops.len()));
        }
        if self.bytes() > SWAP_BYTES_MAX {
            return invalid(format!("{} bytes, at most {SWAP_BYTES_MAX}", self.bytes()));
        }
        let mut keys: Vec<&Key> = self.ops.iter().map(|op| &op.key).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair.first() == pair.last()) {
            return invalid(format!("key {:?} twice", pair.first()));
        }
        for op in &self.ops {
            check_key(&op.key)?;
            if let Action::Put(value) = &op.action
                && value.len() > VALUE_BYTES_MAX
            {
                let len = value.len();
                return invalid(format!("a value of {len} bytes, at most {VALUE_BYTES_MAX}"));
            }
        }
        Ok(())
    }
}

/// Checks the length of a key.
///
/// # Errors
/// [`StoreError::Invalid`] when it is empty or too long.
pub fn check_key(key: &Key) -> Result<(), StoreError> {
    match key.as_slice().len() {
        1..=KEY_BYTES_MAX => Ok(()),
        len => Err(StoreError::Invalid {
            detail: format!("a key of {len} bytes, from 1 to {KEY_BYTES_MAX} are allowed"),
        }),
    }
}

/// One page of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// In order of key.
    pub entries: Vec<Entry>,
    /// Whether more follow behind the last one.
    pub more: bool,
}

/// One change, as a watcher sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: Key,
    /// The swap that changed it.
    pub version: Version,
    /// Its new value; `None` when it was removed.
    pub value: Option<Bytes>,
}

/// Whether trying again helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Not until somebody mends something.
    Never,
    /// After reading the keys again: another swap came first.
    AfterReading,
    /// Later, with the same request. Whether a swap happened is unknown: it must be idempotent, or
    /// its expectations must tell.
    Later,
}

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// An expectation did not hold; nothing was changed.
    #[error("key {key:?} is not as expected: another change came first")]
    Conflict {
        /// The first key that was not as expected.
        key: Key,
    },
    /// The request is outside the limits that every backend has; nothing was changed.
    #[error("the store refuses the request: {detail}")]
    Invalid {
        /// Which limit.
        detail: String,
    },
    /// The backend cannot be reached. A swap may have happened.
    #[error("the metadata store cannot be reached: {detail}; try again")]
    Unavailable {
        /// What was seen.
        detail: String,
    },
    /// A write or sync failed, so what is on the disk is unknown: the store has stopped.
    #[error("the metadata store has stopped: {detail}; mend the disk, then restart the service")]
    Poisoned {
        /// What failed.
        detail: String,
    },
    /// What is stored is not what was written.
    #[error("the metadata store is damaged: {detail}; restore it from a copy")]
    Damaged {
        /// What was found.
        detail: String,
    },
    /// The watcher fell too far behind, or the store closed: read again, then watch again.
    #[error("the watch has lost changes; read again and watch again")]
    WatchLost,
}

impl StoreError {
    /// Whether trying again helps.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Conflict { .. } | Self::WatchLost => Retry::AfterReading,
            Self::Unavailable { .. } => Retry::Later,
            Self::Invalid { .. } | Self::Poisoned { .. } | Self::Damaged { .. } => Retry::Never,
        }
    }
}

/// A small, ordered, durable map with compare-and-swap.
///
/// # Contract
/// * **Linearizable.** Each `get`, `swap` and page of `list` takes effect at one instant between its
///   call and its return, and all of them in one order that everybody sees. A page is one instant;
///   a listing of several pages is not.
/// * **Durable.** What `swap` acknowledged, and whatever `get`, `list` or a watch ever showed,
///   survives the death of the process and of the host.
/// * **All or nothing.** A swap whose expectations all hold writes all its keys; otherwise it writes
///   none and reports [`StoreError::Conflict`].
/// * **Versions** grow with every swap that writes, across all keys, and are never given twice, not
///   even after a key was deleted or the store reopened. All keys of one swap get the same version.
/// * **Cancelling** the future of a swap leaves open whether it happens; it never half-happens.
/// * **Watch.** A watch that was returned sees every change of a later swap under its prefix, once,
///   in order of version and, within a version, of key. A change is shown only when it is durable
///   and visible to `get`. A watcher that does not keep up gets [`StoreError::WatchLost`] and
///   nothing after it.
#[async_trait]
pub trait MetaStore: fmt::Debug + Send + Sync + 'static {
    /// The value of a key, `None` when it has none.
    ///
    /// # Errors
    /// When the store cannot tell.
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError>;

    /// Does all of `swap`, or nothing. Returns its version; that of the newest swap so far when
    /// there was nothing to write.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when an expectation does not hold.
    async fn swap(&self, swap: Swap) -> Result<Version, StoreError>;

    /// Up to `limit` (and [`PAGE_ENTRIES_MAX`]) entries whose keys begin with `prefix` and come
    /// after `after`, in order of key.
    ///
    /// # Errors
    /// When the store cannot tell, or `limit` is zero.
    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError>;

    /// Shows the changes of keys that begin with `prefix`, from now on.
    ///
    /// # Errors
    /// When the store cannot.
    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError>;
}

/// Checks and caps the limit of a listing; backends call this first.
///
/// # Errors
/// [`StoreError::Invalid`] for zero.
pub fn page_limit(limit: usize) -> Result<usize, StoreError> {
    if limit == 0 {
        return Err(StoreError::Invalid { detail: "a page of no entries".to_owned() });
    }
    Ok(limit.min(PAGE_ENTRIES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new(name.to_owned())
    }

    #[test]
    fn a_swap_outside_the_limits_is_refused() {
        let long = Bytes::from(vec![0; VALUE_BYTES_MAX + 1]);
        let many = (0..=SWAP_KEYS_MAX)
            .fold(Swap::new(), |swap, n| swap.delete(key(&format!("k{n}")), Expect::Any));
        let fat = (0..6).fold(Swap::new(), |swap, n| {
            swap.put(key(&format!("k{n}")), Expect::Any, vec![0; VALUE_BYTES_MAX])
        });
        let bad = [
            Swap::new().put(key("a"), Expect::Any, long),
            many,
            fat,
            Swap::new().delete(key("a"), Expect::Any).keep(key("a"), Expect::Absent),
            Swap::new().delete(key(""), Expect::Any),
            Swap::new().delete(key(&"k".repeat(KEY_BYTES_MAX + 1)), Expect::Any),
        ];
        for swap in bad {
            assert!(matches!(swap.check(), Err(StoreError::Invalid { .. })), "{swap:?}");
        }
        let good = Swap::new().put(key("a"), Expect::Any, vec![0; VALUE_BYTES_MAX]);
        assert_eq!(good.check(), Ok(()));
    }
}
