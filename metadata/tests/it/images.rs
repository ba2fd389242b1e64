//! Images.

use blobcr_metadata::records::{ImageRecord, KeyKind, RemovalRecord, SnapshotRecord};
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use crate::fixture::{Fixture, Kind, at, begin, clone, create, named, publish, refused, root};

#[tokio::test]
async fn an_image_is_found_by_name_and_id() {
    let f = Fixture::new().await;
    let image = f.image("base", "w").await;
    assert_eq!((image.pool, image.chunk_size), (1, 256 << 10));
    assert_eq!((image.latest, image.highest_number, image.writer.as_str()), (0, 0, "w"));
    assert_eq!(f.get("base").await.unwrap(), image);
    let by_id = v1::ImageRef { name: String::new(), id: image.id };
    assert_eq!(f.manager.get_image(by_id).await.unwrap(), image);
    refused(f.get("other").await, Kind::NotFound, &["\"other\"", "image list"]);
    let unknown = v1::ImageRef { name: String::new(), id: 99 };
    refused(f.manager.get_image(unknown).await, Kind::NotFound, &["99"]);
    refused(f.manager.get_image(v1::ImageRef::default()).await, Kind::NotFound, &[]);
}

#[tokio::test]
async fn bad_requests_are_refused_by_what_is_wrong_with_them() {
    let f = Fixture::new().await;
    for name in ["", "a/b", "..", "a\n", &"n".repeat(300)] {
        refused(f.manager.create_image(create(name, "")).await, Kind::Invalid, &["image"]);
        refused(f.manager.clone_image(clone(at("x", 0), name, "")).await, Kind::Invalid, &[]);
    }
    refused(f.get("a/b").await, Kind::Invalid, &["a/b"]);
    let size = v1::CreateImageRequest { chunk_size: 12345, ..create("a", "") };
    refused(f.manager.create_image(size).await, Kind::Invalid, &["12345"]);
    let pool = v1::CreateImageRequest { pool: "none".to_owned(), ..create("a", "") };
    refused(f.manager.create_image(pool).await, Kind::NotFound, &["\"none\"", "pool list"]);
    let writer = create("a", &"w".repeat(300));
    refused(f.manager.create_image(writer).await, Kind::Invalid, &["writer"]);
    let anywhere = v1::CreateImageRequest { pool: String::new(), ..create("a", "") };
    assert_eq!(f.manager.create_image(anywhere).await.unwrap().pool, 1);
}

#[tokio::test]
async fn a_name_is_taken_once_and_free_after_removal() {
    let f = Fixture::new().await;
    let first = f.image_with("base", "", 2).await;
    refused(
        f.manager.create_image(create("base", "")).await,
        Kind::Exists,
        &["\"base\"", "remove"],
    );
    f.manager.remove_image(named("base")).await.unwrap();
    refused(f.manager.remove_image(named("base")).await, Kind::NotFound, &["\"base\""]);
    refused(f.get("base").await, Kind::NotFound, &[]);
    let by_id = v1::ImageRef { name: String::new(), id: first.id };
    refused(f.manager.get_image(by_id).await, Kind::NotFound, &[]);
    let second = f.image("base", "").await;
    assert!(second.id > first.id);
    let lease = f.lease().await;
    let old = f.manager.begin_snapshot(begin(first.id, 0, lease, "")).await;
    refused(old, Kind::NotFound, &[]);
}

#[tokio::test]
async fn a_clone_begins_as_its_source() {
    let f = Fixture::new().await;
    let base = f.image_with("base", "", 3).await;
    let made = f.manager.clone_image(clone(at("base", 2), "copy", "w")).await.unwrap();
    let (image, first) = (made.image.unwrap(), made.snapshot.unwrap());
    assert_eq!((image.parent_image, image.parent_snapshot), (base.id, 2));
    assert_eq!((image.latest, image.highest_number, image.writer.as_str()), (1, 1, "w"));
    assert_eq!((image.pool, image.chunk_size), (base.pool, base.chunk_size));
    assert_eq!((first.number, first.state()), (1, SnapshotState::Stable));
    assert_eq!(first.root, Some(root(2)));
    assert_eq!(f.snapshot("copy", 0).await.unwrap(), first);
    // Without a number: the newest stable one.
    let made = f.manager.clone_image(clone(at("base", 0), "newest", "")).await.unwrap();
    assert_eq!(made.snapshot.unwrap().root, Some(root(3)));
    // The source may go; the clone stays.
    f.manager.remove_image(named("base")).await.unwrap();
    assert_eq!(f.snapshot("copy", 1).await.unwrap(), first);
    let lease = f.lease().await;
    let next = f.manager.begin_snapshot(begin(image.id, 0, lease, "w")).await.unwrap();
    assert_eq!(next.number, 2);
}

