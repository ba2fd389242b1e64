//! The backend on etcd, against real ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blobcr_metadata::store::etcd::{EtcdStore, EtcdTarget};
use blobcr_metadata::store::{
    Expect, Key, MetaStore, PAGE_ENTRIES_MAX, StoreError, Swap, VALUE_BYTES_MAX, conformance,
};
use blobcr_tests::etcd::Etcd;
use tokio::task::JoinSet;

async fn open(target: &str) -> Arc<dyn MetaStore> {
    let target: EtcdTarget = target.parse().unwrap();
    Arc::new(EtcdStore::open(&target).await.unwrap())
}

fn key(name: &str) -> Key {
    Key::new(name.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let etcd = Etcd::start(1).unwrap();
    let store = open(&etcd.target("a")).await;
    conformance::all(Arc::clone(&store), rand::random()).await;
    conformance::all(store, rand::random()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_with_three_members() {
    let etcd = Etcd::start(3).unwrap();
    conformance::all(open(&etcd.target_from(1, "a")).await, rand::random()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_when_it_is_reopened() {
    let etcd = Etcd::start(1).unwrap();
    conformance::reopening(|| async { open(&etcd.target("a")).await }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_of_one_etcd_know_nothing_of_each_other() {
    let etcd = Etcd::start(1).unwrap();
    let (a, b) = (open(&etcd.target("a")).await, open(&etcd.target("b")).await);
    let mut watch = b.watch(b"").await.unwrap();
    a.swap(Swap::new().put(key("k"), Expect::Absent, "a")).await.unwrap();
    assert_eq!(b.get(&key("k")).await.unwrap(), None);
    assert_eq!(b.list(b"", None, 10).await.unwrap().entries, []);
    b.swap(Swap::new().put(key("k"), Expect::Absent, "b")).await.unwrap();
    let change = watch.next().await.unwrap();
    assert_eq!(change.value.as_deref(), Some(&b"b"[..]));
    assert_eq!(a.get(&key("k")).await.unwrap().unwrap().value, "a");
}

/// A page of the most entries of the longest values: more than one message of gRPC holds.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_page_is_read_whole_and_at_one_instant() {
    const COUNT: usize = 200;
    let etcd = Etcd::start(1).unwrap();
    let store = open(&etcd.target("a")).await;
    for n in 0..COUNT {
        let swap = Swap::new().put(key(&format!("k{n:04}")), Expect::Any, vec![1; VALUE_BYTES_MAX]);
        store.swap(swap).await.unwrap();
    }
    let page = store.list(b"k", None, PAGE_ENTRIES_MAX).await.unwrap();
    assert_eq!((page.entries.len(), page.more), (COUNT, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_passes_over_the_member_that_died() {
    let mut etcd = Etcd::start(3).unwrap();
    open(&etcd.target("a")).await.swap(Swap::new().put(key("a"), Expect::Any, "1")).await.unwrap();
    for call in 0..4 {
        let died = call % 3;
        let store = open(&etcd.target_from(died, "a")).await;
        etcd.kill(died).unwrap();
        let version = match call {
            0 => store.get(&key("a")).await.unwrap().unwrap().version,
            1 => store.list(b"", None, 10).await.unwrap().entries[0].version,
            2 => {
                let mut watch = store.watch(b"a").await.unwrap();
                let put = Swap::new().put(key("a"), Expect::Any, "2");
                open(&etcd.target_from(died + 1, "a")).await.swap(put).await.unwrap();
                watch.next().await.unwrap().version
            }
            _ => store.get(&key("a")).await.unwrap().unwrap().version,
        };
        etcd.restart(died).unwrap();
        let store = open(&etcd.target_from(died, "a")).await;
        etcd.kill(died).unwrap();
        let swap = Swap::new().put(key("a"), Expect::Version(version), "3");
        store.swap(swap).await.unwrap();
        etcd.restart(died).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_member_every_call_ends_and_says_so() {
    let mut etcd = Etcd::start(1).unwrap();
    let store = open(&etcd.target("a")).await;
    let mut watch = store.watch(b"").await.unwrap();
    etcd.kill(0).unwrap();
    assert_eq!(watch.next().await, Err(StoreError::WatchLost));
    let a = key("a");
    let (got, listed, swapped) = tokio::join!(
        store.get(&a),
        store.list(b"", None, 10),
        store.swap(Swap::new().put(key("a"), Expect::Any, "1"))
    );
    assert!(matches!(got, Err(StoreError::Unavailable { .. })), "{got:?}");
    assert!(matches!(listed, Err(StoreError::Unavailable { .. })), "{listed:?}");
    assert!(matches!(swapped, Err(StoreError::Unavailable { .. })), "{swapped:?}");
    etcd.restart(0).unwrap();
    store.swap(Swap::new().put(key("a"), Expect::Absent, "1")).await.unwrap();
}

/// Everybody adds one to the same number while members die, hang and come back. Of a swap whose
/// outcome is unknown, the value that was written tells whether it happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_increment_is_lost_or_done_twice_while_members_die() {
    let mut etcd = Etcd::start(3).unwrap();
    let first = open(&etcd.target("a")).await;
    first.swap(Swap::new().put(key("n"), Expect::Absent, "0")).await.unwrap();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    for task in 0..6 {
        let store = open(&etcd.target_from(task, "a")).await;
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        tasks.spawn(async move {
            let mut mine = 0;
            while !stop.load(Ordering::SeqCst) {
                mine += u64::from(add_one(&*store, task, mine).await);
                done.fetch_add(1, Ordering::SeqCst);
            }
            mine
        });
    }
    let more = |from: u64| {
        let done = Arc::clone(&done);
        async move {
            let waited = tokio::time::timeout(Duration::from_secs(60), async {
                while done.load(Ordering::SeqCst) < from + 40 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
            waited.await.expect("the others go on");
            done.load(Ordering::SeqCst)
        }
    };
    let mut count = more(0).await;
    for at in 0..3 {
        etcd.kill(at).unwrap();
        count = more(count).await;
        etcd.restart(at).unwrap();
        etcd.signal(at, rustix::process::Signal::STOP).unwrap();
        count = more(count).await;
        etcd.signal(at, rustix::process::Signal::CONT).unwrap();
        count = more(count).await;
    }
    stop.store(true, Ordering::SeqCst);
    let sum: u64 = tasks.join_all().await.into_iter().sum();
    let end = first.get(&key("n")).await.unwrap().unwrap();
    let (number, _) = parse(&end.value);
    assert_eq!(number, sum);
    assert!(sum > 40, "{sum}");
}

/// `number` or `number task.count`: who wrote it.
fn parse(value: &[u8]) -> (u64, String) {
    let text = std::str::from_utf8(value).unwrap();
    let (number, who) = text.split_once(' ').unwrap_or((text, ""));
    (number.parse().unwrap(), who.to_owned())
}

/// Whether one was added, as far as can be found out: by a mark of its own that the swap sets as well.
async fn add_one(store: &dyn MetaStore, task: usize, count: u64) -> bool {
    let me = format!("{task}.{count}");
    let mark = key(&format!("mark/{me}"));
    let Ok(Some(held)) = store.get(&key("n")).await else { return false };
    let (number, _) = parse(&held.value);
    let swap = Swap::new()
        .put(key("n"), Expect::Version(held.version), format!("{} {me}", number + 1))
        .put(mark.clone(), Expect::Absent, "");
    match store.swap(swap).await {
        Ok(_) => true,
        Err(StoreError::Conflict { .. }) => false,
        Err(StoreError::Unavailable { .. }) => loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            // When the version has gone, what expected it has happened or never will.
            let now = store.get(&key("n")).await;
            if matches!(now, Ok(Some(now)) if now.version != held.version)
                && let Ok(found) = store.get(&mark).await
            {
                return found.is_some();
            }
        },
        Err(error) => panic!("{error}"),
    }
}
