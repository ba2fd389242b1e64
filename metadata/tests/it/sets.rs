//! Checkpoint sets.

use blobcr_metadata::records::{KeyKind, PinRecord, SetVmRecord};
use blobcr_proto::v1;

use crate::fixture::{Fixture, Kind, at, begin, fail, named, publish, refused};
use crate::flaky::flaky;

fn member(vm: &str, disk: &str, image: &str, number: u64) -> v1::SetMember {
    let [vm, disk, image] = [vm, disk, image].map(str::to_owned);
    v1::SetMember { vm, disk, image, number }
}

fn add(sequence: u64, expected_vms: u32, members: &[v1::SetMember]) -> v1::AddToSetRequest {
    v1::AddToSetRequest { group: "g".to_owned(), sequence, expected_vms, members: members.to_vec() }
}

fn latest() -> v1::LatestSetRequest {
    v1::LatestSetRequest { group: "g".to_owned() }
}

fn list(limit: u32) -> v1::ListSetsRequest {
    v1::ListSetsRequest { group: "g".to_owned(), limit }
}

#[tokio::test]
async fn a_set_counts_when_all_vms_are_there_and_all_members_are_stable() {
    let f = Fixture::new().await;
    f.image_with("a", "", 1).await;
    let b = f.image("b", "").await;
    refused(f.manager.latest_set(latest()).await, Kind::NotFound, &["\"g\"", "set list"]);
    let set = f.manager.add_to_set(add(1, 2, &[member("vm1", "d", "a", 1)])).await.unwrap();
    assert_eq!((set.complete, set.stable, set.members.len()), (false, true, 1));
    // The second VM's snapshot has not even begun when it is named.
    let set = f.manager.add_to_set(add(1, 2, &[member("vm2", "d", "b", 1)])).await.unwrap();
    assert_eq!((set.complete, set.stable, set.members.len()), (true, false, 2));
    refused(f.manager.latest_set(latest()).await, Kind::NotFound, &[]);
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(b.id, 1, lease, "")).await.unwrap();
    refused(f.manager.latest_set(latest()).await, Kind::NotFound, &[]);
    f.manager.publish_snapshot(publish(b.id, 1, lease, "", 1)).await.unwrap();
    let set = f.manager.latest_set(latest()).await.unwrap();
    assert_eq!((set.sequence, set.complete, set.stable), (1, true, true));
    let disks: Vec<_> = set.members.iter().map(|m| (m.vm.as_str(), m.image.as_str())).collect();
    assert_eq!(disks, [("vm1", "a"), ("vm2", "b")]);
}

#[tokio::test]
async fn members_are_merged_and_never_replaced() {
    let f = Fixture::new().await;
    f.image_with("a", "", 2).await;
    let two = [member("vm1", "d2", "a", 2), member("vm1", "d1", "a", 1)];
    let first = f.manager.add_to_set(add(1, 1, &two)).await.unwrap();
    assert_eq!(f.manager.add_to_set(add(1, 1, &two)).await.unwrap(), first);
    assert_eq!(f.manager.add_to_set(add(1, 1, &[])).await.unwrap(), first);
    let more = f.manager.add_to_set(add(1, 1, &[member("vm1", "d3", "a", 1)])).await.unwrap();
    let disks: Vec<&str> = more.members.iter().map(|m| m.disk.as_str()).collect();
    assert_eq!(disks, ["d1", "d2", "d3"]);

    let other = f.manager.add_to_set(add(1, 1, &[member("vm1", "d1", "a", 2)])).await;
    refused(other, Kind::Precondition, &["set 1", "a@1", "a@2", "sequence"]);
    refused(f.manager.add_to_set(add(1, 2, &[])).await, Kind::Precondition, &["1 VMs, not 2"]);
    let extra = f.manager.add_to_set(add(1, 1, &[member("vm2", "d1", "a", 2)])).await;
    refused(extra, Kind::Precondition, &["expects 1 VMs"]);
    assert_eq!(f.manager.list_sets(list(0)).await.unwrap().sets, [more]);
    refused(
        f.manager.remove_image(named("a")).await,
        Kind::Precondition,
        &["a@1", "set 1 of group \"g\"", "set prune g"],
    );
}

#[tokio::test]
async fn bad_requests_are_refused_by_what_is_wrong_with_them() {
    let f = Fixture::new().await;
    f.image_with("a", "", 1).await;
    let group = v1::AddToSetRequest { group: "a/b".to_owned(), ..add(1, 1, &[]) };
    refused(f.manager.add_to_set(group).await, Kind::Invalid, &["group"]);
    refused(f.manager.add_to_set(add(1, 0, &[])).await, Kind::Invalid, &["VMs"]);
    for (bad, part) in [
        (member("", "d", "a", 1), "VM"),
        (member("v", "/", "a", 1), "disk"),
        (member("v", "d", "..", 1), "image"),
        (member("v", "d", "a", 0), "begin at 1"),
    ] {
        refused(f.manager.add_to_set(add(1, 1, &[bad])).await, Kind::Invalid, &[part]);
    }
    let unknown = f.manager.add_to_set(add(2, 1, &[member("v", "d", "none", 1)])).await;
    refused(unknown, Kind::NotFound, &["\"none\""]);
    let many: Vec<_> = (0..65).map(|n| member("v", &format!("d{n}"), "a", 1)).collect();
    refused(f.manager.add_to_set(add(3, 1, &many)).await, Kind::Invalid, &["64 disks"]);
    let many = vec![member("v", "d", "a", 1); 1025];
    refused(f.manager.add_to_set(add(3, 1, &many)).await, Kind::Invalid, &["1024"]);
    let list = v1::ListSetsRequest { group: String::new(), limit: 0 };
    refused(f.manager.list_sets(list).await, Kind::Invalid, &["group"]);
}

