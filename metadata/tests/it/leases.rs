//! Leases.

use blobcr_metadata::records::{KeyKind, LeaseRecord, LeaseWorkRecord};
use blobcr_metadata::version_manager::leases::{
    LEASE_TTL_MS_DEFAULT, LEASE_TTL_MS_MAX, LEASE_TTL_MS_MIN,
};
use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use crate::fixture::{Fixture, Kind, TTL_MS, begin, publish, refused};

fn acquire(ttl_ms: u64) -> v1::AcquireLeaseRequest {
    v1::AcquireLeaseRequest { holder: "host".to_owned(), ttl_ms }
}

fn renew(lease_id: u64) -> v1::RenewLeaseRequest {
    v1::RenewLeaseRequest { lease_id }
}

fn release(lease_id: u64) -> v1::ReleaseLeaseRequest {
    v1::ReleaseLeaseRequest { lease_id }
}

#[tokio::test]
async fn generations_grow_across_restarts_and_ends() {
    let f = Fixture::new().await;
    let mut last = 0;
    for round in 0..10 {
        let f = if round % 3 == 0 { f.restarted() } else { f.restarted().restarted() };
        let lease = f.manager.acquire_lease(acquire(TTL_MS)).await.unwrap();
        assert!(lease.generation > last);
        assert_ne!(lease.id, 0);
        last = lease.generation;
        if round % 2 == 0 {
            f.manager.release_lease(release(lease.id)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn the_time_of_a_lease_is_moved_into_the_range() {
    let f = Fixture::new().await;
    for (asked, given) in [
        (0, LEASE_TTL_MS_DEFAULT),
        (1, LEASE_TTL_MS_MIN),
        (20_000, 20_000),
        (u64::MAX, LEASE_TTL_MS_MAX),
    ] {
        assert_eq!(f.manager.acquire_lease(acquire(asked)).await.unwrap().ttl_ms, given);
    }
    let long = v1::AcquireLeaseRequest { holder: "h".repeat(1000), ttl_ms: 0 };
    refused(f.manager.acquire_lease(long).await, Kind::Invalid, &["holder"]);
}

#[tokio::test]
async fn a_lease_lives_as_long_as_it_is_renewed() {
    let f = Fixture::new().await;
    let id = f.lease().await;
    let generation = f.manager.renew_lease(renew(id)).await.unwrap().generation;
    for _ in 0..5 {
        f.clock.advance_ms(TTL_MS - 1);
        assert_eq!(f.manager.renew_lease(renew(id)).await.unwrap().generation, generation);
        assert_eq!(f.manager.expire_leases().await.unwrap(), 0);
    }
    f.clock.advance_ms(TTL_MS);
    refused(f.manager.renew_lease(renew(id)).await, Kind::Precondition, &["run out", "acquire"]);
    assert_eq!(f.manager.expire_leases().await.unwrap(), 1);
    refused(f.manager.renew_lease(renew(id)).await, Kind::Precondition, &["ended", "acquire"]);
    assert_eq!(f.manager.expire_leases().await.unwrap(), 0);
}

#[tokio::test]
async fn the_end_of_a_lease_fails_what_is_pending_under_it() {
    const PENDING: u64 = 150; // more than one page
    for released in [false, true] {
        let f = Fixture::new().await;
        let image = f.image("i", "w").await;
        let (dying, living) = (f.lease().await, f.lease().await);
        f.manager.begin_snapshot(begin(image.id, 1, dying, "w")).await.unwrap();
        f.manager.publish_snapshot(publish(image.id, 1, dying, "w", 1)).await.unwrap();
        for number in 2..PENDING + 2 {
            f.manager.begin_snapshot(begin(image.id, number, dying, "w")).await.unwrap();
        }
        f.manager.begin_snapshot(begin(image.id, 1000, living, "w")).await.unwrap();
        let reason = if released {
            f.manager.release_lease(release(dying)).await.unwrap();
            f.manager.release_lease(release(dying)).await.unwrap();
            "released"
        } else {
            f.clock.advance_ms(TTL_MS - 1);
            f.manager.renew_lease(renew(living)).await.unwrap();
            f.clock.advance_ms(1);
            assert_eq!(f.manager.expire_leases().await.unwrap(), 1);
            "ran out"
        };
        for number in 2..PENDING + 2 {
            let snapshot = f.snapshot("i", number).await.unwrap();
            assert_eq!(snapshot.state(), SnapshotState::Failed, "{number}");
            assert!(snapshot.reason.contains(reason), "{}", snapshot.reason);
        }
        assert_eq!(f.snapshot("i", 1).await.unwrap().state(), SnapshotState::Stable);
        assert_eq!(f.snapshot("i", 1000).await.unwrap().state(), SnapshotState::Pending);
        let work = f.records::<LeaseWorkRecord>(KeyKind::LeaseWork).await;
        assert_eq!(work.iter().map(|work| work.number).collect::<Vec<_>>(), [1000]);
        let leases = f.records::<LeaseRecord>(KeyKind::Lease).await;
        assert_eq!(leases.iter().map(|lease| lease.id).collect::<Vec<_>>(), [living]);
    }
}

#[tokio::test]
async fn a_restart_gives_every_lease_its_time_again() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    // The service was down for an hour: nobody could renew.
    f.clock.advance_ms(3_600_000);
    let f = f.restarted();
    assert_eq!(f.manager.expire_leases().await.unwrap(), 0);
    f.manager.publish_snapshot(publish(image.id, 1, lease, "w", 1)).await.unwrap();
    f.clock.advance_ms(TTL_MS);
    assert_eq!(f.manager.expire_leases().await.unwrap(), 1);
    // A lease that has ended does not come back.
    let f = f.restarted();
    refused(f.manager.renew_lease(renew(lease)).await, Kind::Precondition, &["ended"]);
}

#[tokio::test]
async fn a_store_that_was_away_gives_every_lease_its_time_again() {
    let f = Fixture::new().await;
    let other = f.restarted();
    let lease = f.lease().await;
    // The store was down for an hour, and the services went on.
    f.clock.advance_ms(3_600_000);
    f.manager.store_is_back();
    other.manager.store_is_back();
    assert_eq!(f.manager.expire_leases().await.unwrap(), 0);
    assert_eq!(other.manager.expire_leases().await.unwrap(), 0);
    f.clock.advance_ms(TTL_MS - 1);
    other.manager.renew_lease(renew(lease)).await.unwrap();
    f.clock.advance_ms(TTL_MS - 1);
    assert_eq!(f.manager.expire_leases().await.unwrap(), 0, "renewed at another service");
    f.clock.advance_ms(1);
    assert_eq!(f.manager.expire_leases().await.unwrap(), 1);
}

/// Of two services, one was started just now and gives every lease its time again; the other ends
/// it. Then it has ended for both.
#[tokio::test]
async fn a_lease_that_one_service_has_ended_is_dead_at_all() {
    let f = Fixture::new().await;
    let image = f.image("i", "w").await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 1, lease, "w")).await.unwrap();
    f.clock.advance_ms(TTL_MS);
    let young = f.restarted();
    assert_eq!(young.manager.expire_leases().await.unwrap(), 0);
    assert_eq!(f.manager.expire_leases().await.unwrap(), 1);
    let late = young.manager.publish_snapshot(publish(image.id, 1, lease, "w", 1)).await;
    refused(late, Kind::Precondition, &["failed", "ran out"]);
    refused(young.manager.renew_lease(renew(lease)).await, Kind::Precondition, &["ended"]);
}

#[tokio::test]
async fn the_collector_waits_for_the_oldest_lease_that_has_not_ended() {
    let f = Fixture::new().await;
    assert_eq!(f.manager.oldest_generation().await.unwrap(), None);
    let old = f.manager.acquire_lease(acquire(TTL_MS)).await.unwrap();
    let new = f.manager.acquire_lease(acquire(60_000)).await.unwrap();
    assert_eq!(f.manager.oldest_generation().await.unwrap(), Some(old.generation));
    // To have run out is not enough: the end is what counts.
    f.clock.advance_ms(TTL_MS);
    assert_eq!(f.manager.oldest_generation().await.unwrap(), Some(old.generation));
    f.manager.expire_leases().await.unwrap();
    assert_eq!(f.manager.oldest_generation().await.unwrap(), Some(new.generation));
    f.manager.release_lease(release(new.id)).await.unwrap();
    assert_eq!(f.manager.oldest_generation().await.unwrap(), None);
}

/// The process dies after each of the swaps that the end of a lease takes.
#[tokio::test]
async fn an_interrupted_end_is_finished_later() {
    for swaps in 0..7 {
        let f = Fixture::new().await;
        let image = f.image("i", "w").await;
        let lease = f.lease().await;
        for number in 1..=4 {
            f.manager.begin_snapshot(begin(image.id, number, lease, "w")).await.unwrap();
        }
        let flaky = crate::flaky::flaky(&f.store);
        flaky.crash_after(swaps, false);
        let dying = crate::fixture::manager(&flaky.as_store(), &f.clock, 3);
        let died = dying.release_lease(release(lease)).await.is_err();
        // One swap closes it, four fail a snapshot each, one removes it.
        assert_eq!(died, swaps < 6, "{swaps}");
        let f = f.restarted();
        if swaps > 0 && died {
            let renewed = f.manager.renew_lease(renew(lease)).await;
            refused(renewed, Kind::Precondition, &["run out"]);
        }
        f.clock.advance_ms(TTL_MS);
        assert_eq!(f.manager.expire_leases().await.unwrap(), usize::from(died), "{swaps}");
        for number in 1..=4 {
            assert_eq!(f.snapshot("i", number).await.unwrap().state(), SnapshotState::Failed);
        }
        assert_eq!(f.records::<LeaseRecord>(KeyKind::Lease).await, []);
        assert_eq!(f.records::<LeaseWorkRecord>(KeyKind::LeaseWork).await, []);
    }
}
