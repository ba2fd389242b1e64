//! The store against a map, on a disk that crashes.
//!
//! A run makes random calls, and now and then the power goes in the middle of one, the process is
//! killed, a sync fails or the disk is full. For each record the model knows which states are
//! possible: one, once a call was answered; the one before and the one after, when it was not. After
//! each start the store must be in a possible state, whole, and must have nothing to report but
//! torn tails.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{Record, RecordKind};
use blobcr_repo_node::testing::{Fault, SimDisk};
use blobcr_repo_node::{ChunkStore, DeleteOutcome, Fetched, Finding, Options, StoreError};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::common::{chunk, key};

const POOL: u32 = 1;
const UNIVERSE: u64 = 24;
/// Large enough for a few records, so that runs have many segments.
const SEGMENT: u64 = 8 << 10;

/// `Some(generation)` or absent.
type RecordState = Option<u64>;

struct Model {
    records: Vec<Record>,
    possible: HashMap<RecordKey, BTreeSet<RecordState>>,
}

impl Model {
    fn new() -> Self {
        let len = |n: u64| [0, 1, 100, 700, 3000, 20_000][n as usize % 6];
        let records: Vec<_> = (0..UNIVERSE).map(|n| chunk(n, len(n) + n as usize)).collect();
        let possible = records.iter().map(|record| (key(record), BTreeSet::from([None]))).collect();
        Self { records, possible }
    }

    /// A call on `keys` did (or may have done) `change`.
    fn call(
        &mut self,
        keys: &[RecordKey],
        answered: bool,
        change: impl Fn(RecordState) -> RecordState,
    ) {
        for key in keys {
            let states = self.possible.get_mut(key).unwrap();
            let after: BTreeSet<_> = states.iter().map(|state| change(*state)).collect();
            if answered {
                *states = after;
            } else {
                states.extend(after);
            }
        }
    }

