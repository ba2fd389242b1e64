//! From the embedded store to an etcd.

use std::path::Path;
use std::sync::Arc;

use blobcr_metadata::directory::DirectoryError;
use blobcr_metadata::migrate::{MigrateError, migrate};
use blobcr_metadata::store::etcd::{Claim, EtcdOpenError, EtcdStore, EtcdTarget};
use blobcr_metadata::store::sled::SledStore;
use blobcr_metadata::store::{Entry, Expect, Key, MetaStore, StoreError, Swap, VALUE_BYTES_MAX};
use blobcr_metadata::{OpenError, Options, open, open_etcd};
use blobcr_proto::v1;
use blobcr_tests::etcd::Etcd;

use crate::fixture::{Kind, at, begin, create, named, publish, refused};

async fn all(store: &dyn MetaStore) -> Vec<(Key, bytes::Bytes)> {
    let mut all: Vec<(Key, bytes::Bytes)> = Vec::new();
    loop {
        let page = store.list(b"", all.last().map(|(key, _)| key), 100).await.unwrap();
        all.extend(page.entries.into_iter().map(|Entry { key, value, .. }| (key, value)));
        if !page.more {
            return all;
        }
    }
}

/// A directory with a repository of `images` images, and values of every length besides.
async fn filled(dir: &Path, images: usize) -> Vec<(Key, bytes::Bytes)> {
    let service = open(dir, Options::default()).await.unwrap();
    service.ensure_pool("default", "replica:1").await.unwrap();
    for n in 0..images {
        service.manager().create_image(create(&format!("i{n}"), "")).await.unwrap();
    }
    service.close().await;
    let store = SledStore::open(&dir.join("sled")).await.unwrap();
    for n in 0..40 {
        let key = Key::new(vec![0xff, 0xff, n]);
        let value = vec![n; VALUE_BYTES_MAX * usize::from(n) / 40];
        store.swap(Swap::new().put(key, Expect::Any, value)).await.unwrap();
    }
    all(&store).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_is_moved_and_the_directory_is_refused_then() {
    let etcd = Etcd::start(1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let records = filled(dir.path(), 200).await;
    let target: EtcdTarget = etcd.target("a").parse().unwrap();
    let moved = migrate(dir.path(), &target).await.unwrap();
    assert_eq!(moved.records, records.len() as u64);
    let store = EtcdStore::open(&target).await.unwrap();
    assert_eq!(all(&store).await, records);

    let refused = open(dir.path(), Options::default()).await.unwrap_err();
    let message = refused.to_string();
    assert!(matches!(refused, OpenError::Directory(DirectoryError::Moved { .. })), "{message}");
    assert!(message.contains(&target.to_string()), "{message}");
    let service = open_etcd(&target, Options::default()).await.unwrap();
    let image = service.manager().get_image(named("i7")).await.unwrap();
    let made = service.manager().create_image(create("new", "")).await.unwrap();
    assert!(made.id > image.id, "ids are not given again");
    // Again: to the same place, which is in use now; and to another one.
    let again = migrate(dir.path(), &target).await.unwrap_err();
    assert!(matches!(again, MigrateError::Etcd(EtcdOpenError::NotEmpty { .. })), "{again}");
    let elsewhere = migrate(dir.path(), &etcd.target("b").parse().unwrap()).await.unwrap_err();
    let moved_before = matches!(elsewhere, MigrateError::Directory(DirectoryError::Moved { .. }));
    assert!(moved_before, "{elsewhere}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_use_or_not_empty_is_refused_and_left_as_it_is() {
    let etcd = Etcd::start(1).unwrap();
    let target: EtcdTarget = etcd.target("a").parse().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let absent = migrate(dir.path(), &target).await.unwrap_err();
    assert!(matches!(absent, MigrateError::Directory(DirectoryError::Absent { .. })), "{absent}");

    let service = open(dir.path(), Options::default()).await.unwrap();
    let in_use = migrate(dir.path(), &target).await.unwrap_err();
    assert!(matches!(in_use, MigrateError::Directory(DirectoryError::InUse { .. })), "{in_use}");
    service.close().await;

    let other = open_etcd(&target, Options::default()).await.unwrap();
    other.ensure_pool("default", "replica:2").await.unwrap();
    let taken = migrate(dir.path(), &target).await.unwrap_err();
    assert!(matches!(taken, MigrateError::Etcd(EtcdOpenError::NotEmpty { .. })), "{taken}");
    assert!(taken.to_string().contains("#NAME"), "{taken}");
    other.ensure_pool("default", "replica:2").await.unwrap();
    open(dir.path(), Options::default()).await.unwrap().close().await;
}

/// As a process that dies leaves it: after the claim and some records, or after the directory was
/// marked.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_was_broken_off_is_made_again() {
    let etcd = Etcd::start(1).unwrap();
    for marked in [false, true] {
        let target: EtcdTarget = etcd.target(&format!("a{marked}")).parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let records = filled(dir.path(), 3).await;
        let claim = Claim::new(&target).await.unwrap();
        let rubbish = Swap::new().put(Key::new("rubbish"), Expect::Absent, "1");
        claim.store().swap(rubbish.clone()).await.unwrap();
        if marked {
            let directory = blobcr_metadata::directory::Directory::open_to_move(
                dir.path(),
                &target.to_string(),
            );
            directory.unwrap().mark_moved(&target.to_string()).unwrap();
        }
        let early = open_etcd(&target, Options::default()).await.unwrap_err();
        assert!(matches!(early, OpenError::Etcd(EtcdOpenError::Migrating { .. })), "{early}");
        assert_eq!(open(dir.path(), Options::default()).await.is_err(), marked);

        migrate(dir.path(), &target).await.unwrap();
        let store = EtcdStore::open(&target).await.unwrap();
        assert_eq!(all(&store).await, records);
        // Whoever held the claim before can neither write nor release it.
        let late = claim.store().swap(rubbish).await;
        assert!(matches!(late, Err(StoreError::Damaged { .. })), "{late:?}");
        assert_eq!(all(&store).await, records);
        drop(claim);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn markers_of_version_1_are_known() {
    let etcd = Etcd::start(1).unwrap();
    let target: EtcdTarget = etcd.target("a").parse().unwrap();
    let claim = Claim::new(&target).await.unwrap();
    let migrating = etcd.value("blobcr/a/format").unwrap();
    assert_eq!(migrating, include_str!("../../golden/etcd-migrating-v1.txt"));
    claim.store().swap(Swap::new().put(Key::new("k"), Expect::Absent, "v")).await.unwrap();
    claim.finish().await.unwrap();
    assert_eq!(
        etcd.value("blobcr/a/format").unwrap(),
        include_str!("../../golden/etcd-marker-v1.txt")
    );
    assert_eq!(etcd.value("blobcr/a/kk").unwrap(), "v");

    // Written by a newer program, and by none of ours.
    etcd.put("blobcr/b/format", "blobcr-metadata 2 etcd 00000000").unwrap();
    etcd.put("blobcr/c/kx", "v").unwrap();
    for name in ["b", "c"] {
        let refused = EtcdStore::open(&etcd.target(name).parse().unwrap()).await;
        let refused = refused.unwrap_err();
        assert!(matches!(refused, EtcdOpenError::Damaged { .. }), "{refused}");
    }
}

/// Two services over one etcd, each with its own memory of image ids.
#[tokio::test(flavor = "multi_thread")]
async fn two_services_over_one_etcd_are_one() {
    let etcd = Etcd::start(3).unwrap();
    let (a, b) = (etcd.target_from(0, "a"), etcd.target_from(1, "a"));
    let open = |target: String| async move {
        open_etcd(&target.parse().unwrap(), Options::default()).await.unwrap()
    };
    let (a, b) = tokio::join!(open(a), open(b));
    let pools =
        tokio::join!(a.ensure_pool("default", "replica:1"), b.ensure_pool("default", "replica:1"));
    assert_eq!(pools.0.unwrap(), pools.1.unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..200 {
        let manager = Arc::clone(if n % 2 == 0 { a.manager() } else { b.manager() });
        tasks.spawn(async move { manager.create_image(create(&format!("i{n}"), "")).await });
    }
    let mut ids: Vec<u64> = tasks.join_all().await.into_iter().map(|i| i.unwrap().id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 200);
    // Every step of a snapshot at the other service, and a wait at both.
    let image = b.manager().get_image(named("i0")).await.unwrap();
    let r = v1::AcquireLeaseRequest { holder: String::new(), ttl_ms: 0 };
    let lease = a.manager().acquire_lease(r).await.unwrap().id;
    b.manager().begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    let r = || v1::WaitSnapshotRequest { snapshot: Some(at("i0", 1)), timeout_ms: 60_000 };
    let (at_a, at_b, published) = tokio::join!(
        a.manager().wait_snapshot(r()),
        b.manager().wait_snapshot(r()),
        a.manager().publish_snapshot(publish(image.id, 1, lease, "w", 7)),
    );
    assert_eq!(at_a.unwrap(), published.clone().unwrap());
    assert_eq!(at_b.unwrap(), published.unwrap());
    a.manager().renew_lease(v1::RenewLeaseRequest { lease_id: lease }).await.unwrap();
    b.manager().release_lease(v1::ReleaseLeaseRequest { lease_id: lease }).await.unwrap();
    let gone = a.manager().renew_lease(v1::RenewLeaseRequest { lease_id: lease }).await;
    refused(gone, Kind::Precondition, &["ended"]);
}
