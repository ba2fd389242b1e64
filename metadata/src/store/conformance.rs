//! The suite that every backend passes. It panics where a backend breaks the contract of
//! [`MetaStore`].
//!
//! [`all`] may run on a store that holds other things: each case works under a prefix of its own,
//! and leaves its keys behind. [`reopening`] needs a store that it can close and open.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::{
    Entry, Expect, Key, MetaStore, PAGE_ENTRIES_MAX, Page, SWAP_KEYS_MAX, StoreError, Swap,
    VALUE_BYTES_MAX, Version, Watch,
};

mod concurrent;

/// One case's view of the store: keys under its own prefix.
#[derive(Clone, Debug)]
struct Case {
    store: Arc<dyn MetaStore>,
    prefix: String,
}

impl Case {
    fn key(&self, name: &str) -> Key {
        Key::new(format!("{}{name}", self.prefix))
    }

    async fn get(&self, name: &str) -> Option<Entry> {
        self.store.get(&self.key(name)).await.expect("get works")
    }

    async fn version(&self, name: &str) -> Version {
        self.get(name).await.expect("the key has a value").version
    }

    async fn put(&self, name: &str, expect: Expect, value: &str) -> Result<Version, StoreError> {
        self.store.swap(Swap::new().put(self.key(name), expect, value.to_owned())).await
    }

    async fn set(&self, name: &str, value: &str) -> Version {
        self.put(name, Expect::Any, value).await.expect("an unconditional put works")
    }

    async fn delete(&self, name: &str) -> Version {
        let swap = Swap::new().delete(self.key(name), Expect::Any);
        self.store.swap(swap).await.expect("an unconditional delete works")
    }

    async fn list(&self, under: &str, after: Option<&Key>, limit: usize) -> Page {
        let prefix = self.key(under);
        self.store.list(prefix.as_slice(), after, limit).await.expect("list works")
    }

    async fn watch(&self, under: &str) -> Watch {
        self.store.watch(self.key(under).as_slice()).await.expect("watch works")
    }

    fn conflict(&self, name: &str) -> Result<Version, StoreError> {
        Err(StoreError::Conflict { key: self.key(name) })
    }
}

/// Runs every case on `store`. `run` tells this run from others on the same store.
pub async fn all(store: Arc<dyn MetaStore>, run: u64) {
    let case = |name: &str| Case {
        store: Arc::clone(&store),
        prefix: format!("conformance/{run:016x}/{name}/"),
    };
    a_value_is_read_as_it_was_written(case("values")).await;
    expectations_decide(case("expectations")).await;
    a_swap_is_all_or_nothing(case("all-or-nothing")).await;
    versions_are_never_given_twice(case("versions")).await;
    what_is_outside_the_limits_is_refused(case("limits")).await;
    a_listing_is_in_order_and_paged(case("listing")).await;
    prefixes_end_where_they_should(case("prefixes")).await;
    a_watch_shows_every_change_in_order(case("watch")).await;
    a_slow_watcher_learns_that_it_lost_changes(case("slow-watch")).await;
    concurrent::increments_are_not_lost(case("increments")).await;
    concurrent::a_history_is_linearizable(case("history"), run).await;
    concurrent::a_page_is_one_instant(case("page")).await;
    concurrent::a_cancelled_swap_happens_whole_or_not_at_all(case("cancel")).await;
    concurrent::watchers_see_what_swaps_did(case("watch-concurrent")).await;
}

async fn a_value_is_read_as_it_was_written(case: Case) {
    assert_eq!(case.get("a").await, None);
    let long = Bytes::from((0..VALUE_BYTES_MAX).map(|n| n as u8).collect::<Vec<u8>>());
    for value in [Bytes::new(), Bytes::from_static(b"\0\xff"), long] {
        let key = case.key("a");
        let swap = Swap::new().put(key.clone(), Expect::Any, value.clone());
        let version = case.store.swap(swap).await.expect("put works");
        assert_eq!(case.get("a").await, Some(Entry { key, value, version }));
    }
    case.delete("a").await;
    assert_eq!(case.get("a").await, None);
}

