//! Snapshots.

use std::time::Duration;

use blobcr_metadata::Error;
use blobcr_metadata::records::{KeyKind, LeaseWorkRecord};
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use crate::fixture::{Fixture, Kind, TTL_MS, at, begin, fail, kind, named, publish, refused, root};

#[tokio::test]
async fn publishing_makes_stable_and_moves_latest_at_once() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    let begun = f.manager.begin_snapshot(begin(image.id, 0, lease, "w")).await.unwrap();
    assert_eq!(
        (begun.number, begun.state(), begun.root.clone()),
        (1, SnapshotState::Pending, None)
    );
    assert_eq!(begun.image, "i");
    refused(f.snapshot("i", 0).await, Kind::NotFound, &["stable snapshot"]);
    f.clock.advance_ms(5);
    let done = f.manager.publish_snapshot(publish(image.id, 1, lease, "w", 9)).await.unwrap();
    assert_eq!((done.state(), done.root.clone()), (SnapshotState::Stable, Some(root(9))));
    assert_eq!(done.stable_unix_ms, done.created_unix_ms + 5);
    assert_eq!(done.stats.unwrap().dirty_chunks, 9);
    assert_eq!(f.snapshot("i", 0).await.unwrap(), done);
    assert_eq!(f.get("i").await.unwrap().latest, 1);
    assert_eq!(f.records::<LeaseWorkRecord>(KeyKind::LeaseWork).await, []);
}

#[tokio::test]
async fn publishing_again_changes_nothing() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    let r = publish(image.id, 1, lease, "w", 1);
    let done = f.manager.publish_snapshot(r.clone()).await.unwrap();
    // Also when the reply was lost for so long that the lease is gone.
    f.clock.advance_ms(TTL_MS);
    assert_eq!(f.manager.publish_snapshot(r).await.unwrap(), done);
    let other = f.manager.publish_snapshot(publish(image.id, 1, lease, "w", 2)).await;
    refused(other, Kind::Precondition, &["i@1", "another root"]);
}

#[tokio::test]
async fn latest_never_goes_back() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    for number in [1, 2, 5] {
        f.manager.begin_snapshot(begin(image.id, number, lease, "w")).await.unwrap();
    }
    f.manager.publish_snapshot(publish(image.id, 2, lease, "w", 2)).await.unwrap();
    let late = f.manager.publish_snapshot(publish(image.id, 1, lease, "w", 1)).await.unwrap();
    assert_eq!(late.state(), SnapshotState::Stable);
    assert_eq!(f.get("i").await.unwrap().latest, 2);
    f.manager.publish_snapshot(publish(image.id, 5, lease, "w", 5)).await.unwrap();
    let image = f.get("i").await.unwrap();
    assert_eq!((image.latest, image.highest_number), (5, 5));
}

#[tokio::test]
async fn a_number_is_begun_once() {
    let f = Fixture::new().await;
    let image = f.image("i", "").await;
    let lease = f.lease().await;
    let begun = |number| f.manager.begin_snapshot(begin(image.id, number, lease, ""));
    assert_eq!(begun(0).await.unwrap().number, 1);
    assert_eq!(begun(7).await.unwrap().number, 7);
    for taken in [1, 3, 7] {
        refused(begun(taken).await, Kind::Precondition, &["numbers up to 7"]);
    }
    f.manager.fail_snapshot(fail(image.id, 7, "")).await.unwrap();
    refused(begun(7).await, Kind::Precondition, &[]);
    assert_eq!(begun(0).await.unwrap().number, 8);
    refused(begun(u64::MAX).await, Kind::Invalid, &[]);
    refused(f.manager.begin_snapshot(begin(99, 0, lease, "")).await, Kind::NotFound, &["99"]);
}

#[tokio::test]
async fn a_writer_that_came_back_goes_on_with_its_number() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let old = f.lease().await;
    let first = f.manager.begin_snapshot(begin(image.id, 4, old, "w")).await.unwrap();
    assert_eq!(f.manager.begin_snapshot(begin(image.id, 4, old, "w")).await.unwrap(), first);
    let new = f.lease().await;
    assert_eq!(f.manager.begin_snapshot(begin(image.id, 4, new, "w")).await.unwrap(), first);
    // The end of the old lease does not concern it any more.
    f.manager.release_lease(v1::ReleaseLeaseRequest { lease_id: old }).await.unwrap();
    assert_eq!(f.snapshot("i", 4).await.unwrap().state(), SnapshotState::Pending);
    f.manager.publish_snapshot(publish(image.id, 4, new, "w", 4)).await.unwrap();
    let again = f.manager.begin_snapshot(begin(image.id, 4, new, "w")).await;
    refused(again, Kind::Precondition, &["i@4"]);
    let unused = f.manager.begin_snapshot(begin(image.id, 2, new, "w")).await;
    refused(unused, Kind::Precondition, &[]);
}

