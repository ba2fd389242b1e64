//! Pins.

use blobcr_metadata::Error;
use blobcr_proto::v1;

use crate::fixture::{Fixture, Kind, at, begin, kind, named, refused};

impl Fixture {
    async fn pin(&self, name: &str, number: u64, holder: &str) -> Result<v1::Pin, Error> {
        let holder = holder.to_owned();
        let r = v1::PinSnapshotRequest { snapshot: Some(at(name, number)), holder };
        self.manager.pin_snapshot(r).await
    }

    async fn unpin(&self, image_id: u64, number: u64, holder: &str) {
        let holder = holder.to_owned();
        let r = v1::UnpinSnapshotRequest { image_id, number, holder };
        self.manager.unpin_snapshot(r).await.unwrap();
    }

    async fn pins(&self, holder_prefix: &str, limit: u32) -> Vec<(u64, u64, String)> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let holder_prefix = holder_prefix.to_owned();
            let r = v1::ListPinsRequest { holder_prefix, after, limit };
            let page = self.manager.list_pins(r).await.unwrap();
            all.extend(page.pins.into_iter().map(|pin| (pin.image_id, pin.number, pin.holder)));
            after = page.next;
            if after.is_none() {
                return all;
            }
        }
    }
}

#[tokio::test]
async fn what_is_pinned_is_not_removed_until_the_last_pin_is_gone() {
    let f = Fixture::new().await;
    let image = f.image_with("base", "", 3).await;
    assert_eq!(f.pin("base", 1, "a/disk").await.unwrap().number, 1);
    f.pin("base", 1, "b/disk").await.unwrap();
    // Again: the same pin.
    f.pin("base", 1, "b/disk").await.unwrap();
    let parts = ["base@1", "pinned by", "unpin"];
    refused(f.manager.remove_snapshot(at("base", 1)).await, Kind::Precondition, &parts);
    refused(f.manager.remove_image(named("base")).await, Kind::Precondition, &parts);
    // Another snapshot is not concerned.
    f.manager.remove_snapshot(at("base", 2)).await.unwrap();
    f.unpin(image.id, 1, "a/disk").await;
    refused(f.manager.remove_snapshot(at("base", 1)).await, Kind::Precondition, &["b/disk"]);
    f.unpin(image.id, 1, "b/disk").await;
    f.unpin(image.id, 1, "b/disk").await;
    f.manager.remove_snapshot(at("base", 1)).await.unwrap();
    f.manager.remove_image(named("base")).await.unwrap();
}

#[tokio::test]
async fn only_a_stable_snapshot_is_pinned_and_only_by_somebody() {
    let f = Fixture::new().await;
    let image = f.image_with("base", "", 2).await;
    assert_eq!(f.pin("base", 0, "x").await.unwrap().number, 2, "0 is the newest");
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 3, lease, "")).await.unwrap();
    refused(f.pin("base", 3, "x").await, Kind::Precondition, &["base@3", "pending"]);
    f.manager.remove_snapshot(at("base", 1)).await.unwrap();
    refused(f.pin("base", 1, "x").await, Kind::Precondition, &["base@1", "obsolete"]);
    refused(f.pin("base", 9, "x").await, Kind::NotFound, &["base@9"]);
    refused(f.pin("none", 1, "x").await, Kind::NotFound, &["none"]);
    for holder in ["", "a\nb", &"h".repeat(300)] {
        refused(f.pin("base", 2, holder).await, Kind::Invalid, &["holder"]);
    }
}

#[tokio::test]
async fn pins_are_listed_by_holder_in_pages_of_any_size() {
    let f = Fixture::new().await;
    let image = f.image_with("base", "", 3).await.id;
    for number in 1..=3 {
        for holder in ["a/1", "a/2", "ab/1"] {
            f.pin("base", number, holder).await.unwrap();
        }
    }
    for limit in [0, 1, 2, 5] {
        assert_eq!(f.pins("", limit).await.len(), 9);
        let found = f.pins("a/", limit).await;
        let expected: Vec<(u64, u64, String)> = (1..=3)
            .flat_map(|number| ["a/1", "a/2"].map(|holder| (image, number, holder.to_owned())))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(f.pins("b", limit).await, []);
    }
}

/// Whoever comes first, never both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_and_a_removal_at_the_same_time_do_not_both_succeed() {
    for round in 0..100 {
        // Two processes over one store: no lock in memory helps.
        let f = Fixture::new().await;
        f.image_with("base", "", 2).await;
        let other = f.restarted();
        let pins = tokio::spawn(async move { f.pin("base", 1, "x").await });
        let removes = tokio::spawn(async move {
            if round % 2 == 0 {
                other.manager.remove_snapshot(at("base", 1)).await.map(|_| ())
            } else {
                other.manager.remove_image(named("base")).await.map(|_| ())
            }
        });
        let (pinned, removed) = (pins.await.unwrap(), removes.await.unwrap());
        assert_ne!(pinned.is_ok(), removed.is_ok(), "{pinned:?} {removed:?}");
        let lost = if pinned.is_ok() { kind(&removed) } else { kind(&pinned) };
        assert!(matches!(lost, Kind::Precondition | Kind::NotFound), "{lost:?}");
    }
}

#[tokio::test]
async fn many_holders_pin_a_snapshot_in_one_call() {
    let f = Fixture::new().await;
    let image = f.image_with("base", "", 2).await;
    f.pin("base", 1, "d7").await.unwrap();
    let holders: Vec<String> = (0..150).map(|n| format!("d{n}")).collect();
    let pin = |snapshot, holders: &[String]| {
        let r = v1::PinSnapshotsRequest { snapshot: Some(snapshot), holders: holders.to_vec() };
        f.manager.pin_snapshots(r)
    };
    // One of them named twice, one that has its pin already.
    pin(at("base", 1), &[&holders[..], &holders[..1]].concat()).await.unwrap();
    pin(at("base", 1), &holders).await.unwrap();
    let mut pinned: Vec<_> = f.pins("d", 0).await.into_iter().map(|pin| pin.2).collect();
    pinned.sort_by_key(|holder| holder[1..].parse::<u32>().unwrap());
    assert_eq!(pinned, holders);
    for holder in &holders {
        refused(f.manager.remove_snapshot(at("base", 1)).await, Kind::Precondition, &["pinned"]);
        f.unpin(image.id, 1, holder).await;
    }
    f.manager.remove_snapshot(at("base", 1)).await.unwrap();
    refused(pin(at("base", 1), &holders).await, Kind::Precondition, &["base@1", "obsolete"]);
    refused(pin(at("base", 0), &holders).await, Kind::Invalid, &["number"]);
    refused(pin(at("base", 2), &[]).await, Kind::Invalid, &["holders"]);
    refused(pin(at("base", 2), &[String::new()]).await, Kind::Invalid, &["holder"]);
}
