//! Where every record is: the index, in memory.
//!
//! Sharded by the first bits of the id, so that writers and readers seldom meet in one lock and
//! so that walking the shards in order walks the ids in order.

mod table;

use std::sync::RwLock;

use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::RecordKind;

use crate::format::Key;
pub(crate) use table::State;
use table::Table;

/// Shards, a power of two: with ten million records a shard holds ten thousand, which a page of a
/// listing sorts in well under a millisecond.
const SHARDS: usize = 1024;

/// The index. All calls are atomic by themselves; only the writer changes it.
pub(crate) struct Index {
    shards: Vec<RwLock<Table>>,
}

impl Index {
    pub(crate) fn new() -> Self {
        let seed = rand::random();
        Self { shards: (0..SHARDS).map(|_| RwLock::new(Table::new(seed))).collect() }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<State> {
        self.read(shard(key)).get(key)
    }

    /// Sets the state of `key`; returns the one before.
    pub(crate) fn insert(&self, key: &Key, state: State) -> Option<State> {
        self.write(shard(key)).insert(key, state)
    }

    /// Forgets `key`; returns what was known.
    pub(crate) fn remove(&self, key: &Key) -> Option<State> {
        self.write(shard(key)).remove(key)
    }

    /// Changes the state of `key` where there is one; says whether there was.
    pub(crate) fn update(&self, key: &Key, change: impl FnOnce(&mut State)) -> bool {
        let mut table = self.write(shard(key));
        let Some(mut state) = table.get(key) else { return false };
        change(&mut state);
        table.insert(key, state);
        true
    }

    /// Up to `limit` records of one kind in order of (id, shard), beginning behind `after`; and
    /// whether there are more.
    pub(crate) fn list(
        &self,
        pool: u32,
        kind: RecordKind,
        after: Option<RecordKey>,
        limit: usize,
    ) -> (Vec<(RecordKey, State)>, bool) {
        let mut found = Vec::new();
        let first = after.map_or(0, |record| shard(&Key { pool, record }));
        for at in first..SHARDS {
            let start = found.len();
            let table = self.read(at);
            found.extend(table.iter().filter_map(|(key, state)| {
                let record = key.record;
                let wanted = key.pool == pool
                    && record.kind == kind
                    && after.is_none_or(|after| order(&record) > order(&after));
                wanted.then_some((record, state))
            }));
            drop(table);
            found[start..].sort_unstable_by_key(|(record, _)| order(record));
            if found.len() > limit {
                found.truncate(limit);
                return (found, true);
            }
        }
        (found, false)
    }

    /// How many records there are.
    pub(crate) fn len(&self) -> u64 {
        (0..SHARDS).map(|at| self.read(at).len() as u64).sum()
    }

    /// How many are known to be unreadable.
    pub(crate) fn damaged(&self) -> u64 {
        (0..SHARDS).map(|at| self.read(at).damaged() as u64).sum()
    }

    /// Bytes of memory that it takes.
    pub(crate) fn memory(&self) -> u64 {
        (0..SHARDS).map(|at| self.read(at).memory() as u64).sum()
    }

    fn read(&self, at: usize) -> std::sync::RwLockReadGuard<'_, Table> {
        self.shards[at].read().expect("no holder of this lock panics")
    }

    fn write(&self, at: usize) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.shards[at].write().expect("no holder of this lock panics")
    }
}

/// What a listing is sorted by.
fn order(record: &RecordKey) -> (blobcr_proto::Hash, u8) {
    (record.id, record.shard)
}

/// The shard that holds `key`: its id's first bits, so that shards are in the order of ids.
fn shard(key: &Key) -> usize {
    (key.record.id.prefix() >> (64 - SHARDS.trailing_zeros())) as usize
}
