//! What the collector is told to spare.

use blobcr_proto::v1;

use crate::fixture::{Fixture, TTL_MS, named};

async fn bound(fixture: &Fixture) -> u64 {
    let bound = fixture.manager.get_collection_bound(v1::CollectionBoundRequest {}).await;
    bound.unwrap().generation
}

async fn roots(fixture: &Fixture, since_generation: u64) -> Vec<(String, u64)> {
    let (mut after, mut found) = (None, Vec::new());
    loop {
        let request = v1::ListRootsRequest { since_generation, after, limit: 2 };
        let page = fixture.manager.list_roots(request).await.unwrap();
        found.extend(page.roots.into_iter().map(|root| (root.image, root.number)));
        after = page.next;
        if after.is_none() {
            return found;
        }
    }
}

fn at(name: &str, numbers: std::ops::RangeInclusive<u64>) -> Vec<(String, u64)> {
    numbers.map(|number| (name.to_owned(), number)).collect()
}

async fn release(fixture: &Fixture, lease_id: u64) {
    fixture.manager.release_lease(v1::ReleaseLeaseRequest { lease_id }).await.unwrap();
}

#[tokio::test]
async fn the_bound_is_that_of_the_oldest_lease_that_has_not_ended() {
    let fixture = Fixture::new().await;
    assert_eq!(bound(&fixture).await, 1, "that of the first lease");
    let first = fixture.lease().await;
    let second = fixture.lease().await;
    assert_eq!(bound(&fixture).await, 1);
    release(&fixture, first).await;
    assert_eq!(bound(&fixture).await, 2);
    // It ran out, but what was begun under it may not have been failed yet.
    fixture.clock.advance_ms(2 * TTL_MS);
    assert_eq!(bound(&fixture).await, 2);
    fixture.manager.expire_leases().await.unwrap();
    assert_eq!(bound(&fixture).await, 3, "that of the next lease");
    release(&fixture, second).await;
    let third = fixture.lease().await;
    assert_eq!(bound(&fixture).await, 3);
    release(&fixture, third).await;
}

#[tokio::test]
async fn roots_are_what_is_stable_and_what_was_so_since_a_lease_was_given() {
    let fixture = Fixture::new().await;
    fixture.image_with("a", "", 5).await;
    fixture.image_with("b", "", 3).await;
    let all = [at("a", 1..=5), at("b", 1..=3)].concat();
    assert_eq!(roots(&fixture, 1).await, all);

    let remove = |number| v1::SnapshotRef { image: Some(named("a")), number };
    fixture.manager.remove_snapshot(remove(1)).await.unwrap();
    let lease = fixture.lease().await;
    let since = bound(&fixture).await.max(3);
    fixture.manager.remove_snapshot(remove(2)).await.unwrap();
    // A second time changes nothing, and no later lease either.
    fixture.manager.remove_snapshot(remove(1)).await.unwrap();
    assert_eq!(roots(&fixture, since).await, [at("a", 2..=5), at("b", 1..=3)].concat());

    fixture.manager.remove_image(named("b")).await.unwrap();
    assert_eq!(roots(&fixture, since).await, [at("a", 2..=5), at("b", 1..=3)].concat());
    release(&fixture, lease).await;
    let next = fixture.lease().await;
    assert_eq!(roots(&fixture, since + 1).await, at("a", 3..=5));
    release(&fixture, next).await;
}
