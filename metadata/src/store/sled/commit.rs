//! The commit thread: the only one that changes sled's tree.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::acknowledged::Acknowledged;
use super::tree::{Old, REVISION_KEY, Shared, tree_key, tree_value};
use super::{Durability, GROUP_BYTES_MAX, GROUP_SWAPS_MAX};
use crate::store::{Action, Change, Key, StoreError, Swap, Version};

type Answer = Result<Version, StoreError>;

/// A swap and who waits for it.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) swap: Swap,
    pub(super) reply: oneshot::Sender<Answer>,
}

/// See the module.
pub(super) struct Committer {
    db: sled::Db,
    shared: Arc<Shared>,
    durability: Box<dyn Durability>,
    acknowledged: Acknowledged,
    revision: u64,
}

/// Swaps that have been checked and wait for the sync that they share.
#[derive(Default)]
struct Group {
    /// The state of each key that the group changes, before and after it.
    before: BTreeMap<Key, Old>,
    after: BTreeMap<Key, Old>,
    /// Per version, in order of key.
    changes: Vec<Vec<Change>>,
    answers: Vec<(oneshot::Sender<Answer>, Answer)>,
    bytes: usize,
}

impl Committer {
    pub(super) fn new(
        db: sled::Db,
        shared: Arc<Shared>,
        durability: Box<dyn Durability>,
        (acknowledged, revision): (Acknowledged, u64),
    ) -> Self {
        Self { db, shared, durability, acknowledged, revision }
    }

    /// Commits until every sender has gone.
    pub(super) fn run(mut self, mut pending: mpsc::Receiver<Pending>) {
        while let Some(first) = pending.blocking_recv() {
            let mut group = Group::default();
            self.admit(&mut group, first);
            // Whoever came while the last group was being synced shares the next sync.
            while group.answers.len() < GROUP_SWAPS_MAX && group.bytes < GROUP_BYTES_MAX {
                let Ok(next) = pending.try_recv() else { break };
                self.admit(&mut group, next);
            }
            self.commit(group);
        }
    }

    /// Checks a swap against the state that the group has reached, and adds its changes to it.
    fn admit(&mut self, group: &mut Group, pending: Pending) {
        let Pending { swap, reply } = pending;
        group.bytes += swap.bytes();
        let answer = match self.expected(group, &swap) {
            Ok(()) => Ok(self.stage(group, &swap)),
            Err(error) => Err(error),
        };
        group.answers.push((reply, answer));
    }

    fn expected(&self, group: &mut Group, swap: &Swap) -> Result<(), StoreError> {
        self.shared.alive()?;
        for op in swap.ops() {
            if !group.after.contains_key(&op.key) {
                let stored = self.shared.newest(&op.key)?;
                group.after.insert(op.key.clone(), stored);
            }
            let current = group.after.get(&op.key).and_then(|old| old.as_ref());
            if !op.expect.holds(current.map(|(version, _)| *version)) {
                return Err(StoreError::Conflict { key: op.key.clone() });
            }
        }
        Ok(())
    }

    fn stage(&mut self, group: &mut Group, swap: &Swap) -> Version {
        let version = Version(self.revision + 1);
        let mut changes = Vec::new();
        for op in swap.ops() {
            let value: Option<Bytes> = match &op.action {
                Action::Keep => continue,
                Action::Put(value) => Some(value.clone()),
                Action::Delete => None,
            };
            let new = value.clone().map(|value| (version, value));
            let old = group.after.insert(op.key.clone(), new).flatten();
            if value.is_none() && old.is_none() {
                continue;
            }
            group.before.entry(op.key.clone()).or_insert(old);
            changes.push(Change { key: op.key.clone(), version, value });
        }
        if changes.is_empty() {
            return Version(self.revision);
        }
        self.revision = version.0;
        changes.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        group.changes.push(changes);
        version
    }

    fn commit(&mut self, group: Group) {
        let Group { before, after, changes, answers, .. } = group;
        let failure = if changes.is_empty() {
            None
        } else {
            let batch = self.batch(&before, &after);
            self.write(before, batch).err().map(|detail| self.shared.poison(detail))
        };
        if failure.is_none() {
            self.hide_nothing();
            for version in &changes {
                self.shared.watchers.show(version);
            }
        }
        for (reply, answer) in answers {
            // Even a conflict may have been with a swap of this very group.
            let answer = failure.clone().map_or(answer, Err);
            // Whoever asked may have gone: the swap has happened all the same.
            drop(reply.send(answer));
        }
    }

    fn batch(&self, before: &BTreeMap<Key, Old>, after: &BTreeMap<Key, Old>) -> sled::Batch {
        let mut batch = sled::Batch::default();
        for key in before.keys() {
            match after.get(key).and_then(|new| new.as_ref()) {
                Some((version, value)) => {
                    batch.insert(tree_key(key), tree_value(*version, value));
                }
                None => batch.remove(tree_key(key)),
            }
        }
        batch.insert(REVISION_KEY, tree_value(Version(self.revision), &[]));
        batch
    }

    /// Applies a batch and makes it durable; readers see the values before it meanwhile.
    fn write(&mut self, before: BTreeMap<Key, Old>, batch: sled::Batch) -> Result<(), String> {
        {
            let mut hidden = self.shared.before.write().unwrap_or_else(PoisonError::into_inner);
            *hidden = before;
            self.db.apply_batch(batch).map_err(|error| format!("a write failed: {error}"))?;
        }
        self.db.flush().map_err(|error| format!("a write failed: {error}"))?;
        self.durability.sync().map_err(|error| format!("a sync failed: {error}"))?;
        let noted = self.acknowledged.note(self.revision);
        noted.map_err(|error| format!("a write failed: {error}"))
    }

    fn hide_nothing(&self) {
        self.shared.before.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.poison("the commit thread panicked".to_owned());
        }
    }
}
