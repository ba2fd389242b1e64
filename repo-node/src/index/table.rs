//! A compact hash table of records: 60 bytes a slot, kept between 76 % and 87.5 % full when it
//! grows, so 69-79 bytes a record.
//!
//! Open addressing with linear probing, displaced entries in Robin Hood order: a search for a key
//! that is not there (every new chunk asks for one) ends as soon as a search for one that is.

use blobcr_proto::Hash;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::RecordKind;

use crate::format::{Key, Location, kind_code};

/// What the index knows of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Where its newest copy is.
    pub(crate) location: Location,
    /// Bytes of its payload.
    pub(crate) stored_len: u32,
    /// The latest generation that put or touched it.
    pub(crate) generation: u64,
    /// It is known to be unreadable.
    pub(crate) damaged: bool,
}

/// A slot. The generation is in two halves so that the alignment stays 4 and the size 60.
#[derive(Clone, Copy)]
struct Slot {
    id: [u8; 32],
    pool: u32,
    segment: u32,
    unit: u32,
    stored_len: u32,
    generation: [u32; 2],
    /// 0 marks a free slot: no kind has that code.
    kind: u8,
    shard: u8,
    damaged: bool,
}

const _: () = assert!(size_of::<Slot>() == 60, "the memory of a million records depends on it");

const FREE: Slot = Slot {
    id: [0; 32],
    pool: 0,
    segment: 0,
    unit: 0,
    stored_len: 0,
    generation: [0; 2],
    kind: 0,
    shard: 0,
    damaged: false,
};

impl Slot {
    fn new(key: &Key, state: State) -> Self {
        Self {
            id: key.record.id.0,
            pool: key.pool,
            segment: state.location.segment,
            unit: state.location.unit,
            stored_len: state.stored_len,
            generation: [state.generation as u32, (state.generation >> 32) as u32],
            kind: kind_code(key.record.kind),
            shard: key.record.shard,
            damaged: state.damaged,
        }
    }

    fn is_free(&self) -> bool {
        self.kind == 0
    }

    fn holds(&self, key: &Key) -> bool {
        self.id == key.record.id.0
            && self.pool == key.pool
            && self.kind == kind_code(key.record.kind)
            && self.shard == key.record.shard
    }

    fn state(&self) -> State {
        let [low, high] = self.generation;
        State {
            location: Location { segment: self.segment, unit: self.unit },
            stored_len: self.stored_len,
            generation: u64::from(low) | u64::from(high) << 32,
            damaged: self.damaged,
        }
    }

    fn key(&self) -> Key {
        let kind = RecordKind::try_from(i32::from(self.kind)).expect("made from a kind");
        let record = RecordKey { kind, id: Hash(self.id), shard: self.shard };
        Key { pool: self.pool, record }
    }
}

/// Slots of the first table of a shard.
const SLOTS_MIN: usize = 16;

/// The table of one shard of the index.
pub(crate) struct Table {
    slots: Vec<Slot>,
    used: usize,
    damaged: usize,
    /// Random in each process, so that no client can choose ids that collide.
    seed: u64,
}