    /// Compares a store with what is possible, which is then what is.
    fn check(&mut self, store: &ChunkStore) {
        let (listed, more) = store.list(POOL, RecordKind::Chunk, None, 1000);
        assert!(!more);
        let mut found = HashMap::new();
        for listed in listed {
            let key = RecordKey::try_from(&listed.r#ref.unwrap()).unwrap();
            found.insert(key, listed.generation);
        }
        for record in &self.records {
            let key = key(record);
            let now = found.remove(&key);
            let possible = self.possible.get_mut(&key).unwrap();
            assert!(possible.contains(&now), "{key:?} is {now:?}, not in {possible:?}");
            *possible = BTreeSet::from([now]);
            let expected = now.map_or(Fetched::Absent, |_| Fetched::Found(record.clone()));
            assert_eq!(store.get(POOL, key), expected);
        }
        assert!(found.is_empty(), "records that nobody put: {found:?}");
    }

    fn live(&self) -> usize {
        let is_live = |states: &&BTreeSet<RecordState>| states.iter().any(Option::is_some);
        self.possible.values().filter(is_live).count()
    }
}

struct Run {
    dice: StdRng,
    disk: SimDisk,
    store: ChunkStore,
    model: Model,
    generation: u64,
    log: Vec<String>,
}

fn options() -> Options {
    Options {
        segment_bytes: SEGMENT,
        reserve_bytes: Some(8 << 10),
        compact_dead_fraction: 0.2,
        maintenance_interval: None,
        ..Options::default()
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let (store, _) = ChunkStore::open_on(Arc::new(disk.clone()), options()).unwrap();
        let dice = StdRng::seed_from_u64(seed);
        Self { dice, disk, store, model: Model::new(), generation: 1, log: Vec::new() }
    }

    fn pick(&mut self) -> Vec<Record> {
        let count = self.dice.random_range(1..6);
        let dice = &mut self.dice;
        let one = |_| self.model.records[dice.random_range(0..UNIVERSE as usize)].clone();
        (0..count).map(one).collect()
    }

    /// One random call; says what a failure must be.
    fn call(&mut self) {
        let records = self.pick();
        let keys: Vec<_> = records.iter().map(key).collect();
        let generation = self.generation + self.dice.random_range(0..3) - 1;
        let failed = match self.dice.random_range(0..10) {
            0..4 => self.put(&records, generation),
            4..6 => self.touch(&keys, generation),
            6..8 => self.delete(&keys, generation),
            8 => self.store.compact().err(),
            _ => {
                self.generation += 1;
                None
            }
        };
        if let Some(error) = failed {
            self.log.push(format!("  {error}"));
        }
    }

    fn put(&mut self, records: &[Record], generation: u64) -> Option<StoreError> {
        let keys: Vec<_> = records.iter().map(key).collect();
        let result = self.store.put(POOL, generation, records);
        self.log.push(format!("put {} at {generation}: {}", keys.len(), result.is_ok()));
        self.model.call(&keys, result.is_ok(), |state| Some(state.unwrap_or(0).max(generation)));
        result.err()
    }

    fn touch(&mut self, keys: &[RecordKey], generation: u64) -> Option<StoreError> {
        let result = self.store.touch(POOL, generation, keys);
        self.log.push(format!("touch {} at {generation}: {}", keys.len(), result.is_ok()));
        if let Ok(present) = &result {
            for (key, present) in keys.iter().zip(present) {
                assert!(self.model.possible[key].iter().any(|state| state.is_some() == *present));
            }
        }
        self.model.call(keys, result.is_ok(), |state| state.map(|had| had.max(generation)));
        result.err()
    }

    fn delete(&mut self, keys: &[RecordKey], before: u64) -> Option<StoreError> {
        let result = self.store.delete(POOL, before, keys);
        self.log.push(format!("delete {} before {before}: {}", keys.len(), result.is_ok()));
        if let Ok(DeleteOutcome { deleted, kept }) = result {
            assert!((deleted + kept) as usize <= keys.len());
        }
        let change = |state: RecordState| state.filter(|generation| *generation >= before);
        self.model.call(keys, result.is_ok(), change);
        result.err()
    }

    /// Starts the store again on `disk`.
    fn reopen(&mut self, disk: SimDisk) {
        self.store.close();
        self.disk = disk;
        // The power may go again while the store starts.
        if self.dice.random_bool(0.3) {
            self.disk.fault(self.dice.random_range(0..12), Fault::PowerCut);
            let opened = ChunkStore::open_on(Arc::new(self.disk.clone()), options());
            drop(opened);
            self.disk = self.disk.crash();
            self.log.push("  cut at start".to_owned());
        }
        let (store, report) = ChunkStore::open_on(Arc::new(self.disk.clone()), options()).unwrap();
        for finding in &report.findings {
            let expected =
                matches!(finding, Finding::TornTail { .. } | Finding::DamagedListing { .. });
            assert!(expected, "{finding}");
            self.log.push(format!("  {finding}"));
        }
        self.store = store;
        self.model.check(&self.store);
    }

    fn round(&mut self) {
        let calls = self.dice.random_range(1..12);
        match self.dice.random_range(0..10) {
            0..4 => {
                self.disk.fault(self.dice.random_range(1..40), Fault::PowerCut);
                for _ in 0..30 {
                    self.call();
                    if self.disk.is_dead() {
                        break;
                    }
                }
                self.log.push("power cut".to_owned());
                let disk = self.disk.crash();
                self.reopen(disk);
            }
            4..6 => {
                (0..calls).for_each(|_| self.call());
                self.log.push("kill".to_owned());
                let disk = self.disk.kill();
                self.reopen(disk);
            }
            6 => {
                let fault = *[Fault::SyncFails, Fault::WriteFails].choose(&mut self.dice).unwrap();
                self.disk.fault(self.dice.random_range(1..10), fault);
                (0..calls).for_each(|_| self.call());
                self.log.push(format!("{fault:?}"));
                self.disk.no_fault();
                let disk = if self.dice.random() { self.disk.crash() } else { self.disk.kill() };
                self.reopen(disk);
            }
            7 => {
                self.disk.leave(self.dice.random_range(0..30_000));
                self.disk.boast(self.dice.random());
                self.log.push("full".to_owned());
                (0..calls).for_each(|_| self.call());
                self.disk.leave(usize::MAX >> 8);
                self.disk.boast(false);
                assert!(!self.store.status().poisoned);
                // With room again, everything works again.
                let records = self.pick();
                let failed = self.put(&records, self.generation);
                assert!(failed.is_none(), "{failed:?}");
            }
            8 => {
                (0..calls).for_each(|_| self.call());
                self.store.close();
                self.log.push("clean stop".to_owned());
                let disk = self.disk.crash();
                self.reopen(disk);
            }
            _ => {
                (0..calls).for_each(|_| self.call());
                self.model.check(&self.store);
            }
        }
    }

    /// At the end nothing but what is live takes room, and no deleted record comes back.
    fn finish(mut self) {
        let disk = self.disk.crash();
        self.reopen(disk);
        self.store.compact().unwrap();
        self.model.check(&self.store);
        let status = self.store.status();
        assert_eq!(status.records as usize, self.model.live());
        assert_eq!(status.damaged_records, 0);
        let disk = self.disk.crash();
        self.reopen(disk);
        let again = self.store.status();
        assert_eq!((again.live_bytes, again.records), (status.live_bytes, status.records));
    }
}

fn run(seed: u64, rounds: usize) {
    let mut run = Run::new(seed);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        (0..rounds).for_each(|_| run.round());
    }));
    if let Err(panic) = result {
        println!("seed {seed}:\n{}", run.log.join("\n"));
        std::panic::resume_unwind(panic);
    }
    run.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn what_was_acknowledged_survives_and_the_rest_is_absent_or_whole(seed: u64, rounds in 1usize..25) {
        run(seed, rounds);
    }
}

