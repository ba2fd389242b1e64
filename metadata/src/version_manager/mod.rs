//! The version manager: what may happen to the few mutable facts, over any [`MetaStore`].
//!
//! | module | holds |
//! |---|---|
//! | [`images`] | create, find, list, clone, remove |
//! | [`snapshots`] | begin, publish, fail, wait, remove |
//! | [`pins`] | who needs a snapshot, so that it is not removed |
//! | [`traces`] | what the disks of a snapshot read first |
//! | [`leases`] | a writer's promise to be alive, and what happens when it is broken |
//! | [`collection`] | what the collector must spare |
//! | [`pools`], [`nodes`] | redundancy, membership |
//! | [`placement`], [`rebalance`] | which nodes hold a partition, and how that changes |
//! | [`debt`] | what was acknowledged with too few copies |
//! | [`sets`] | checkpoint sets |
//! | [`retire`] | which sets are kept, and what becomes of the others |
//!
//! # Invariants
//! * Every change is one swap whose expectations cover everything that its decision was based on,
//!   so any number of version managers may work over one store, and a crash anywhere leaves a state
//!   that the rules allow.
//! * Ids, snapshot numbers and lease generations are never given twice.
//! * `latest` of an image never goes back, and is always a snapshot that was published.
//! * What cannot be done in one swap (marking the snapshots of a removed image, failing those of a
//!   dead writer) leaves a record that says so; [`VersionManager::finish_removals`] and
//!   [`VersionManager::expire_leases`] take it up again.
//!
//! *Deliberately absent:* memory of anything that is stored. Only blocks of image ids that nobody
//! else will get are kept, and since when leases could be renewed, which decides about nothing but
//! how early this process ends them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};

use crate::clock::{Clock, Entropy};
use crate::error::Error;
use crate::records::{Counter, CounterRecord, Record, decode, encode};
use crate::store::{Expect, Key, MetaStore, Swap, Version};

pub mod collection;
pub mod debt;
pub mod images;
pub mod leases;
pub mod nodes;
pub mod pins;
pub mod placement;
pub mod pools;
pub mod rebalance;
pub mod retire;
pub mod sets;
pub mod snapshots;
pub mod steward;
pub mod traces;

/// Attempts at one change before others win for good: each failure means that somebody else made
/// progress, and the pauses between attempts grow.
const SWAP_ATTEMPTS_MAX: u32 = 24;
/// The longest pause between two attempts.
const PAUSE_MS_MAX: u64 = 32;

/// Turns that images share by id: far more than swaps that fit one sync of the store.
const IMAGE_TURNS: u64 = 1024;

/// Entries of a listing that the request does not limit.
pub const LIST_LIMIT_DEFAULT: u32 = 1000;
/// Entries of a listing at most: bounds memory and the size of a reply.
pub const LIST_LIMIT_MAX: u32 = 1000;

/// The longest name of a writer or holder, in bytes: hosts, disks and ids, put together.
pub const WRITER_BYTES_MAX: usize = 256;

/// See the module.
#[derive(Debug)]
pub struct VersionManager {
    store: Arc<dyn MetaStore>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    /// Leases get their full time from here: before, nobody could renew them. The start of this
    /// process, or the end of the last time that its store was away.
    renewable_unix_ms: AtomicU64,
    /// Nodes that were not heard of for so long are down.
    down_after: Duration,
    /// Partitions of new pools.
    partitions: u32,
    image_ids: Mutex<std::ops::Range<u64>>,
    /// Taken in turn, because all of them change one counter.
    generation_turn: Mutex<()>,
    /// Taken in turn, because writers that see one failure report the same partitions.
    debt_turn: Mutex<()>,
    /// Changes of one image's record take turns here, in order of arrival, so that those of this
    /// process do not make each other try again; against other processes only swaps protect.
    image_turns: Vec<Mutex<()>>,
}

/// A record as it was read.
#[derive(Clone, Debug)]
struct Held<R> {
    value: R,
    version: Version,
}

impl VersionManager {
    /// A version manager over `store`.
    #[must_use]
    pub fn new(
        store: Arc<dyn MetaStore>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Self {
        let renewable_unix_ms = AtomicU64::new(clock.now_unix_ms());
        Self {
            store,
            clock,
            entropy,
            renewable_unix_ms,
            down_after: nodes::DOWN_AFTER_DEFAULT,
            partitions: pools::PARTITIONS,
            image_ids: Mutex::new(0..0),
            generation_turn: Mutex::new(()),
            debt_turn: Mutex::new(()),
            image_turns: (0..IMAGE_TURNS).map(|_| Mutex::new(())).collect(),
        }
    }

    /// The same, with another time after which a silent node is down.
    #[must_use]
    pub fn with_down_after(mut self, down_after: Duration) -> Self {
        self.down_after = down_after.max(nodes::DOWN_AFTER_MIN);
        self
    }

    /// The same, with another number of partitions (a power of two) for new pools.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions;
        self
    }