async fn expectations_decide(case: Case) {
    let lost = case.put("a", Expect::Version(Version(1)), "x").await;
    assert_eq!(lost, case.conflict("a"));
    let first = case.put("a", Expect::Absent, "1").await.expect("it is absent");
    assert_eq!(case.put("a", Expect::Absent, "x").await, case.conflict("a"));
    let second = case.put("a", Expect::Version(first), "2").await.expect("it is as expected");
    assert_eq!(case.put("a", Expect::Version(first), "x").await, case.conflict("a"));
    let third = case.put("a", Expect::Any, "2").await.expect("anything is expected");
    // The same bytes again are another version all the same.
    assert_eq!(case.put("a", Expect::Version(second), "x").await, case.conflict("a"));
    let delete = |expect| case.store.swap(Swap::new().delete(case.key("a"), expect));
    assert_eq!(delete(Expect::Version(second)).await, case.conflict("a"));
    assert_eq!(delete(Expect::Absent).await, case.conflict("a"));
    delete(Expect::Version(third)).await.expect("it is as expected");
    assert_eq!(delete(Expect::Version(third)).await, case.conflict("a"));
    delete(Expect::Absent).await.expect("to delete nothing is allowed");
    delete(Expect::Any).await.expect("to delete nothing is allowed");
    assert_eq!(case.get("a").await, None);
}

async fn a_swap_is_all_or_nothing(case: Case) {
    let a = case.set("a", "1").await;
    case.set("b", "1").await;
    let swap = Swap::new()
        .put(case.key("a"), Expect::Version(a), "2")
        .put(case.key("b"), Expect::Version(a), "2")
        .put(case.key("c"), Expect::Absent, "2");
    assert_eq!(case.store.swap(swap).await, case.conflict("b"));
    assert_eq!(case.version("a").await, a);
    assert_eq!(case.get("c").await, None);

    let b = case.version("b").await;
    let swap = Swap::new()
        .keep(case.key("a"), Expect::Version(a))
        .delete(case.key("b"), Expect::Version(b))
        .put(case.key("c"), Expect::Absent, "2");
    let version = case.store.swap(swap).await.expect("all is as expected");
    assert_eq!(case.version("a").await, a);
    assert_eq!(case.get("b").await, None);
    assert_eq!(case.version("c").await, version);

    let stale = Swap::new().keep(case.key("a"), Expect::Absent).delete(case.key("c"), Expect::Any);
    assert_eq!(case.store.swap(stale).await, case.conflict("a"));
    assert_eq!(case.version("c").await, version);

    let widest = (0..SWAP_KEYS_MAX).fold(Swap::new(), |swap, n| {
        swap.put(case.key(&format!("wide/{n:03}")), Expect::Absent, "w")
    });
    let version = case.store.swap(widest).await.expect("the widest swap works");
    let page = case.list("wide/", None, PAGE_ENTRIES_MAX).await;
    assert_eq!(page.entries.len(), SWAP_KEYS_MAX);
    assert!(page.entries.iter().all(|entry| entry.version == version));
}

async fn versions_are_never_given_twice(case: Case) {
    let mut last = case.set("a", "0").await;
    for n in 0..20 {
        let grown = if n % 3 == 0 { case.delete("a").await } else { case.set("a", "n").await };
        // A delete of nothing may change nothing.
        assert!(grown > last || case.get("a").await.is_none(), "{grown:?} after {last:?}");
        last = grown.max(last);
        let other = case.set("b", "n").await;
        assert!(other > last);
        last = other;
    }
    let kept = case.store.swap(Swap::new().keep(case.key("b"), Expect::Version(last))).await;
    assert!(kept.expect("a swap that only looks works") >= last);
    assert_eq!(case.version("b").await, last);
}