#[tokio::test]
async fn only_its_writer_adds_to_an_image() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    let stranger = f.manager.begin_snapshot(begin(image.id, 0, lease, "x")).await;
    refused(stranger, Kind::Precondition, &["\"i\"", "another writer"]);
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    let stranger = f.manager.publish_snapshot(publish(image.id, 1, lease, "x", 1)).await;
    refused(stranger, Kind::Precondition, &["another writer"]);
    refused(f.manager.fail_snapshot(fail(image.id, 1, "x")).await, Kind::Precondition, &["alive"]);

    // An image of nobody takes snapshots from all, each finished by who began it.
    let image = f.image("shared", "").await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "a")).await.unwrap();
    f.manager.begin_snapshot(begin(image.id, 2, lease, "b")).await.unwrap();
    let other = f.manager.publish_snapshot(publish(image.id, 1, lease, "b", 1)).await;
    refused(other, Kind::Precondition, &["another writer"]);
    f.manager.publish_snapshot(publish(image.id, 1, lease, "a", 1)).await.unwrap();
    f.manager.publish_snapshot(publish(image.id, 2, lease, "b", 1)).await.unwrap();
}

#[tokio::test]
async fn nothing_is_published_under_a_dead_lease() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    f.clock.advance_ms(TTL_MS);
    let late = f.manager.publish_snapshot(publish(image.id, 1, lease, "w", 1)).await;
    refused(late, Kind::Precondition, &["lease", "run out", "acquire"]);
    refused(
        f.manager.begin_snapshot(begin(image.id, 2, lease, "w")).await,
        Kind::Precondition,
        &["run out"],
    );
    refused(
        f.manager.begin_snapshot(begin(image.id, 2, 12345, "w")).await,
        Kind::Precondition,
        &["ended"],
    );
    // Still pending, so a new lease will do.
    let new = f.lease().await;
    f.manager.publish_snapshot(publish(image.id, 1, new, "w", 1)).await.unwrap();
}

#[tokio::test]
async fn what_is_no_root_is_refused() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    let good = root(1);
    let bad = [
        None,
        Some(v1::TreeRoot { node: vec![1; 31].into(), ..good.clone() }),
        Some(v1::TreeRoot { fan_out: 0, ..good.clone() }),
        Some(v1::TreeRoot { fan_out: 2048, ..good.clone() }),
        Some(v1::TreeRoot { size_bytes: (8 << 40) + 1, ..good.clone() }),
        Some(v1::TreeRoot { chunk_size: 0, ..good.clone() }),
        // Right in itself, but not for this image.
        Some(v1::TreeRoot { chunk_size: 64 << 10, ..good.clone() }),
    ];
    for root in bad {
        let r = v1::PublishSnapshotRequest { root, ..publish(image.id, 1, lease, "w", 1) };
        refused(f.manager.publish_snapshot(r).await, Kind::Invalid, &["root"]);
    }
    let empty = v1::TreeRoot { size_bytes: 0, node: Vec::new().into(), ..good };
    let r = v1::PublishSnapshotRequest { root: Some(empty), ..publish(image.id, 1, lease, "w", 1) };
    assert_eq!(kind(&f.manager.publish_snapshot(r).await), Kind::Ok);
}

#[tokio::test]
async fn a_failed_snapshot_stays_failed() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    let reason = "ä".repeat(2000);
    let r = v1::FailSnapshotRequest { reason: reason.clone(), ..fail(image.id, 1, "w") };
    let failed = f.manager.fail_snapshot(r).await.unwrap();
    assert_eq!((failed.state(), failed.reason), (SnapshotState::Failed, "ä".repeat(512)));
    let again = f.manager.fail_snapshot(fail(image.id, 1, "w")).await.unwrap();
    assert!(again.reason.starts_with('ä'));
    let late = f.manager.publish_snapshot(publish(image.id, 1, lease, "w", 1)).await;
    refused(late, Kind::Precondition, &["i@1", "failed", "begin a new one"]);
    assert_eq!(f.get("i").await.unwrap().latest, 0);
    assert_eq!(f.records::<LeaseWorkRecord>(KeyKind::LeaseWork).await, []);
    f.image_with("j", "", 1).await;
    let id = f.get("j").await.unwrap().id;
    refused(f.manager.fail_snapshot(fail(id, 1, "")).await, Kind::Precondition, &["j@1", "stable"]);
    refused(f.manager.fail_snapshot(fail(id, 9, "")).await, Kind::NotFound, &["j@9"]);
    refused(f.manager.fail_snapshot(fail(99, 1, "")).await, Kind::NotFound, &[]);
}

#[tokio::test]
async fn anybody_fails_what_a_dead_writer_left() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    refused(f.manager.fail_snapshot(fail(image.id, 1, "x")).await, Kind::Precondition, &["i@1"]);
    f.clock.advance_ms(TTL_MS);
    let failed = f.manager.fail_snapshot(fail(image.id, 1, "x")).await.unwrap();
    assert_eq!(failed.state(), SnapshotState::Failed);
}