/// Puts, deletes and compactions that leave much to be carried over, in three acts.
fn act(store: &ChunkStore, records: &[Record], act: u64) -> Result<(), StoreError> {
    let keys: Vec<_> = records.iter().map(key).collect();
    match act {
        0 => {
            for pair in records.chunks(2) {
                store.put(POOL, 1, pair)?;
            }
            let even: Vec<_> = keys.iter().copied().step_by(2).collect();
            store.touch(POOL, 2, &even)?;
            store.delete(POOL, 2, &keys)?;
            store.compact()?;
        }
        1 => {
            store.delete(POOL, 3, &keys[..4])?;
            store.compact()?;
            store.put(POOL, 4, &records[8..])?;
            store.compact()?;
        }
        _ => {
            store.delete(POOL, 5, &keys)?;
            store.compact()?;
        }
    }
    Ok(())
}

/// What an act's calls are meant to have done.
fn after(act: u64, n: usize) -> RecordState {
    match (act, n) {
        (0, _) | (1, 4..8) if n.is_multiple_of(2) => Some(2),
        (1, 8..) => Some(4),
        _ => None,
    }
}

/// Runs an act with the power going at operation `cut`; says whether it did.
fn act_cut(disk: &SimDisk, records: &[Record], number: u64, cut: u64) -> (SimDisk, bool) {
    let (store, report) = ChunkStore::open_on(Arc::new(disk.clone()), options()).unwrap();
    for finding in &report.findings {
        assert!(matches!(finding, Finding::TornTail { .. } | Finding::DamagedListing { .. }));
    }
    disk.fault(cut, Fault::PowerCut);
    let done = act(&store, records, number);
    disk.no_fault();
    store.close();
    (disk.crash(), done.is_err())
}