async fn what_is_outside_the_limits_is_refused(case: Case) {
    let long = Bytes::from(vec![0; VALUE_BYTES_MAX + 1]);
    let a = || case.key("a");
    let twice = Swap::new().put(a(), Expect::Any, "1").put(a(), Expect::Any, "2");
    for swap in [twice, Swap::new().put(a(), Expect::Any, long)] {
        let refused = case.store.swap(swap).await;
        assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
    }
    assert_eq!(case.get("a").await, None);
    let empty = case.store.get(&Key::new(Bytes::new())).await;
    assert!(matches!(empty, Err(StoreError::Invalid { .. })), "{empty:?}");
    let nothing = case.store.list(b"a", None, 0).await;
    assert!(matches!(nothing, Err(StoreError::Invalid { .. })), "{nothing:?}");
}

async fn a_listing_is_in_order_and_paged(case: Case) {
    assert_eq!(case.list("n/", None, 10).await, Page { entries: Vec::new(), more: false });
    let count = 150;
    // Not in order of key, and with holes.
    for n in (0..count).map(|n| n * 37 % count) {
        case.set(&format!("n/{n:04}"), &n.to_string()).await;
    }
    for n in (0..count).step_by(5) {
        case.delete(&format!("n/{n:04}")).await;
    }
    let expected: Vec<Key> =
        (0..count).filter(|n| n % 5 != 0).map(|n| case.key(&format!("n/{n:04}"))).collect();
    for limit in [1, 7, 120, 121, PAGE_ENTRIES_MAX, usize::MAX] {
        let mut found: Vec<Key> = Vec::new();
        loop {
            let page = case.list("n/", found.last(), limit).await;
            assert!(page.entries.len() <= limit);
            assert!(!page.more || page.entries.len() == limit.min(PAGE_ENTRIES_MAX));
            for entry in page.entries {
                assert_eq!(
                    case.store.get(&entry.key).await.expect("get works"),
                    Some(entry.clone())
                );
                found.push(entry.key);
            }
            if !page.more {
                break;
            }
        }
        assert_eq!(found, expected, "limit {limit}");
    }
    // Behind a key that is not there, before all of them, and behind all of them.
    let behind = |name: &str| case.key(name);
    let first = case.list("n/", Some(&behind("n/0000")), 1).await.entries;
    assert_eq!(first.first().map(|entry| &entry.key), expected.first());
    assert_eq!(case.list("n/", Some(&behind("a")), 1).await.entries, first);
    assert!(case.list("n/", Some(&behind("z")), 10).await.entries.is_empty());
}

async fn prefixes_end_where_they_should(case: Case) {
    for name in ["a", "a/", "a/1", "a0", "b"] {
        case.set(name, name).await;
    }
    let names =
        |page: Page| -> Vec<Bytes> { page.entries.into_iter().map(|entry| entry.value).collect() };
    assert_eq!(names(case.list("a/", None, 10).await), ["a/", "a/1"]);
    assert_eq!(names(case.list("a", None, 10).await), ["a", "a/", "a/1", "a0"]);
    assert_eq!(names(case.list("c", None, 10).await), Vec::<Bytes>::new());
    // Prefixes that no byte string of the same length follows.
    let raw = |tail: &[u8]| Key::new([case.key("raw").as_slice(), tail].concat());
    for tail in [&b"\xff"[..], b"\xff\xff", b"\xff\xff\0", b"\xfe\xff"] {
        let swap = Swap::new().put(raw(tail), Expect::Absent, tail.to_vec());
        case.store.swap(swap).await.expect("any bytes are a key");
    }
    let page = case.store.list(raw(b"\xff\xff").as_slice(), None, 10).await.expect("list works");
    assert_eq!(names(page), [&b"\xff\xff"[..], b"\xff\xff\0"]);
}

