//! Many callers at once, on real threads and on sled.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blobcr_metadata::records::{KeyKind, LeaseRecord, LeaseWorkRecord, SnapshotRecord};
use blobcr_metadata::store::sled::SledStore;
use blobcr_metadata::version_manager::VersionManager;
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::fixture::{Fixture, Kind, TTL_MS, at, begin, clone, create, kind, named, publish};

async fn on_sled() -> (TempDir, Fixture) {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).await.unwrap();
    (dir, Fixture::over(Arc::new(store)).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_many_gets_a_name() {
    let (_dir, f) = on_sled().await;
    // Two services over one store.
    let managers = [Arc::clone(&f.manager), f.restarted().manager];
    for round in 0..10 {
        let mut tasks = JoinSet::new();
        for task in 0..16 {
            let manager = Arc::clone(&managers[task % 2]);
            let name = format!("name{round}");
            tasks.spawn(async move { manager.create_image(create(&name, "")).await });
        }
        let kinds: Vec<Kind> = tasks.join_all().await.iter().map(kind).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == Kind::Ok).count(), 1, "{kinds:?}");
        assert!(kinds.iter().all(|kind| matches!(kind, Kind::Ok | Kind::Exists)), "{kinds:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_clones_at_once() {
    const CLONES: usize = 1000;
    let (_dir, f) = on_sled().await;
    f.image_with("base", "", 1).await;
    let managers = [Arc::clone(&f.manager), f.restarted().manager];
    let mut tasks = JoinSet::new();
    for n in 0..CLONES {
        let manager = Arc::clone(&managers[n % 2]);
        let r = clone(at("base", 0), &format!("clone{n}"), "");
        tasks.spawn(async move { manager.clone_image(r).await.unwrap().image.unwrap().id });
    }
    let ids: BTreeSet<u64> = tasks.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), CLONES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn generations_are_unique_and_grow_in_time() {
    let (_dir, f) = on_sled().await;
    let managers = [Arc::clone(&f.manager), f.restarted().manager];
    let mut tasks = JoinSet::new();
    for n in 0..12 {
        let manager = Arc::clone(&managers[n % 2]);
        tasks.spawn(async move {
            let mut mine = Vec::new();
            for _ in 0..10 {
                let r = v1::AcquireLeaseRequest { holder: String::new(), ttl_ms: TTL_MS };
                mine.push(manager.acquire_lease(r).await.unwrap().generation);
            }
            assert!(mine.is_sorted());
            mine
        });
    }
    let mut all = tasks.join_all().await.concat();
    all.sort_unstable();
    assert_eq!(all, (1..=120).collect::<Vec<u64>>());
}

/// Publishes `count` snapshots, each with whatever number comes next.
async fn write(manager: Arc<VersionManager>, image: u64, lease: u64, count: u64) -> Vec<u64> {
    let mut numbers = Vec::new();
    for n in 0..count {
        let begun = manager.begin_snapshot(begin(image, 0, lease, "")).await.unwrap();
        let r = publish(image, begun.number, lease, "", n as u8);
        manager.publish_snapshot(r).await.unwrap();
        numbers.push(begun.number);
    }
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_of_one_image_never_meet_in_a_number_and_latest_only_grows() {
    const WRITERS: usize = 6;
    const EACH: u64 = 15;
    let (_dir, f) = on_sled().await;
    let image = f.image("i", "").await.id;
    let done = Arc::new(AtomicBool::new(false));
    let reader = {
        let (manager, done) = (Arc::clone(&f.manager), Arc::clone(&done));
        tokio::spawn(async move {
            let (mut latest, mut reads) = (0, 0);
            while !done.load(Ordering::SeqCst) {
                let image = manager.get_image(named("i")).await.unwrap();
                assert!(image.latest >= latest && image.latest <= image.highest_number);
                latest = image.latest;
                if latest > 0 {
                    let snapshot = manager.get_snapshot(at("i", 0)).await.unwrap();
                    assert_eq!(snapshot.state(), SnapshotState::Stable);
                    assert!(snapshot.number >= latest);
                }
                reads += 1;
            }
            reads
        })
    };
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let lease = f.lease().await;
        writers.spawn(write(Arc::clone(&f.manager), image, lease, EACH));
    }
    let mut numbers = writers.join_all().await.concat();
    done.store(true, Ordering::SeqCst);
    assert!(reader.await.unwrap() > 0);
    numbers.sort_unstable();
    let total = WRITERS as u64 * EACH;
    assert_eq!(numbers, (1..=total).collect::<Vec<_>>());
    assert_eq!(f.get("i").await.unwrap().latest, total);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_lives_on_in_an_image_that_is_removed_while_it_is_written() {
    for round in 0..8u64 {
        let (_dir, f) = on_sled().await;
        let image = f.image_with("i", "", 40).await.id;
        let mut writers = JoinSet::new();
        for _ in 0..4 {
            let (manager, lease) = (Arc::clone(&f.manager), f.lease().await);
            writers.spawn(async move {
                loop {
                    let begun = manager.begin_snapshot(begin(image, 0, lease, "")).await;
                    let Ok(begun) = begun else { return kind(&begun) };
                    let r = publish(image, begun.number, lease, "", 1);
                    let published = manager.publish_snapshot(r).await;
                    if published.is_err() {
                        return kind(&published);
                    }
                }
            });
        }
        // Once they are at it, a little later each time.
        while f.get("i").await.unwrap().latest < 41 + round {
            tokio::task::yield_now().await;
        }
        f.manager.remove_image(named("i")).await.unwrap();
        for ended in writers.join_all().await {
            assert_eq!(ended, Kind::NotFound);
        }
        let snapshots = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
        assert!(snapshots.len() > 40);
        assert!(snapshots.iter().all(|s| s.state() == SnapshotState::Obsolete), "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_stays_pending_under_a_lease_that_ends_while_it_is_used() {
    for round in 0..8u64 {
        let (_dir, f) = on_sled().await;
        let mut writers = JoinSet::new();
        for n in 0..4 {
            let image = f.image(&format!("i{n}"), "").await.id;
            let (manager, lease) = (Arc::clone(&f.manager), f.lease().await);
            writers.spawn(async move {
                loop {
                    let begun = manager.begin_snapshot(begin(image, 0, lease, "")).await;
                    if begun.is_err() {
                        return kind(&begun);
                    }
                }
            });
        }
        while f.get("i0").await.unwrap().highest_number < 5 + round {
            tokio::task::yield_now().await;
        }
        f.clock.advance_ms(TTL_MS);
        // Two services look for dead leases at the same time.
        let other = f.restarted().manager;
        let (a, b) = tokio::join!(f.manager.expire_leases(), other.expire_leases());
        assert_eq!((a.unwrap(), b.unwrap()), (4, 0), "the second one began just now");
        for ended in writers.join_all().await {
            assert_eq!(ended, Kind::Precondition);
        }
        let snapshots = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
        assert!(snapshots.iter().all(|s| s.state() == SnapshotState::Failed), "round {round}");
        assert_eq!(f.records::<LeaseWorkRecord>(KeyKind::LeaseWork).await, []);
        assert_eq!(f.records::<LeaseRecord>(KeyKind::Lease).await, []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_vms_check_in_at_once() {
    const VMS: u32 = 64;
    let (_dir, f) = on_sled().await;
    f.image_with("a", "", 1).await;
    let mut tasks = JoinSet::new();
    for n in 0..VMS {
        let manager = Arc::clone(&f.manager);
        let member = v1::SetMember {
            vm: format!("vm{n}"),
            disk: "d".to_owned(),
            image: "a".to_owned(),
            number: 1,
        };
        let (group, members) = ("g".to_owned(), vec![member]);
        let r = v1::AddToSetRequest { group, sequence: 1, expected_vms: VMS, members };
        tasks.spawn(async move { manager.add_to_set(r).await.unwrap().complete });
    }
    let complete = tasks.join_all().await;
    assert!(complete.contains(&true), "the last one sees all");
    let set = f.manager.latest_set(v1::LatestSetRequest { group: "g".to_owned() }).await.unwrap();
    assert_eq!((set.members.len() as u32, set.complete, set.stable), (VMS, true, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn all_who_wait_learn_of_the_snapshot() {
    let (_dir, f) = on_sled().await;
    let image = f.image("i", "w").await.id;
    let lease = f.lease().await;
    for number in 1..=20 {
        f.manager.begin_snapshot(begin(image, number, lease, "w")).await.unwrap();
        let mut waiting = JoinSet::new();
        for _ in 0..10 {
            let manager = Arc::clone(&f.manager);
            let r = v1::WaitSnapshotRequest { snapshot: Some(at("i", number)), timeout_ms: 60_000 };
            waiting.spawn(async move { manager.wait_snapshot(r).await.unwrap().state() });
        }
        f.manager.publish_snapshot(publish(image, number, lease, "w", 1)).await.unwrap();
        assert!(waiting.join_all().await.iter().all(|state| *state == SnapshotState::Stable));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_table_is_made_however_many_ask() {
    let (_dir, f) = on_sled().await;
    for n in 0..3 {
        let r = v1::RegisterNodeRequest {
            id: format!("{n:032x}"),
            address: format!("h{n}:1"),
            domain: String::new(),
            cluster: String::new(),
        };
        f.manager.register_node(r).await.unwrap();
    }
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let manager = Arc::clone(&f.manager);
        let pool = v1::GetPlacementRequest { name: "default".into(), ..Default::default() };
        tasks.spawn(async move { manager.get_placement(pool).await.unwrap() });
    }
    let tables = tasks.join_all().await;
    assert!(tables.iter().all(|table| *table == tables[0] && table.version == 1));
}