#[tokio::test]
async fn the_latest_snapshot_is_not_removed() {
    let f = Fixture::new().await;
    let image = f.image_with("i", "", 3).await;
    refused(f.manager.remove_snapshot(at("i", 3)).await, Kind::Precondition, &["i@3", "latest"]);
    refused(f.manager.remove_snapshot(at("i", 0)).await, Kind::Precondition, &["i@3", "latest"]);
    refused(f.manager.remove_snapshot(at("i", 4)).await, Kind::NotFound, &["i@4"]);
    let gone = f.manager.remove_snapshot(at("i", 1)).await.unwrap();
    assert_eq!(gone.state(), SnapshotState::Obsolete);
    assert_eq!(f.manager.remove_snapshot(at("i", 1)).await.unwrap(), gone);
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 4, lease, "")).await.unwrap();
    refused(f.manager.remove_snapshot(at("i", 4)).await, Kind::Precondition, &["i@4", "persisted"]);
    f.manager.fail_snapshot(fail(image.id, 4, "")).await.unwrap();
    let gone = f.manager.remove_snapshot(at("i", 4)).await.unwrap();
    assert_eq!(gone.state(), SnapshotState::Obsolete);
    let again = f.manager.publish_snapshot(publish(image.id, 4, lease, "", 4)).await;
    refused(again, Kind::Precondition, &["obsolete"]);
}

#[tokio::test]
async fn snapshots_are_listed_in_pages_by_number() {
    let f = Fixture::new().await;
    f.image_with("i", "", 20).await;
    f.image_with("j", "", 3).await;
    for limit in [1, 6, 20, 0] {
        let mut found: Vec<u64> = Vec::new();
        loop {
            let after_number = found.last().copied().unwrap_or(0);
            let r = v1::ListSnapshotsRequest { image: Some(named("i")), after_number, limit };
            let page = f.manager.list_snapshots(r).await.unwrap();
            assert!(limit == 0 || page.snapshots.len() <= limit as usize);
            assert!(page.snapshots.iter().all(|snapshot| snapshot.image == "i"));
            found.extend(page.snapshots.iter().map(|snapshot| snapshot.number));
            if !page.more {
                break;
            }
        }
        assert_eq!(found, (1..=20).collect::<Vec<_>>(), "limit {limit}");
    }
    let none = v1::ListSnapshotsRequest { image: Some(named("k")), ..Default::default() };
    refused(f.manager.list_snapshots(none).await, Kind::NotFound, &["\"k\""]);
}

/// The clock of the runtime stands still unless all wait: an answer cannot come from polling.
#[tokio::test(start_paused = true)]
async fn waiting_ends_with_the_snapshot_or_the_time() {
    let f = Fixture::new().await;
    let image = f.image_with("i", "w", 1).await;
    let wait = |number, timeout_ms| v1::WaitSnapshotRequest {
        snapshot: Some(at("i", number)),
        timeout_ms,
    };
    // Nothing to wait for.
    assert_eq!(f.manager.wait_snapshot(wait(0, 0)).await.unwrap().number, 1);
    refused(f.manager.wait_snapshot(wait(2, 10)).await, Kind::NotFound, &["i@2"]);

    let lease = f.lease().await;
    for number in [2, 3] {
        f.manager.begin_snapshot(begin(image.id, number, lease, "w")).await.unwrap();
    }
    refused(f.manager.wait_snapshot(wait(2, 0)).await, Kind::Timeout, &["i@2", "0 ms"]);
    let begun = tokio::time::Instant::now();
    refused(f.manager.wait_snapshot(wait(2, 1500)).await, Kind::Timeout, &["i@2", "1500 ms"]);
    assert_eq!(begun.elapsed().as_millis(), 1500);

    let waiting = |number| {
        let manager = std::sync::Arc::clone(&f.manager);
        tokio::spawn(async move { manager.wait_snapshot(wait(number, 3_600_000)).await })
    };
    let (second, third) = (waiting(2), waiting(3));
    tokio::time::sleep(Duration::from_millis(1)).await;
    let begun = tokio::time::Instant::now();
    f.manager.publish_snapshot(publish(image.id, 2, lease, "w", 2)).await.unwrap();
    assert_eq!(second.await.unwrap().unwrap().state(), SnapshotState::Stable);
    assert!(!third.is_finished());
    f.manager.remove_image(named("i")).await.unwrap();
    assert_eq!(third.await.unwrap().unwrap().state(), SnapshotState::Obsolete);
    assert_eq!(begun.elapsed(), Duration::ZERO, "nobody looked again and again");
}

#[tokio::test]
async fn messages_of_a_lost_store_tell_that_it_may_come_back() {
    let f = Fixture::new().await;
    let flaky = crate::flaky::flaky(&f.store);
    flaky.crash_after(0, false);
    let manager = crate::fixture::manager(&flaky.as_store(), &f.clock, 3);
    let error = manager.create_image(crate::fixture::create("a", "")).await.unwrap_err();
    assert!(matches!(error, Error::Store(_)), "{error:?}");
    assert!(error.to_string().contains("try again"), "{error}");
    assert_eq!(tonic::Status::from(error).code(), tonic::Code::Unavailable);
}