    /// Waits for this process's turn to change an image's record.
    async fn image_turn(&self, image_id: u64) -> Option<MutexGuard<'_, ()>> {
        let turn = self.image_turns.get((image_id % IMAGE_TURNS) as usize)?;
        Some(turn.lock().await)
    }

    fn now(&self) -> u64 {
        self.clock.now_unix_ms()
    }

    async fn load<R: Record>(&self, key: Key) -> Result<Option<Held<R>>, Error> {
        let Some(entry) = self.store.get(&key).await? else { return Ok(None) };
        let value = decode(&entry.key, &entry.value)?;
        Ok(Some(Held { value, version: entry.version }))
    }

    /// Up to `limit` records under `prefix` behind `after`, and whether there are more.
    async fn page<R: Record>(
        &self,
        prefix: &Key,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<(Vec<Held<R>>, bool), Error> {
        let page = self.store.list(prefix.as_slice(), after, limit).await?;
        let read = |entry: &crate::store::Entry| {
            let value = decode(&entry.key, &entry.value)?;
            Ok(Held { value, version: entry.version })
        };
        let records: Result<_, Error> = page.entries.iter().map(read).collect();
        Ok((records?, page.more))
    }

    /// All records under `prefix`; only for what has a small bound of its own.
    async fn all<R: Record>(&self, prefix: &Key) -> Result<Vec<Held<R>>, Error> {
        let mut all: Vec<Held<R>> = Vec::new();
        loop {
            let after = all.last().map(|held| held.value.key());
            let limit = crate::store::PAGE_ENTRIES_MAX;
            let (records, more) = self.page(prefix, after.as_ref(), limit).await?;
            all.extend(records);
            if !more {
                return Ok(all);
            }
        }
    }

    /// The next number of a counter, and its part of the swap that uses it.
    async fn count(&self, counter: Counter, by: u64, swap: Swap) -> Result<(u64, Swap), Error> {
        let held = self.load::<CounterRecord>(CounterRecord::key_of(counter)).await?;
        let given = held.as_ref().map_or(0, |held| held.value.given);
        let next = CounterRecord { counter: counter as u32, given: given + by };
        let swap = match held {
            Some(held) => swap.update(&held, &next),
            None => swap.create(&next),
        };
        Ok((given + 1, swap))
    }
}

/// Records in swaps.
trait RecordSwap: Sized {
    /// A record that must not be there yet.
    fn create<R: Record>(self, record: &R) -> Self;
    /// A record that must be as it was read, and changes.
    fn update<R: Record>(self, held: &Held<R>, new: &R) -> Self;
    /// A record that must be as it was read, and stays.
    fn unchanged<R: Record>(self, held: &Held<R>) -> Self;
    /// A record that must be as it was read, and goes.
    fn remove<R: Record>(self, held: &Held<R>) -> Self;
    /// A record that is written or goes, whatever was there.
    fn set<R: Record>(self, record: &R) -> Self;
    /// A record that goes, whether it is there or not.
    fn clear<R: Record>(self, record: &R) -> Self;
}

impl RecordSwap for Swap {
    fn create<R: Record>(self, record: &R) -> Self {
        self.put(record.key(), Expect::Absent, encode(record))
    }

    fn update<R: Record>(self, held: &Held<R>, new: &R) -> Self {
        debug_assert_eq!(held.value.key(), new.key());
        self.put(new.key(), Expect::Version(held.version), encode(new))
    }

    fn unchanged<R: Record>(self, held: &Held<R>) -> Self {
        self.keep(held.value.key(), Expect::Version(held.version))
    }

    fn remove<R: Record>(self, held: &Held<R>) -> Self {
        self.delete(held.value.key(), Expect::Version(held.version))
    }

    fn set<R: Record>(self, record: &R) -> Self {
        self.put(record.key(), Expect::Any, encode(record))
    }

    fn clear<R: Record>(self, record: &R) -> Self {
        self.delete(record.key(), Expect::Any)
    }
}

/// Counts the attempts at one change.
struct Attempts<'a> {
    manager: &'a VersionManager,
    object: &'a str,
    made: u32,
}

impl<'a> Attempts<'a> {
    const fn new(manager: &'a VersionManager, object: &'a str) -> Self {
        Self { manager, object, made: 0 }
    }

    /// Pauses after a lost race, for a random time that grows.
    async fn lost(&mut self) -> Result<(), Error> {
        self.made += 1;
        if self.made >= SWAP_ATTEMPTS_MAX {
            return Err(Error::Contended { object: self.object.to_owned() });
        }
        let longest = (1 << self.made.min(16)).min(PAUSE_MS_MAX);
        let pause = self.manager.entropy.next_u64() % (longest + 1);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok(())
    }
}

/// Repeats `$attempt`, which reads, decides and swaps, while others come first.
macro_rules! until_won {
    ($manager:expr, $object:expr, $attempt:expr) => {{
        let object = $object;
        let mut attempts = $crate::version_manager::Attempts::new($manager, &object);
        loop {
            match $attempt {
                Err(error) if error.is_lost_race() => attempts.lost().await?,
                done => break done,
            }
        }
    }};
}
use until_won;

fn check_writer(writer: &str) -> Result<(), Error> {
    if writer.len() > WRITER_BYTES_MAX || writer.chars().any(char::is_control) {
        return Err(Error::invalid(format!(
            "a writer or holder has at most {WRITER_BYTES_MAX} bytes and no control characters"
        )));
    }
    Ok(())
}

/// The limit of a listing.
fn list_limit(asked: u32) -> usize {
    let limit = if asked == 0 { LIST_LIMIT_DEFAULT } else { asked.min(LIST_LIMIT_MAX) };
    limit as usize
}

/// Spreads the bits of a number (the finalizer of SplitMix64).
pub(crate) const fn mix64(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