/// The power goes at operation `first` of act 0 and `second` of act 1; says whether it did.
fn two_cuts(records: &[Record], first: u64, second: u64, dice: u64) -> (bool, bool) {
    let disk = SimDisk::new(first << 40 | second << 20 | dice);
    let (disk, first_cut) = act_cut(&disk, records, 0, first);
    let (disk, second_cut) = act_cut(&disk, records, 1, second);
    // What was cut is done again; then all must be as if nothing had happened.
    let (disk, cut) = act_cut(&disk, records, 1, u64::MAX >> 1);
    assert!(!cut);
    let (store, _) = ChunkStore::open_on(Arc::new(disk.clone()), options()).unwrap();
    for (n, record) in records.iter().enumerate() {
        let expected = after(1, n).map_or(Fetched::Absent, |_| Fetched::Found(record.clone()));
        // Those that act 1 does not say anything about are as act 0 left them.
        if !(4..8).contains(&n) || !first_cut {
            assert_eq!(store.get(POOL, key(record)), expected, "{n} of {first} {second} {dice}");
        }
    }
    drop(store);
    let (disk, cut) = act_cut(&disk, records, 2, u64::MAX >> 1);
    assert!(!cut);
    let (store, report) = ChunkStore::open_on(Arc::new(disk), options()).unwrap();
    assert_eq!(store.status().records, 0, "{first} {second} {dice}: {report:?}");
    (first_cut, second_cut)
}

/// The power goes at operation `first` of act 0; then all records are deleted, and it goes again
/// at operation `second` of the compaction. Says whether it did.
fn cut_after_delete(records: &[Record], first: u64, second: u64, dice: u64) -> (bool, bool) {
    let open = |disk: &SimDisk| {
        let (store, report) = ChunkStore::open_on(Arc::new(disk.clone()), options()).unwrap();
        (store, report.records)
    };
    let disk = SimDisk::new(first << 40 | second << 20 | dice);
    let (disk, first_cut) = act_cut(&disk, records, 0, first);
    let (store, _) = open(&disk);
    let keys: Vec<_> = records.iter().map(key).collect();
    // Each delete begins a new segment: tombstones and what they hide are compacted apart.
    for (n, key) in keys.iter().enumerate() {
        store.delete(POOL, 9, &[*key]).unwrap();
        store.put(POOL, 9, &[chunk(100 + n as u64, 9000)]).unwrap();
    }
    let fillers: Vec<_> = (0..keys.len() as u64).map(|n| key(&chunk(100 + n, 9000))).collect();
    store.delete(POOL, 10, &fillers).unwrap();
    disk.fault(second, Fault::PowerCut);
    let second_cut = store.compact().is_err();
    disk.no_fault();
    store.close();
    let disk = disk.crash();
    let (store, found) = open(&disk);
    assert_eq!(found, 0, "{first} {second} {dice}");
    store.compact().unwrap();
    drop(store);
    assert_eq!(open(&disk.crash()).1, 0, "{first} {second} {dice}");
    (first_cut, second_cut)
}

#[test]
fn the_power_may_go_at_every_operation_of_two_acts_in_a_row() {
    every_two_cuts(two_cuts, 4);
}

#[test]
fn no_deleted_record_comes_back_whenever_the_power_goes() {
    every_two_cuts(cut_after_delete, 1);
}

fn every_two_cuts(run: fn(&[Record], u64, u64, u64) -> (bool, bool), dice: u64) {
    let records: Vec<_> = (0..12).map(|n| chunk(n, 1500)).collect();
    let mut runs = 0;
    for first in 0.. {
        let mut first_cut = false;
        for second in 0.. {
            let cuts = (0..dice).map(|dice| run(&records, first, second, dice));
            let cuts: Vec<_> = cuts.collect();
            runs += cuts.len();
            first_cut |= cuts.iter().any(|(first, _)| *first);
            if !cuts.iter().any(|(_, second)| *second) {
                break;
            }
        }
        if !first_cut {
            break;
        }
    }
    println!("{runs} runs");
    assert!(runs > 2500, "{runs}");
}