#[tokio::test]
async fn the_newest_set_that_counts_is_found_and_lists_are_newest_first() {
    let f = Fixture::new().await;
    f.image_with("a", "", 130).await;
    for sequence in 1..=120 {
        let members = [member("v", "d", "a", sequence)];
        f.manager.add_to_set(add(sequence, 1, &members)).await.unwrap();
    }
    // A group whose name the other begins with is another group.
    let other = v1::AddToSetRequest { group: "g2".to_owned(), ..add(500, 1, &[]) };
    f.manager.add_to_set(other).await.unwrap();
    let sets = f.manager.list_sets(list(3)).await.unwrap().sets;
    assert_eq!(sets.iter().map(|set| set.sequence).collect::<Vec<_>>(), [120, 119, 118]);
    assert_eq!(f.manager.list_sets(list(0)).await.unwrap().sets.len(), 100);
    assert_eq!(f.manager.list_sets(list(u32::MAX)).await.unwrap().sets.len(), 100);
    // Not complete; of a snapshot that is not there.
    f.manager.add_to_set(add(200, 2, &[member("v", "d", "a", 1)])).await.unwrap();
    f.manager.add_to_set(add(199, 1, &[member("v", "d", "a", 999)])).await.unwrap();
    assert_eq!(f.manager.latest_set(latest()).await.unwrap().sequence, 120);
    refused(
        f.manager.remove_snapshot(at("a", 119)).await,
        Kind::Precondition,
        &["a@119", "set 119 of group \"g\""],
    );
}

#[tokio::test]
async fn a_snapshot_that_fails_makes_its_set_fail() {
    let f = Fixture::new().await;
    let image = f.image_with("a", "", 1).await;
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(image.id, 2, lease, "")).await.unwrap();
    f.manager.add_to_set(add(1, 1, &[member("v", "d", "a", 1)])).await.unwrap();
    let set = f.manager.add_to_set(add(2, 1, &[member("v", "d", "a", 2)])).await.unwrap();
    assert_eq!(set.state(), v1::SetState::Pending);
    f.manager.fail_snapshot(fail(image.id, 2, "")).await.unwrap();
    let wanted = v1::GetSetRequest { group: "g".to_owned(), sequence: 2 };
    assert_eq!(f.manager.get_set(wanted).await.unwrap().state(), v1::SetState::Failed);
    // A restart goes back past it.
    assert_eq!(f.manager.latest_set(latest()).await.unwrap().sequence, 1);
}

#[tokio::test]
async fn numbers_of_begun_sets_grow_whoever_begins_them() {
    let f = Fixture::new().await;
    let begin = |vms| v1::BeginSetRequest { group: "g".to_owned(), expected_vms: vms };
    refused(f.manager.begin_set(begin(0)).await, Kind::Invalid, &["VMs"]);
    assert_eq!(f.manager.begin_set(begin(2)).await.unwrap().sequence, 1);
    // One whose number was chosen by who added to it.
    f.manager.add_to_set(add(7, 2, &[])).await.unwrap();
    let set = f.restarted().manager.begin_set(begin(2)).await.unwrap();
    assert_eq!((set.sequence, set.expected_vms, set.state()), (8, 2, v1::SetState::Incomplete));
    let managers = [f.restarted().manager, f.restarted().manager];
    let many = (0..40).map(|n| managers[n % 2].begin_set(begin(1)));
    let mut given: Vec<u64> = futures::future::join_all(many)
        .await
        .into_iter()
        .map(|set| set.unwrap().sequence)
        .collect();
    given.sort_unstable();
    assert_eq!(given, (9..49).collect::<Vec<u64>>());
    f.manager.add_to_set(add(u64::MAX, 1, &[])).await.unwrap();
    refused(f.manager.begin_set(begin(1)).await, Kind::Precondition, &["no numbers left"]);
}

#[tokio::test]
async fn every_disk_of_a_large_vm_is_pinned_before_the_set_names_it() {
    let f = Fixture::new().await;
    for n in 0..64 {
        f.image_with(&format!("i{n}"), "", 2).await;
    }
    let members: Vec<_> =
        (0..64).map(|n| member("v", &format!("d{n}"), &format!("i{n}"), 1)).collect();
    for swaps in 0..4 {
        let broken = flaky(&f.store);
        broken.crash_after(swaps, swaps % 2 == 0);
        let manager = crate::fixture::manager(&broken.as_store(), &f.clock, 3);
        let _crashed = manager.add_to_set(add(1, 1, &members)).await;
        let named = f.records::<SetVmRecord>(KeyKind::SetVm).await;
        let pinned = f.records::<PinRecord>(KeyKind::Pin).await.len();
        assert!(named.iter().all(|vm| vm.disks.len() == 64 && pinned == 64), "{swaps}: {pinned}");
    }
    let set = f.manager.add_to_set(add(1, 1, &members)).await.unwrap();
    assert_eq!((set.members.len(), set.state()), (64, v1::SetState::Stable));
    assert_eq!(f.records::<PinRecord>(KeyKind::Pin).await.len(), 64);
}
