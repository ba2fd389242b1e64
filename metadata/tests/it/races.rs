//! Every decision is based on what was read; here that changes between the reading and the swap,
//! at exactly that moment.

use std::future::Future;
use std::sync::Arc;

use blobcr_metadata::clock::testing::ManualClock;
use blobcr_metadata::records::{ImageRecord, KeyKind, LeaseWorkRecord, SnapshotRecord};
use blobcr_metadata::version_manager::VersionManager;
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use crate::fixture::{
    Fixture, Kind, START_MS, TTL_MS, at, begin, clone, create, fail, kind, manager, named, publish,
    refused,
};
use crate::flaky::{Flaky, flaky};

struct Race {
    f: Fixture,
    image: u64,
    lease: u64,
    slow: Arc<VersionManager>,
    store: Arc<Flaky>,
}

/// An image "i" of "w" with the stable snapshots 1 and 2, the pending 3, and a live lease; and a
/// version manager whose next swap comes late.
async fn race() -> Race {
    let f = Fixture::new().await;
    let image = f.image_with("i", "w", 2).await.id;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image, 3, lease, "w")).await.unwrap();
    let store = flaky(&f.store);
    let slow = manager(&store.as_store(), &f.clock, 7);
    // Takes its image ids now, so that its next swap is the one that matters.
    slow.create_image(create("other", "")).await.unwrap();
    Race { f, image, lease, slow, store }
}

