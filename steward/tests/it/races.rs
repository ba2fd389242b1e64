//! One test for each way in which a writer and the collector may meet.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blobcr_proto::v1::RecordKind;
use blobcr_proto::{Hash, v1};
use blobcr_steward::{CollectError, CollectOptions, collect};

use crate::fixture::{Fixture, Hook, POOL, at, disk, named, nothing, small};

/// Does something at the first call only.
fn once<F>(act: impl Fn() -> F + Send + Sync + 'static) -> Hook
where
    F: Future<Output = ()> + Send + 'static,
{
    let done = AtomicBool::new(false);
    Box::new(
        move || {
            if done.swap(true, Ordering::Relaxed) { Box::pin(async {}) } else { Box::pin(act()) }
        },
    )
}

#[tokio::test]
async fn what_a_removed_image_held_alone_goes_and_a_dry_run_only_tells() {
    let fixture = Fixture::new(2, "replica:1").await;
    fixture.import("stays", &disk(b"abcdefgh\0\0ij")).await;
    fixture.import("goes", &disk(b"abXdefYh\0\0iZ")).await;
    let needed = fixture.reached(&fixture.root("stays", 1).await).await;
    assert_eq!(fixture.collect().await.records(), 0);

    let before = fixture.held();
    fixture.remove_image("goes").await;
    let garbage = fixture.all_held().len() - needed.len();
    let dry = CollectOptions { dry_run: true, ..small() };
    let told = collect(&fixture.repository(), dry).await.unwrap();
    assert_eq!(told.records(), garbage as u64);
    assert_eq!(fixture.held(), before, "a dry run changes nothing");

    let done = fixture.collect().await;
    assert_eq!((done.records(), done.bytes()), (told.records(), told.bytes()));
    assert_eq!(done.roots, 1);
    assert_eq!(fixture.all_held(), needed);
    assert!(fixture.read("stays", 1).await == disk(b"abcdefgh\0\0ij"));
    assert_eq!(fixture.collect().await.records(), 0);
}

#[tokio::test]
async fn a_chunk_that_a_writer_touched_stays_as_long_as_its_lease() {
    let fixture = Fixture::new(2, "replica:2").await;
    fixture.import("goes", &disk(b"abcd")).await;
    let touched: Vec<Hash> =
        [b"b", b"d"].map(|letter| Hash::of(&disk(letter))).into_iter().collect();
    fixture.remove_image("goes").await;
    let lease = fixture.lease().await;
    let pool = fixture.repository().pool(POOL).await.unwrap();
    let held = pool.touch(lease.generation, RecordKind::Chunk, &touched).await.unwrap();
    assert_eq!(held, [true, true]);

    let done = fixture.collect().await;
    assert_eq!(done.nodes.iter().map(|node| node.spared).sum::<u64>(), 4, "on two nodes");
    assert_eq!(fixture.all_held(), touched.iter().copied().collect::<BTreeSet<_>>());
    fixture.release(lease.id).await;
    fixture.collect().await;
    assert!(fixture.all_held().is_empty());
    let held = pool.touch(99, RecordKind::Chunk, &touched).await.unwrap();
    assert_eq!(held, [false, false], "so that the next writer stores it again");
}

#[tokio::test]
async fn a_lease_that_ran_out_counts_until_it_has_ended() {
    let fixture = Fixture::new(1, "replica:1").await;
    let image = fixture.import("base", &disk(b"abcd")).await;
    let lease = fixture.lease().await;
    let begin =
        v1::BeginSnapshotRequest { image_id: image.id, lease_id: lease.id, ..Default::default() };
    fixture.service.manager().begin_snapshot(begin).await.unwrap();
    let object = blobcr_repository::Object {
        kind: RecordKind::Chunk,
        id: Hash::of(&disk(b"x")),
        plain: disk(b"x").into(),
    };
    let id = object.id;
    let pool = fixture.repository().pool(POOL).await.unwrap();
    pool.put(lease.generation, vec![object]).await.unwrap();
    fixture.clock.advance_ms(1_000_000);
    fixture.collect().await;
    assert!(fixture.all_held().contains(&id), "its snapshot is still pending");
    fixture.end_leases().await;
    fixture.collect().await;
    assert!(!fixture.all_held().contains(&id));
    assert!(fixture.read("base", 1).await == disk(b"abcd"));
}

/// A snapshot published, an image cloned and its source removed after the bound was read: the root
/// is found though it is older, or newer, than the list of snapshots.
#[tokio::test]
async fn what_is_published_or_cloned_between_bound_and_mark_stays() {
    let fixture = Arc::new(Fixture::new(2, "replica:1").await);
    fixture.import("source", &disk(b"abcdefgh")).await;
    let image = fixture.import("written", &disk(b"ABCD")).await;
    let lease = fixture.lease().await;
    let manager = Arc::clone(fixture.service.manager());
    // What a writer stores before the collection, and publishes within it.
    let begin =
        v1::BeginSnapshotRequest { image_id: image.id, lease_id: lease.id, ..Default::default() };
    let number = manager.begin_snapshot(begin).await.unwrap().number;
    let root = crate::model::persist_over(&fixture, "written", 1, &disk(b"AxyD"), &lease).await;
    let hook = {
        let (manager, fixture) = (Arc::clone(&manager), Arc::clone(&fixture));
        once(move || {
            let (manager, fixture, root) =
                (Arc::clone(&manager), Arc::clone(&fixture), root.clone());
            async move {
                let publish = v1::PublishSnapshotRequest {
                    image_id: image.id,
                    number,
                    lease_id: lease.id,
                    root: Some(root),
                    ..Default::default()
                };
                manager.publish_snapshot(publish).await.unwrap();
                fixture.release(lease.id).await;
                let source = Some(at("source", 1));
                let clone =
                    v1::CloneImageRequest { source, name: "clone".into(), ..Default::default() };
                manager.clone_image(clone).await.unwrap();
                manager.remove_image(named("source")).await.unwrap();
            }
        })
    };
    collect(&fixture.hooked(hook, nothing()), small()).await.unwrap();
    assert!(fixture.read("written", 2).await == disk(b"AxyD"));
    assert!(fixture.read("clone", 1).await == disk(b"abcdefgh"));
}

/// Removed while the trees are being read: the clone that took the root over is not in the list.
#[tokio::test]
async fn a_clone_made_behind_the_list_is_safe_when_its_source_goes() {
    let fixture = Arc::new(Fixture::new(1, "replica:1").await);
    fixture.import("source", &disk(b"abcdefgh")).await;
    let hook = {
        let fixture = Arc::clone(&fixture);
        once(move || {
            let fixture = Arc::clone(&fixture);
            async move {
                let source = Some(at("source", 1));
                let clone =
                    v1::CloneImageRequest { source, name: "clone".into(), ..Default::default() };
                fixture.service.manager().clone_image(clone).await.unwrap();
                fixture.remove_image("source").await;
            }
        })
    };
    collect(&fixture.hooked(nothing(), hook), small()).await.unwrap();
    assert!(fixture.read("clone", 1).await == disk(b"abcdefgh"));
}

#[tokio::test]
async fn nothing_goes_while_a_live_tree_cannot_be_read() {
    let fixture = Fixture::new(1, "replica:1").await;
    fixture.import("broken", &disk(b"abcdefgh")).await;
    fixture.import("goes", &disk(b"vwxyz")).await;
    fixture.remove_image("goes").await;
    let root = Hash::from_slice(&fixture.root("broken", 1).await.node).unwrap();
    fixture.lose(0, [root]).await;
    let before = fixture.held();
    let error = collect(&fixture.repository(), small()).await.unwrap_err();
    assert!(
        matches!(&error, CollectError::Tree { image, number: 1, .. } if image == "broken"),
        "{error}"
    );
    assert_eq!(fixture.held(), before);
}