#[tokio::test]
async fn only_a_stable_snapshot_is_cloned() {
    let f = Fixture::new().await;
    let base = f.image("base", "").await;
    let cloned = |number| f.manager.clone_image(clone(at("base", number), "copy", ""));
    refused(cloned(0).await, Kind::NotFound, &["stable snapshot", "\"base\""]);
    refused(cloned(1).await, Kind::NotFound, &["base@1"]);
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(base.id, 1, lease, "")).await.unwrap();
    refused(cloned(1).await, Kind::Precondition, &["base@1", "pending"]);
    f.manager.publish_snapshot(publish(base.id, 1, lease, "", 1)).await.unwrap();
    f.manager.begin_snapshot(begin(base.id, 2, lease, "")).await.unwrap();
    f.manager.publish_snapshot(publish(base.id, 2, lease, "", 2)).await.unwrap();
    f.manager.remove_snapshot(at("base", 1)).await.unwrap();
    refused(cloned(1).await, Kind::Precondition, &["base@1", "obsolete"]);
    refused(f.get("copy").await, Kind::NotFound, &[]);
    cloned(2).await.unwrap();
    refused(cloned(2).await, Kind::Exists, &["\"copy\""]);
}

#[tokio::test]
async fn images_are_listed_in_pages_by_name() {
    let f = Fixture::new().await;
    let names: Vec<String> = (0..25).map(|n| format!("i{:02}", n * 7 % 25)).collect();
    for name in &names {
        f.image(name, "").await;
    }
    let mut sorted = names.clone();
    sorted.sort_unstable();
    for limit in [1, 4, 25, 26] {
        let mut found: Vec<String> = Vec::new();
        loop {
            let after_name = found.last().cloned().unwrap_or_default();
            let r = v1::ListImagesRequest { after_name, limit };
            let page = f.manager.list_images(r).await.unwrap();
            assert!(page.images.len() <= limit as usize);
            found.extend(page.images.into_iter().map(|image| image.name));
            if !page.more {
                break;
            }
        }
        assert_eq!(found, sorted, "limit {limit}");
    }
    let all = f.manager.list_images(v1::ListImagesRequest::default()).await.unwrap();
    assert_eq!((all.images.len(), all.more), (25, false));
}

#[tokio::test]
async fn a_listing_without_a_limit_is_bounded() {
    let f = Fixture::new().await;
    f.image_with("base", "", 1).await;
    for n in 0..1100 {
        f.manager.clone_image(clone(at("base", 0), &format!("c{n:04}"), "")).await.unwrap();
    }
    for limit in [0, u32::MAX] {
        let r = v1::ListImagesRequest { after_name: String::new(), limit };
        let page = f.manager.list_images(r).await.unwrap();
        assert_eq!((page.images.len(), page.more), (1000, true));
    }
}

#[tokio::test]
async fn a_removed_image_leaves_only_obsolete_snapshots() {
    let f = Fixture::new().await;
    let image = f.image_with("base", "w", 100).await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 0, lease, "w")).await.unwrap();
    f.manager.remove_image(named("base")).await.unwrap();
    let snapshots = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
    assert_eq!(snapshots.len(), 101);
    assert!(snapshots.iter().all(|s| s.state() == SnapshotState::Obsolete));
    assert_eq!(f.records::<RemovalRecord>(KeyKind::Removal).await, []);
    // The grave stays, so that nothing is taken for alive.
    let graves = f.records::<ImageRecord>(KeyKind::Image).await;
    assert!(graves.iter().all(ImageRecord::is_removed));
    let late = f.manager.publish_snapshot(publish(image.id, 101, lease, "w", 1)).await;
    refused(late, Kind::NotFound, &[]);
    // Its writer tidies up without knowing.
    let failed = f.manager.fail_snapshot(crate::fixture::fail(image.id, 101, "w")).await.unwrap();
    assert_eq!(failed.state(), SnapshotState::Obsolete);
}

/// The process dies after each of the swaps that a removal takes.
#[tokio::test]
async fn an_interrupted_removal_is_finished_later() {
    for swaps in 0..8 {
        let f = Fixture::new().await;
        f.image_with("base", "", 100).await;
        let flaky = crate::flaky::flaky(&f.store);
        flaky.crash_after(swaps, true);
        let dying = crate::fixture::manager(&flaky.as_store(), &f.clock, 3);
        let died = dying.remove_image(named("base")).await.is_err();
        // One swap buries it, three mark 32 each, one the rest.
        assert_eq!(died, swaps < 5, "{swaps}");
        let f = f.restarted();
        refused(f.get("base").await, Kind::NotFound, &[]);
        f.image("base", "").await;
        // Its last swap may have been the one that the process died in.
        assert_eq!(f.manager.finish_removals().await.unwrap(), usize::from(swaps < 4), "{swaps}");
        let snapshots = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
        assert_eq!(snapshots.len(), 100);
        assert!(snapshots.iter().all(|s| s.state() == SnapshotState::Obsolete), "{swaps}");
        assert_eq!(f.records::<RemovalRecord>(KeyKind::Removal).await, []);
        assert_eq!(f.manager.finish_removals().await.unwrap(), 0);
    }
}