impl Race {
    /// Lets `others` use another version manager just before the slow one's next swap.
    fn first<F>(&self, others: impl FnOnce(Arc<VersionManager>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.store.before_next_swap(others(Arc::clone(&self.f.manager)));
    }

    fn release_first(&self) {
        let lease_id = self.lease;
        self.first(|m| async move {
            m.release_lease(v1::ReleaseLeaseRequest { lease_id }).await.unwrap();
        });
    }

    fn remove_image_first(&self) {
        self.first(|m| async move {
            m.remove_image(named("i")).await.unwrap();
        });
    }

    async fn state(&self, number: u64) -> SnapshotState {
        let snapshots = self.f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
        let found = |s: &&SnapshotRecord| s.image_id == self.image && s.number == number;
        snapshots.iter().find(found).unwrap().state()
    }
}

#[tokio::test]
async fn a_publication_loses_against_the_end_of_its_lease() {
    let r = race().await;
    r.release_first();
    let late = r.slow.publish_snapshot(publish(r.image, 3, r.lease, "w", 3)).await;
    refused(late, Kind::Precondition, &["i@3", "failed", "released"]);
    assert!(r.store.met());
    assert_eq!(r.f.get("i").await.unwrap().latest, 2);
}

/// The snapshot is another lease's, so that only the lease itself tells.
#[tokio::test]
async fn a_publication_loses_against_the_end_of_any_lease_that_it_names() {
    let r = race().await;
    let other = r.f.lease().await;
    r.f.manager.begin_snapshot(begin(r.image, 4, other, "w")).await.unwrap();
    r.release_first();
    let late = r.slow.publish_snapshot(publish(r.image, 4, r.lease, "w", 3)).await;
    refused(late, Kind::Precondition, &["lease", "ended"]);
    assert_eq!(r.state(4).await, SnapshotState::Pending);
}

#[tokio::test]
async fn a_publication_goes_on_when_its_lease_was_renewed() {
    let r = race().await;
    let lease_id = r.lease;
    r.first(|m| async move {
        m.renew_lease(v1::RenewLeaseRequest { lease_id }).await.unwrap();
    });
    r.slow.publish_snapshot(publish(r.image, 3, r.lease, "w", 3)).await.unwrap();
    assert!(r.store.met());
}

#[tokio::test]
async fn a_publication_loses_against_removal() {
    let r = race().await;
    r.remove_image_first();
    let late = r.slow.publish_snapshot(publish(r.image, 3, r.lease, "w", 3)).await;
    refused(late, Kind::NotFound, &[]);
    assert_eq!(r.state(3).await, SnapshotState::Obsolete);
}

/// The removal has only begun: its snapshots are not marked yet.
#[tokio::test]
async fn a_publication_loses_against_a_removal_that_has_only_begun() {
    for number in [3, 4] {
        let r = race().await;
        let (image, lease) = (r.image, r.lease);
        // 4 moves `latest`; 3, then, does not.
        r.f.manager.begin_snapshot(begin(image, 4, lease, "w")).await.unwrap();
        if number == 3 {
            r.f.manager.publish_snapshot(publish(image, 4, lease, "w", 4)).await.unwrap();
        }
        let dying = flaky(&r.f.store);
        dying.crash_after(0, true);
        let dying = manager(&dying.as_store(), &r.f.clock, 8);
        r.first(|_| async move {
            dying.remove_image(named("i")).await.unwrap_err();
        });
        let late = r.slow.publish_snapshot(publish(image, number, lease, "w", 3)).await;
        refused(late, Kind::NotFound, &[]);
        assert_eq!(r.state(number).await, SnapshotState::Pending);
        r.f.manager.finish_removals().await.unwrap();
        assert_eq!(r.state(number).await, SnapshotState::Obsolete);
    }
}

#[tokio::test]
async fn a_publication_and_a_failure_exclude_each_other() {
    let r = race().await;
    let image = r.image;
    r.first(move |m| async move {
        m.fail_snapshot(fail(image, 3, "w")).await.unwrap();
    });
    let late = r.slow.publish_snapshot(publish(r.image, 3, r.lease, "w", 3)).await;
    refused(late, Kind::Precondition, &["failed"]);

    let r = race().await;
    let (image, lease) = (r.image, r.lease);
    r.first(move |m| async move {
        m.publish_snapshot(publish(image, 3, lease, "w", 3)).await.unwrap();
    });
    refused(r.slow.fail_snapshot(fail(image, 3, "w")).await, Kind::Precondition, &["stable"]);
    assert_eq!(r.f.get("i").await.unwrap().latest, 3);
}

#[tokio::test]
async fn two_publications_of_one_snapshot_make_one() {
    for (content, expected) in [(3, Kind::Ok), (4, Kind::Precondition)] {
        let r = race().await;
        let (image, lease) = (r.image, r.lease);
        r.first(move |m| async move {
            m.publish_snapshot(publish(image, 3, lease, "w", 3)).await.unwrap();
        });
        let second = r.slow.publish_snapshot(publish(image, 3, lease, "w", content)).await;
        assert_eq!(kind(&second), expected, "{second:?}");
        assert_eq!(r.f.snapshot("i", 3).await.unwrap().root, Some(crate::fixture::root(3)));
    }
}

#[tokio::test]
async fn latest_does_not_go_back_when_a_higher_one_comes_first() {
    let r = race().await;
    let (image, lease) = (r.image, r.lease);
    r.f.manager.begin_snapshot(begin(image, 4, lease, "w")).await.unwrap();
    r.first(move |m| async move {
        m.publish_snapshot(publish(image, 4, lease, "w", 4)).await.unwrap();
    });
    r.slow.publish_snapshot(publish(image, 3, lease, "w", 3)).await.unwrap();
    assert_eq!(r.f.get("i").await.unwrap().latest, 4);
}

#[tokio::test]
async fn a_beginning_loses_against_the_end_of_its_lease() {
    // A new number; a number that is pending under another lease.
    for number in [0, 4] {
        let r = race().await;
        let other = r.f.lease().await;
        r.f.manager.begin_snapshot(begin(r.image, 4, other, "w")).await.unwrap();
        r.release_first();
        let late = r.slow.begin_snapshot(begin(r.image, number, r.lease, "w")).await;
        refused(late, Kind::Precondition, &["lease", "ended"]);
        assert!(r.store.met());
        let work = r.f.records::<LeaseWorkRecord>(KeyKind::LeaseWork).await;
        assert_eq!(work.iter().map(|w| w.lease_id).collect::<Vec<_>>(), [other]);
    }
}

#[tokio::test]
async fn a_beginning_loses_against_removal() {
    for number in [0, 3] {
        let r = race().await;
        let new = r.f.lease().await;
        r.remove_image_first();
        let late = r.slow.begin_snapshot(begin(r.image, number, new, "w")).await;
        refused(late, Kind::NotFound, &[]);
        assert!(r.store.met());
        let snapshots = r.f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
        assert!(snapshots.iter().all(|s| s.state() == SnapshotState::Obsolete));
    }
}

#[tokio::test]
async fn two_beginnings_get_two_numbers() {
    let r = race().await;
    let (image, lease) = (r.image, r.lease);
    r.first(move |m| async move {
        m.begin_snapshot(begin(image, 0, lease, "w")).await.unwrap();
    });
    assert_eq!(r.slow.begin_snapshot(begin(image, 0, lease, "w")).await.unwrap().number, 5);
}

#[tokio::test]
async fn a_clone_loses_against_the_removal_of_its_source() {
    let r = race().await;
    r.first(|m| async move {
        m.remove_snapshot(at("i", 1)).await.unwrap();
    });
    let late = r.slow.clone_image(clone(at("i", 1), "copy", "")).await;
    refused(late, Kind::Precondition, &["i@1", "obsolete"]);
    assert!(r.store.met());
    refused(r.f.get("copy").await, Kind::NotFound, &[]);
}

#[tokio::test]
async fn a_name_goes_to_who_comes_first() {
    let r = race().await;
    r.first(|m| async move {
        m.create_image(create("copy", "")).await.unwrap();
    });
    let late = r.slow.clone_image(clone(at("i", 1), "copy", "")).await;
    refused(late, Kind::Exists, &["\"copy\""]);
    let images = r.f.records::<ImageRecord>(KeyKind::Image).await;
    assert_eq!(images.iter().filter(|image| image.name == "copy").count(), 1);
}

/// The name went to another image while the removal was on its way: that one stays.
#[tokio::test]
async fn a_removal_takes_the_image_that_it_found() {
    let r = race().await;
    r.first(|m| async move {
        m.remove_image(named("i")).await.unwrap();
        m.create_image(create("i", "")).await.unwrap();
    });
    refused(r.slow.remove_image(named("i")).await, Kind::NotFound, &[]);
    assert!(r.store.met());
    assert_ne!(r.f.get("i").await.unwrap().id, r.image);
}

#[tokio::test]
async fn a_lease_that_is_renewed_is_not_ended_by_a_service_that_is_slow() {
    let r = race().await;
    r.f.clock.advance_ms(TTL_MS - 1);
    let lease_id = r.lease;
    // The other service's clock is a little ahead: to it the lease has run out.
    let ahead = Arc::new(ManualClock::new(START_MS));
    let slow = manager(&r.store.as_store(), &ahead, 9);
    ahead.advance_ms(TTL_MS + 1);
    r.first(move |m| async move {
        m.renew_lease(v1::RenewLeaseRequest { lease_id }).await.unwrap();
    });
    assert_eq!(slow.expire_leases().await.unwrap(), 0);
    assert!(r.store.met());
    r.f.manager.renew_lease(v1::RenewLeaseRequest { lease_id }).await.unwrap();
    assert_eq!(r.state(3).await, SnapshotState::Pending);
}