async fn a_watch_shows_every_change_in_order(case: Case) {
    case.set("w/before", "1").await;
    let mut watch = case.watch("w/").await;
    let mut exact = case.watch("w/a").await;
    let first = case.set("w/a", "1").await;
    case.set("elsewhere", "1").await;
    let swap = Swap::new()
        .put(case.key("w/c"), Expect::Any, "2")
        .put(case.key("w/b"), Expect::Any, "2")
        .delete(case.key("w/a"), Expect::Any)
        .keep(case.key("w/before"), Expect::Any)
        .delete(case.key("w/never"), Expect::Any);
    let second = case.store.swap(swap).await.expect("nothing is expected");
    assert_eq!(case.put("w/a", Expect::Version(first), "x").await, case.conflict("w/a"));
    let third = case.set("w/a", "3").await;
    let expected = [
        ("w/a", first, Some("1")),
        ("w/a", second, None),
        ("w/b", second, Some("2")),
        ("w/c", second, Some("2")),
        ("w/a", third, Some("3")),
    ];
    for (name, version, value) in expected {
        let change = watch.next().await.expect("the watcher keeps up");
        let seen = (change.key, change.version, change.value);
        assert_eq!(seen, (case.key(name), version, value.map(Bytes::from)));
    }
    for (version, value) in [(first, Some("1")), (second, None), (third, Some("3"))] {
        let change = exact.next().await.expect("the watcher keeps up");
        let seen = (change.key, change.version, change.value);
        assert_eq!(seen, (case.key("w/a"), version, value.map(Bytes::from)));
    }
}

/// Whatever backlog a backend keeps: what a watcher sees has no holes, and ends with a word.
async fn a_slow_watcher_learns_that_it_lost_changes(case: Case) {
    const KEYS: u64 = 40;
    const ROUNDS: u64 = 40;
    let mut watch = case.watch("s/").await;
    let mut all = Vec::new();
    for round in 0..ROUNDS {
        let swap = (0..KEYS).fold(Swap::new(), |swap, n| {
            swap.put(case.key(&format!("s/{n:04}")), Expect::Any, round.to_string())
        });
        let version = case.store.swap(swap).await.expect("put works");
        all.extend((0..KEYS).map(|n| (version, case.key(&format!("s/{n:04}")))));
    }
    for (seen, expected) in all.iter().enumerate() {
        match watch.next().await {
            Ok(change) => assert_eq!((change.version, change.key), *expected, "change {seen}"),
            Err(error) => {
                assert_eq!(error, StoreError::WatchLost);
                assert_eq!(watch.next().await, Err(StoreError::WatchLost));
                return;
            }
        }
    }
}

/// What was acknowledged is there after the store was closed and opened, and versions go on growing.
pub async fn reopening<F: Future<Output = Arc<dyn MetaStore>>>(open: impl Fn() -> F) {
    let case = |store| Case { store, prefix: "reopening/".to_owned() };
    let mut expected: BTreeMap<String, (Version, String)> = BTreeMap::new();
    let mut newest = Version(0);
    for round in 0..6u64 {
        let case = case(open().await);
        for (name, (version, value)) in &expected {
            let entry = case.get(name).await.expect("it was acknowledged");
            assert_eq!((entry.version, &entry.value[..]), (*version, value.as_bytes()), "{name}");
        }
        let listed = case.list("", None, PAGE_ENTRIES_MAX).await.entries.len();
        assert_eq!(listed, expected.len(), "round {round}");
        for n in 0..20u64 {
            let (name, value) = (format!("k{n}"), format!("{round}.{n}"));
            let version = case.set(&name, &value).await;
            assert!(version > newest);
            newest = version;
            expected.insert(name, (version, value));
        }
        // The newest version of all is that of a delete, so no value holds it.
        let name = format!("k{}", round % 20);
        newest = case.delete(&name).await;
        expected.remove(&name);
        let case_store = Arc::downgrade(&case.store);
        drop(case);
        assert!(case_store.upgrade().is_none(), "the store is closed");
    }
}

/// Counts up once per call: what happened before what, across tasks.
#[derive(Debug, Default)]
struct Ticks(AtomicU64);

impl Ticks {
    fn now(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}
