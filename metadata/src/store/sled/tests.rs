use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::Mutex;

use super::*;
use crate::store::{Expect, conformance};

fn key(name: &str) -> Key {
    Key::new(name.to_owned())
}

async fn put(store: &SledStore, name: &str, value: &str) -> Result<Version, StoreError> {
    store.swap(Swap::new().put(key(name), Expect::Any, value.to_owned())).await
}

async fn value(store: &SledStore, name: &str) -> Option<Bytes> {
    store.get(&key(name)).await.unwrap().map(|entry| entry.value)
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn MetaStore> = Arc::new(SledStore::open(dir.path()).await.unwrap());
    // Twice: the second run meets what the first left.
    conformance::all(Arc::clone(&store), rand::random()).await;
    conformance::all(store, rand::random()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_when_it_is_reopened() {
    let dir = tempfile::tempdir().unwrap();
    conformance::reopening(|| async {
        Arc::new(SledStore::open(dir.path()).await.unwrap()) as Arc<dyn MetaStore>
    })
    .await;
}

/// Syncs that a test holds back, counts and fails.
#[derive(Clone, Debug, Default)]
struct Gate {
    turn: Arc<Mutex<()>>,
    syncs: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
    waiting: Arc<AtomicBool>,
}

impl Durability for Gate {
    fn sync(&mut self) -> io::Result<()> {
        self.waiting.store(true, Ordering::SeqCst);
        let _turn = self.turn.blocking_lock();
        self.waiting.store(false, Ordering::SeqCst);
        self.syncs.fetch_add(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is gone"));
        }
        Ok(())
    }
}

async fn until(condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    });
    waited.await.expect("what the test waits for happens");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_shown_before_it_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::default();
    let store = SledStore::open_with(dir.path(), Box::new(gate.clone())).await.unwrap();
    let store = Arc::new(store);
    put(&store, "a", "old").await.unwrap();
    put(&store, "gone", "old").await.unwrap();
    let mut watch = store.watch(b"").await.unwrap();

    let held = gate.turn.lock().await;
    let swap = Swap::new()
        .put(key("a"), Expect::Any, "new")
        .put(key("b"), Expect::Absent, "new")
        .delete(key("gone"), Expect::Any);
    let task = {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.swap(swap).await })
    };
    until(|| gate.waiting.load(Ordering::SeqCst)).await;
    // sled holds the new values by now; nobody may see them.
    assert_eq!(value(&store, "a").await.unwrap(), "old");
    assert_eq!(value(&store, "b").await, None);
    let names = |page: Page| -> Vec<Key> { page.entries.into_iter().map(|e| e.key).collect() };
    let page = store.list(b"", None, 10).await.unwrap();
    assert!(page.entries.iter().all(|entry| entry.value == "old"));
    assert_eq!(names(page), [key("a"), key("gone")]);
    assert_eq!(names(store.list(b"", Some(&key("a")), 1).await.unwrap()), [key("gone")]);
    assert!(!task.is_finished());
    drop(held);

    let version = task.await.unwrap().unwrap();
    assert_eq!(value(&store, "a").await.unwrap(), "new");
    assert_eq!(names(store.list(b"", None, 10).await.unwrap()), [key("a"), key("b")]);
    for name in ["a", "b", "gone"] {
        let change = watch.next().await.unwrap();
        assert_eq!((change.key, change.version), (key(name), version));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn swaps_that_wait_share_one_sync() {
    const SWAPS: u64 = 100; // behind the first
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::default();
    let store = SledStore::open_with(dir.path(), Box::new(gate.clone())).await.unwrap();
    let store = Arc::new(store);
    let held = gate.turn.lock().await;
    let mut swaps = tokio::task::JoinSet::new();
    let mut spawn = |n: u64| {
        let store = Arc::clone(&store);
        swaps.spawn(async move { put(&store, &format!("k{n}"), "v").await.unwrap() });
    };
    spawn(0);
    until(|| gate.waiting.load(Ordering::SeqCst)).await;
    (1..=SWAPS).for_each(&mut spawn);
    let queue = store.queue.clone().unwrap();
    until(|| (queue.max_capacity() - queue.capacity()) as u64 == SWAPS).await;
    drop((held, queue));
    swaps.join_all().await;
    assert_eq!(gate.syncs.load(Ordering::SeqCst), 2, "one for the first, one for all others");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_poisons_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::default();
    let store = SledStore::open_with(dir.path(), Box::new(gate.clone())).await.unwrap();
    put(&store, "a", "acknowledged").await.unwrap();
    let mut watch = store.watch(b"").await.unwrap();
    gate.broken.store(true, Ordering::SeqCst);
    let error = put(&store, "a", "lost").await.unwrap_err();
    assert!(error.to_string().contains("the disk is gone"), "{error}");
    assert_eq!(error.retry(), crate::store::Retry::Never);
    // A sync that works again proves nothing about what the failed one left out.
    gate.broken.store(false, Ordering::SeqCst);
    let syncs = gate.syncs.load(Ordering::SeqCst);
    assert_eq!(put(&store, "b", "x").await, Err(error.clone()));
    assert_eq!(store.get(&key("a")).await, Err(error.clone()));
    assert_eq!(store.list(b"", None, 1).await, Err(error.clone()));
    assert_eq!(store.watch(b"").await.unwrap_err(), error);
    assert_eq!(watch.next().await, Err(StoreError::WatchLost));
    assert_eq!(gate.syncs.load(Ordering::SeqCst), syncs);
    drop(store);

    let store = SledStore::open(dir.path()).await.unwrap();
    let found = value(&store, "a").await.unwrap();
    // Whether the swap that was refused happened is open; what was acknowledged before is not.
    assert!(found == "acknowledged" || found == "lost", "{found:?}");
    put(&store, "b", "x").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_commit_thread_stops_the_store() {
    struct Panics;
    impl Durability for Panics {
        fn sync(&mut self) -> io::Result<()> {
            panic!("a bug")
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open_with(dir.path(), Box::new(Panics)).await.unwrap();
    let first = put(&store, "a", "1").await.unwrap_err();
    assert!(matches!(first, StoreError::Poisoned { .. }), "{first}");
    assert!(matches!(store.get(&key("a")).await, Err(StoreError::Poisoned { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_values_stay_out_of_side_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).await.unwrap();
    let long = vec![b'x'; crate::store::VALUE_BYTES_MAX];
    for n in 0..120u32 {
        let name = key(&format!("k{:03}", n * 37 % 60));
        store.swap(Swap::new().put(name, Expect::Any, long.clone())).await.unwrap();
    }
    let blobs = std::fs::read_dir(dir.path().join("blobs")).unwrap().count();
    assert_eq!(blobs, 0, "sled never syncs these");
}

async fn filled(dir: &Path, count: u32) {
    let store = SledStore::open(dir).await.unwrap();
    for n in 0..count {
        // Overwritten, so that older values of the same keys are in the log.
        put(&store, &format!("k{:02}", n % 40), &format!("{n}:{}", "v".repeat(300))).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_its_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), 200).await;
    let db = dir.path().join("db");
    let whole = std::fs::read(&db).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    for len in [0, 1000, used / 2, used - 1000, used - 300] {
        let copy = tempfile::tempdir().unwrap();
        std::fs::create_dir(copy.path().join("blobs")).unwrap();
        for name in ["conf", "acknowledged"] {
            std::fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
        }
        std::fs::write(copy.path().join("db"), &whole[..len]).unwrap();
        let error = SledStore::open(copy.path()).await.unwrap_err();
        assert!(error.to_string().contains("restore it from a copy"), "{len}: {error}");
    }
}

/// Whatever byte of sled's file goes bad: what is answered is right, or an error.
#[tokio::test(flavor = "multi_thread")]
async fn no_damaged_byte_is_taken_for_data() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), 120).await;
    let whole = std::fs::read(dir.path().join("db")).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    let mut refused = 0;
    for step in 0..60 {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
        }
        let mut bad = whole.clone();
        let at = used * step / 60 + step % 7;
        bad[at] ^= 0x55;
        std::fs::write(copy.path().join("db"), bad).unwrap();
        let Ok(store) = SledStore::open(copy.path()).await else {
            refused += 1;
            continue;
        };
        for n in 80..120 {
            let name = format!("k{:02}", n % 40);
            match store.get(&key(&name)).await {
                Ok(entry) => {
                    let value = entry.map(|entry| entry.value);
                    let expected = format!("{n}:{}", "v".repeat(300));
                    assert_eq!(value, Some(Bytes::from(expected)), "byte {at}, key {name}");
                }
                Err(_) => {
                    refused += 1;
                    break;
                }
            }
        }
    }
    assert!(refused > 0, "no damage was found at all");
}
