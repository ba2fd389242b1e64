//! A backend in memory, for tests: the contract without the durability.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::watchers::Watchers;
use super::{
    Action, Change, Entry, Key, MetaStore, Page, StoreError, Swap, Version, Watch, check_key,
    page_limit,
};

#[derive(Debug, Default)]
struct State {
    revision: u64,
    values: BTreeMap<Key, (Version, Bytes)>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    watchers: Watchers,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry((key, (version, value)): (&Key, &(Version, Bytes))) -> Entry {
    Entry { key: key.clone(), value: value.clone(), version: *version }
}

#[async_trait]
impl MetaStore for MemoryStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        check_key(key)?;
        Ok(self.state().values.get_key_value(key).map(entry))
    }

    async fn swap(&self, swap: Swap) -> Result<Version, StoreError> {
        swap.check()?;
        let mut state = self.state();
        for op in swap.ops() {
            if !op.expect.holds(state.values.get(&op.key).map(|(version, _)| *version)) {
                return Err(StoreError::Conflict { key: op.key.clone() });
            }
        }
        let version = Version(state.revision + 1);
        let mut changes = Vec::new();
        for op in swap.ops() {
            let value = match &op.action {
                Action::Keep => continue,
                Action::Put(value) => {
                    state.values.insert(op.key.clone(), (version, value.clone()));
                    Some(value.clone())
                }
                Action::Delete if state.values.remove(&op.key).is_some() => None,
                Action::Delete => continue,
            };
            changes.push(Change { key: op.key.clone(), version, value });
        }
        if changes.is_empty() {
            return Ok(Version(state.revision));
        }
        state.revision = version.0;
        changes.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        self.watchers.show(&changes);
        Ok(version)
    }

    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        let limit = page_limit(limit)?;
        let first = Key::new(prefix.to_vec());
        let start = match after {
            Some(after) if *after >= first => Bound::Excluded(after.clone()),
            _ => Bound::Included(first),
        };
        let state = self.state();
        let mut under = state
            .values
            .range((start, Bound::Unbounded))
            .take_while(|(key, _)| key.as_slice().starts_with(prefix));
        let entries = under.by_ref().take(limit).map(entry).collect();
        Ok(Page { entries, more: under.next().is_some() })
    }

    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError> {
        // Under the same lock as swaps: a watch begins between two of them.
        let _state = self.state();
        Ok(self.watchers.add(prefix))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn conforms() {
        crate::store::conformance::all(Arc::new(MemoryStore::new()), rand::random()).await;
    }
}