impl Table {
    pub(crate) fn new(seed: u64) -> Self {
        Self { slots: Vec::new(), used: 0, damaged: 0, seed }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<State> {
        self.find(key).ok().map(|at| self.slots[at].state())
    }

    /// Sets the state of `key`; returns the one before.
    pub(crate) fn insert(&mut self, key: &Key, state: State) -> Option<State> {
        if let Ok(at) = self.find(key) {
            let before = self.slots[at].state();
            self.slots[at] = Slot::new(key, state);
            self.damaged += usize::from(state.damaged);
            self.damaged -= usize::from(before.damaged);
            return Some(before);
        }
        if (self.used + 1) * 8 > self.slots.len() * 7 {
            self.grow();
        }
        self.place(Slot::new(key, state));
        self.used += 1;
        self.damaged += usize::from(state.damaged);
        None
    }

    pub(crate) fn remove(&mut self, key: &Key) -> Option<State> {
        let mut at = self.find(key).ok()?;
        let before = self.slots[at].state();
        // Everything behind moves one step home, up to what is at home already.
        loop {
            let next = (at + 1) % self.slots.len();
            if self.slots[next].is_free() || self.displacement(next) == 0 {
                break;
            }
            self.slots[at] = self.slots[next];
            at = next;
        }
        self.slots[at] = FREE;
        self.used -= 1;
        self.damaged -= usize::from(before.damaged);
        Some(before)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, State)> {
        self.slots.iter().filter(|slot| !slot.is_free()).map(|slot| (slot.key(), slot.state()))
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    /// How many are known to be unreadable.
    pub(crate) fn damaged(&self) -> usize {
        self.damaged
    }

    /// Bytes of memory that the table takes.
    pub(crate) fn memory(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }

    /// The slot that holds `key`, or else the one where the search ended.
    fn find(&self, key: &Key) -> Result<usize, usize> {
        if self.slots.is_empty() {
            return Err(0);
        }
        let mut at = self.home(&key.record.id);
        let mut distance = 0;
        loop {
            let slot = &self.slots[at];
            if slot.is_free() || self.displacement(at) < distance {
                return Err(at);
            }
            if slot.holds(key) {
                return Ok(at);
            }
            at = (at + 1) % self.slots.len();
            distance += 1;
        }
    }

    /// Puts in a slot whose key is not there yet; there is room.
    fn place(&mut self, mut slot: Slot) {
        let mut at = self.home(&Hash(slot.id));
        let mut distance = 0;
        while !self.slots[at].is_free() {
            let theirs = self.displacement(at);
            if theirs < distance {
                std::mem::swap(&mut slot, &mut self.slots[at]);
                distance = theirs;
            }
            at = (at + 1) % self.slots.len();
            distance += 1;
        }
        self.slots[at] = slot;
    }

    fn grow(&mut self) {
        // By 15 %: shards are small, so growing is cheap, and memory is what a node runs out of.
        let size = (self.slots.len() + self.slots.len() * 15 / 100 + 1).max(SLOTS_MIN);
        let mut slots = Vec::new();
        slots.reserve_exact(size);
        slots.resize(size, FREE);
        let old = std::mem::replace(&mut self.slots, slots);
        old.into_iter().filter(|slot| !slot.is_free()).for_each(|slot| self.place(slot));
    }

    /// How far the entry in `at` is from its home.
    fn displacement(&self, at: usize) -> usize {
        let home = self.home(&Hash(self.slots[at].id));
        if at >= home { at - home } else { at + self.slots.len() - home }
    }

    /// Where a search for `id` begins. Pool, kind and shard number are left out: the few records
    /// that share an id may share a home.
    fn home(&self, id: &Hash) -> usize {
        let (words, _) = id.0.as_chunks::<8>();
        let mixed = words.iter().fold(self.seed, |mixed, word| {
            let product = u128::from(mixed ^ u64::from_le_bytes(*word)) * MULTIPLIER;
            product as u64 ^ (product >> 64) as u64
        });
        // The high half of the product spreads evenly over any number of slots.
        ((u128::from(mixed) * self.slots.len() as u128) >> 64) as usize
    }
}

/// 2^64 / golden ratio, odd: an even spread.
const MULTIPLIER: u128 = 0x9E37_79B9_7F4A_7C15;

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn key(n: u16) -> Key {
        // Few distinct ids, so that pools, kinds and shards share homes.
        let kind = if n & 1 == 0 { RecordKind::Chunk } else { RecordKind::TreeNode };
        let record = RecordKey { kind, id: Hash::of(&(n >> 3).to_le_bytes()), shard: 0 };
        Key {
            pool: u32::from(n >> 1 & 1),
            record: RecordKey { shard: (n >> 2 & 1) as u8, ..record },
        }
    }

    fn state(n: u64) -> State {
        let location = Location { segment: n as u32, unit: !n as u32 };
        State { location, stored_len: n as u32 ^ 5, generation: n << 33 | n, damaged: n & 1 == 1 }
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(seed: u64, steps in prop::collection::vec((0u8..4, 0u16..400, 0u64..1 << 20), 0..3000)) {
            let mut table = Table::new(seed);
            let mut model = HashMap::new();
            for (what, k, value) in steps {
                let key = key(k);
                match what {
                    0 => prop_assert_eq!(table.remove(&key), model.remove(&key)),
                    1 => prop_assert_eq!(table.get(&key), model.get(&key).copied()),
                    _ => prop_assert_eq!(table.insert(&key, state(value)), model.insert(key, state(value))),
                }
                prop_assert_eq!(table.len(), model.len());
            }
            let all: HashMap<_, _> = table.iter().collect();
            prop_assert_eq!(table.damaged(), model.values().filter(|state| state.damaged).count());
            prop_assert_eq!(all, model);
        }
    }

    #[test]
    fn memory_per_record_stays_below_80_bytes() {
        let mut table = Table::new(1);
        for n in 0..20_000u32 {
            let record = RecordKey::whole(RecordKind::Chunk, Hash::of(&n.to_le_bytes()));
            table.insert(&Key { pool: 1, record }, state(n.into()));
            if n > 1000 {
                let each = table.memory() / table.len();
                assert!(each <= 80, "{each} bytes a record at {n}");
            }
        }
    }

    #[test]
    fn ids_that_differ_in_one_place_do_not_pile_up() {
        let mut table = Table::new(rand::random());
        for n in 0..10_000u64 {
            let mut id = [0; 32];
            id[8..16].copy_from_slice(&n.to_le_bytes());
            let record = RecordKey::whole(RecordKind::Chunk, Hash(id));
            table.insert(&Key { pool: 1, record }, state(n));
        }
        let farthest = (0..table.slots.len())
            .filter(|at| !table.slots[*at].is_free())
            .map(|at| table.displacement(at))
            .max();
        assert!(farthest.unwrap() < 200, "{farthest:?}");
    }
}
