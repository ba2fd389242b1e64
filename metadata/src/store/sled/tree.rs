//! What sled's tree holds, and how it is read while the commit thread changes it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;

use crate::store::watchers::Watchers;
use crate::store::{Entry, Key, Page, StoreError, Version};

pub(super) type Old = Option<(Version, Bytes)>;

/// What readers and the commit thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tree: sled::Tree,
    /// The values before the group that is being committed, of the keys that it changes: readers see
    /// these until the group is durable. Held for writing while sled's tree changes, so no reader
    /// walks a tree that is being changed.
    pub(super) before: RwLock<BTreeMap<Key, Old>>,
    pub(super) watchers: Watchers,
    pub(super) poison: OnceLock<String>,
}

impl Shared {
    pub(super) fn alive(&self) -> Result<(), StoreError> {
        match self.poison.get() {
            Some(detail) => Err(StoreError::Poisoned { detail: detail.clone() }),
            None => Ok(()),
        }
    }

    pub(super) fn poison(&self, detail: String) -> StoreError {
        let detail = self.poison.get_or_init(|| {
            tracing::error!(%detail, "the metadata store stops");
            detail
        });
        self.watchers.close();
        StoreError::Poisoned { detail: detail.clone() }
    }

    fn before(&self) -> RwLockReadGuard<'_, BTreeMap<Key, Old>> {
        // The map itself cannot be half-changed; a commit thread that died has poisoned the store.
        self.before.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest value, durable or not.
    pub(super) fn newest(&self, key: &Key) -> Result<Old, StoreError> {
        self.tree.get(tree_key(key)).map_err(damaged)?.map(|value| parse(&value)).transpose()
    }

    pub(super) fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        let before = self.before();
        let value = match before.get(key) {
            Some(old) => old.clone(),
            None => self.newest(key)?,
        };
        drop(before);
        self.alive()?;
        Ok(value.map(|(version, value)| Entry { key: key.clone(), value, version }))
    }

    pub(super) fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        let first = Key::new(prefix.to_vec());
        let start = match after {
            Some(after) if *after >= first => Bound::Excluded(after.clone()),
            _ => Bound::Included(first),
        };
        let before = self.before();
        let mut old = before
            .range((start.clone(), Bound::Unbounded))
            .take_while(|(key, _)| key.as_slice().starts_with(prefix))
            .peekable();
        let mut new = self
            .tree
            .range::<Vec<u8>, _>((start.as_ref().map(tree_key), Bound::Unbounded))
            .map(|pair| pair.map_err(damaged))
            .take_while(|pair| pair.as_ref().map_or(true, |(key, _)| under(key, prefix)))
            .peekable();
        let mut page = Page { entries: Vec::new(), more: false };
        loop {
            let next_new = match new.peek() {
                Some(Ok((key, _))) => Some(Key::new(key[1..].to_vec())),
                Some(Err(error)) => return Err(error.clone()),
                None => None,
            };
            // The old value hides the new one of the same key.
            let take_old = match (old.peek(), &next_new) {
                (Some((key, _)), Some(next)) => *key <= next,
                (Some(_), None) => true,
                (None, _) => false,
            };
            let (key, value) = if take_old {
                let Some((key, value)) = old.next() else { break };
                if next_new.as_ref() == Some(key) {
                    new.next();
                }
                let Some(value) = value.clone() else { continue };
                (key.clone(), value)
            } else {
                let (Some(key), Some(pair)) = (next_new, new.next()) else { break };
                (key, parse(&pair?.1)?)
            };
            if page.entries.len() == limit {
                page.more = true;
                break;
            }
            page.entries.push(Entry { key, value: value.1, version: value.0 });
        }
        drop(before);
        self.alive()?;
        Ok(page)
    }
}

const KEY_TAG: u8 = b'k';
pub(super) const REVISION_KEY: &[u8] = b"r";

pub(super) fn tree_key(key: &Key) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + key.as_slice().len());
    bytes.push(KEY_TAG);
    bytes.extend_from_slice(key.as_slice());
    bytes
}

fn under(tree_key: &[u8], prefix: &[u8]) -> bool {
    tree_key.split_first().is_some_and(|(tag, key)| *tag == KEY_TAG && key.starts_with(prefix))
}

pub(super) fn tree_value(version: Version, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + value.len());
    bytes.extend_from_slice(&version.0.to_be_bytes());
    bytes.extend_from_slice(value);
    bytes
}

pub(super) fn parse(stored: &[u8]) -> Result<(Version, Bytes), StoreError> {
    let (version, value) = stored.split_first_chunk::<8>().ok_or_else(|| StoreError::Damaged {
        detail: format!("a value of {} bytes has no version", stored.len()),
    })?;
    Ok((Version(u64::from_be_bytes(*version)), Bytes::copy_from_slice(value)))
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function to map errors with")]
pub(super) fn damaged(error: sled::Error) -> StoreError {
    StoreError::Damaged { detail: error.to_string() }
}
