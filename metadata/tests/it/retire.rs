//! Which sets are kept, and what becomes of the others.

use blobcr_metadata::records::{KeyKind, PinRecord, SetRecord, SetVmRecord, SnapshotRecord};
use blobcr_metadata::version_manager::retire::RETIRE_SETS_MAX;
use blobcr_proto::v1;
use blobcr_proto::v1::{SetState, SnapshotState};

use crate::fixture::{Fixture, Kind, at, begin, manager, publish, refused};
use crate::flaky::flaky;

fn member(vm: &str, image: &str, number: u64) -> v1::SetMember {
    let (vm, image, disk) = (vm.to_owned(), image.to_owned(), "d".to_owned());
    v1::SetMember { vm, disk, image, number }
}

fn add(sequence: u64, vms: u32, members: Vec<v1::SetMember>) -> v1::AddToSetRequest {
    v1::AddToSetRequest { group: "g".to_owned(), sequence, expected_vms: vms, members }
}

fn retire(keep_sets: u32) -> v1::RetireSetsRequest {
    v1::RetireSetsRequest { group: "g".to_owned(), keep_sets, dry_run: false }
}

fn pin(sequence: u64, holder: &str) -> v1::PinSetRequest {
    v1::PinSetRequest { group: "g".to_owned(), sequence, holder: holder.to_owned() }
}

/// Two VMs with images "a" and "b", and one stable set of each of their `count` snapshots.
async fn with_sets(count: u64) -> Fixture {
    let f = Fixture::new().await;
    f.image_with("a", "", count).await;
    f.image_with("b", "", count).await;
    for n in 1..=count {
        let members = vec![member("vm1", "a", n), member("vm2", "b", n)];
        f.manager.add_to_set(add(n, 2, members)).await.unwrap();
    }
    f
}

async fn sequences(f: &Fixture) -> Vec<u64> {
    let list = v1::ListSetsRequest { group: "g".to_owned(), limit: 0 };
    f.manager.list_sets(list).await.unwrap().sets.iter().map(|set| set.sequence).collect()
}

/// The stable snapshots of both images, as far as they agree.
async fn stable(f: &Fixture) -> Vec<u64> {
    let all = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
    let of = |image: u64| -> Vec<u64> {
        let stable =
            all.iter().filter(|s| s.image_id == image && s.state() == SnapshotState::Stable);
        stable.map(|s| s.number).collect()
    };
    let first = all.first().unwrap().image_id;
    let second = all.last().unwrap().image_id;
    assert_eq!(of(first), of(second));
    of(first)
}

#[tokio::test]
async fn old_sets_go_with_the_snapshots_that_nothing_else_needs() {
    let f = with_sets(6).await;
    // Kept: by name, by a pin of its own, by another set, and because it may become complete.
    f.manager.pin_set(pin(2, "alice")).await.unwrap();
    let holder = "bob".to_owned();
    for image in ["a", "b"] {
        let snapshot = Some(at(image, 3));
        let holder = holder.clone();
        f.manager.pin_snapshot(v1::PinSnapshotRequest { snapshot, holder }).await.unwrap();
    }
    f.manager.add_to_set(add(7, 2, vec![member("vm1", "a", 4)])).await.unwrap();
    let other =
        v1::AddToSetRequest { group: "h".to_owned(), ..add(1, 1, vec![member("vm2", "b", 4)]) };
    f.manager.add_to_set(other).await.unwrap();

    let dry = v1::RetireSetsRequest { dry_run: true, ..retire(1) };
    let would = f.manager.retire_sets(dry).await.unwrap();
    let of = |done: &v1::RetireSetsResponse| -> Vec<u64> {
        done.sets.iter().map(|set| set.sequence).collect()
    };
    assert_eq!((of(&would), would.snapshots_removed), (vec![5, 4, 3, 1], 0));
    assert_eq!(sequences(&f).await, [7, 6, 5, 4, 3, 2, 1]);

    let done = f.manager.retire_sets(retire(1)).await.unwrap();
    assert_eq!((of(&done), done.snapshots_removed), (vec![5, 4, 3, 1], 4));
    assert!(done.sets.iter().all(|set| set.state() == SetState::Obsolete));
    assert_eq!(sequences(&f).await, [7, 6, 2]);
    assert_eq!(stable(&f).await, [2, 3, 4, 6]);
    // Nothing is left of what went, and nothing happens a second time.
    let holders: Vec<String> =
        f.records::<PinRecord>(KeyKind::Pin).await.into_iter().map(|pin| pin.holder).collect();
    let mut expected = vec!["set g/2"; 2];
    expected.extend(["bob"; 2]);
    expected.extend(["set g/7", "set h/1"]);
    expected.extend(["set g/6"; 2]);
    assert_eq!(
        {
            let mut h = holders;
            h.sort();
            h
        },
        {
            expected.sort_unstable();
            expected
        }
    );
    assert_eq!(f.manager.retire_sets(retire(1)).await.unwrap(), v1::RetireSetsResponse::default());
    // Numbers are not given again.
    let begin = v1::BeginSetRequest { group: "g".to_owned(), expected_vms: 1 };
    assert_eq!(f.manager.begin_set(begin).await.unwrap().sequence, 8);
}

#[tokio::test]
async fn a_retirement_that_is_broken_off_anywhere_is_finished_by_the_next() {
    for swaps in 0.. {
        let f = with_sets(4).await;
        let broken = flaky(&f.store);
        broken.crash_after(swaps, swaps % 2 == 0);
        let crashing = manager(&broken.as_store(), &f.clock, 3);
        let crashed = crashing.retire_sets(retire(1)).await.is_err();
        // Whatever is left, a restart finds the newest, and nothing that a set names is gone.
        let latest = v1::LatestSetRequest { group: "g".to_owned() };
        assert_eq!(f.manager.latest_set(latest).await.unwrap().sequence, 4);
        for set in f.records::<SetRecord>(KeyKind::Set).await.iter().filter(|set| !set.obsolete) {
            let wanted = v1::GetSetRequest { group: "g".to_owned(), sequence: set.sequence };
            let state = f.manager.get_set(wanted).await.unwrap().state();
            assert_eq!(state, SetState::Stable, "set {} after {swaps} swaps", set.sequence);
        }
        f.restarted().manager.retire_sets(retire(1)).await.unwrap();
        assert_eq!(sequences(&f).await, [4], "after {swaps} swaps");
        assert_eq!(stable(&f).await, [4], "after {swaps} swaps");
        assert_eq!(f.records::<SetVmRecord>(KeyKind::SetVm).await.len(), 2);
        assert_eq!(f.records::<PinRecord>(KeyKind::Pin).await.len(), 2);
        if !crashed {
            assert!(swaps > 10, "the test broke nothing off");
            return;
        }
    }
}

#[tokio::test]
async fn nobody_joins_or_pins_a_set_that_was_given_up() {
    let f = with_sets(3).await;
    let broken = flaky(&f.store);
    // It says that it is given up, and no more.
    broken.crash_after(1, false);
    let crashing = manager(&broken.as_store(), &f.clock, 3);
    crashing.retire_sets(retire(2)).await.unwrap_err();
    let late = f.manager.add_to_set(add(1, 2, vec![member("vm1", "a", 1)])).await;
    refused(late, Kind::Precondition, &["set 1", "given up"]);
    refused(f.manager.pin_set(pin(1, "alice")).await, Kind::Precondition, &["stable"]);
}

#[tokio::test]
async fn pins_of_a_vm_that_died_before_its_set_named_it_go_with_the_set() {
    let f = Fixture::new().await;
    for n in 0..30 {
        f.image_with(&format!("i{n}"), "", 2).await;
    }
    let members = |number| -> Vec<v1::SetMember> {
        let one =
            |n| v1::SetMember { disk: format!("d{n}"), ..member("vm1", &format!("i{n}"), number) };
        (0..30).map(one).collect()
    };
    let broken = flaky(&f.store);
    // The set, some pins, and then the end.
    broken.crash_after(2, false);
    let crashing = manager(&broken.as_store(), &f.clock, 3);
    crashing.add_to_set(add(1, 1, members(1))).await.unwrap_err();
    assert_eq!(f.records::<PinRecord>(KeyKind::Pin).await.len(), 6);
    assert!(f.records::<SetVmRecord>(KeyKind::SetVm).await.is_empty());
    f.manager.add_to_set(add(2, 1, members(2))).await.unwrap();
    f.manager.retire_sets(retire(1)).await.unwrap();
    assert_eq!(sequences(&f).await, [2]);
    let left = f.records::<PinRecord>(KeyKind::Pin).await;
    assert!(left.len() == 30 && left.iter().all(|pin| pin.holder == "set g/2"), "{left:?}");
}

#[tokio::test]
async fn a_group_keeps_as_many_as_its_policy_says() {
    let f = with_sets(5).await;
    // Without a policy, all.
    assert_eq!(f.manager.retire_sets(retire(0)).await.unwrap(), v1::RetireSetsResponse::default());
    let keep = v1::KeepSetsRequest { group: "g".to_owned(), keep_sets: 2 };
    let group = f.manager.keep_sets(keep.clone()).await.unwrap();
    assert_eq!((group.last_sequence, group.keep_sets), (1, 2));
    f.manager.keep_sets(keep).await.unwrap();
    f.manager.retire_sets(retire(0)).await.unwrap();
    assert_eq!(sequences(&f).await, [5, 4]);
    let begin = v1::BeginSetRequest { group: "g".to_owned(), expected_vms: 1 };
    f.manager.begin_set(begin).await.unwrap();
    let groups = f.manager.list_groups(v1::ListGroupsRequest::default()).await.unwrap();
    let names: Vec<_> =
        groups.groups.iter().map(|g| (g.name.as_str(), g.last_sequence, g.keep_sets)).collect();
    assert_eq!(names, [("g", 6, 2)]);
}

#[tokio::test]
async fn a_set_is_pinned_once_for_each_holder() {
    let f = with_sets(2).await;
    f.manager.add_to_set(add(3, 2, vec![])).await.unwrap();
    refused(f.manager.pin_set(pin(3, "alice")).await, Kind::Precondition, &["complete and stable"]);
    refused(f.manager.pin_set(pin(9, "alice")).await, Kind::NotFound, &["set 9", "set list"]);
    refused(f.manager.pin_set(pin(1, "")).await, Kind::Invalid, &["holder"]);
    f.manager.pin_set(pin(1, "bob")).await.unwrap();
    f.manager.pin_set(pin(1, "alice")).await.unwrap();
    let set = f.manager.pin_set(pin(1, "bob")).await.unwrap();
    assert_eq!(set.pins, ["alice", "bob"]);
    f.manager.unpin_set(pin(1, "bob")).await.unwrap();
    let set = f.manager.unpin_set(pin(1, "bob")).await.unwrap();
    assert_eq!(set.pins, ["alice"]);
    let holder = "set g/1".to_owned();
    let snapshot = Some(at("a", 1));
    refused(
        f.manager.pin_snapshot(v1::PinSnapshotRequest { snapshot, holder }).await,
        Kind::Invalid,
        &["blobcr set"],
    );
}

/// A VM's first disk wrote into "old", cloned from "base"; after a restart its next one writes into
/// "new".
async fn restarted_once() -> Fixture {
    let f = Fixture::new().await;
    f.image_with("base", "", 1).await;
    for (name, sets) in [("old", 1..=3), ("new", 4..=5)] {
        let source = Some(at("base", 1));
        let (name, writer) = (name.to_owned(), "mirror".to_owned());
        let clone = v1::CloneImageRequest { source, name: name.clone(), writer };
        let image = f.manager.clone_image(clone).await.unwrap().image.unwrap();
        let lease = f.lease().await;
        for (at, set) in sets.enumerate() {
            let number = at as u64 + 2;
            f.manager.begin_snapshot(begin(image.id, number, lease, "mirror")).await.unwrap();
            let published = publish(image.id, number, lease, "mirror", set as u8);
            f.manager.publish_snapshot(published).await.unwrap();
            f.manager.add_to_set(add(set, 1, vec![member("vm1", &name, number)])).await.unwrap();
        }
    }
    f
}

#[tokio::test]
async fn an_image_that_a_restart_left_behind_goes_with_its_last_set() {
    let f = restarted_once().await;
    f.manager.retire_sets(retire(3)).await.unwrap();
    assert_eq!(f.get("old").await.unwrap().latest, 4, "set 3 needs it");
    let done = f.manager.retire_sets(retire(1)).await.unwrap();
    assert_eq!(done.snapshots_removed, 2);
    refused(f.get("old").await, Kind::NotFound, &["old"]);
    let all = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
    let stable = all.iter().filter(|s| s.state() == SnapshotState::Stable).count();
    // That of "base", the first of "new", and the one of set 5.
    assert_eq!(stable, 3, "{all:?}");
    assert_eq!(f.get("new").await.unwrap().latest, 3);
}

#[tokio::test]
async fn what_a_crash_left_of_such_an_image_goes_too() {
    for swaps in 0.. {
        let f = restarted_once().await;
        let broken = flaky(&f.store);
        broken.crash_after(swaps, swaps % 2 == 0);
        let crashing = manager(&broken.as_store(), &f.clock, 3);
        let crashed = crashing.retire_sets(retire(1)).await.is_err();
        let f = f.restarted();
        f.manager.finish_removals().await.unwrap();
        f.manager.retire_sets(retire(1)).await.unwrap();
        refused(f.get("old").await, Kind::NotFound, &["old"]);
        let all = f.records::<SnapshotRecord>(KeyKind::Snapshot).await;
        let stable = all.iter().filter(|s| s.state() == SnapshotState::Stable).count();
        assert_eq!(stable, 3, "after {swaps} swaps: {all:?}");
        if !crashed {
            assert!(swaps > 10, "the test broke nothing off");
            return;
        }
    }
}

#[tokio::test]
async fn an_image_that_anything_else_needs_is_not_left_behind() {
    // A disk that writes into it, one that began from it, or a person has a pin.
    let f = restarted_once().await;
    let (snapshot, holder) = (Some(at("old", 1)), "disk host/d".to_owned());
    let pin = v1::PinSnapshotRequest { snapshot, holder: holder.clone() };
    let image_id = f.manager.pin_snapshot(pin).await.unwrap().image_id;
    f.manager.retire_sets(retire(1)).await.unwrap();
    assert_eq!(f.get("old").await.unwrap().latest, 4);
    // Until the disk is detached.
    let unpin = v1::UnpinSnapshotRequest { image_id, number: 1, holder };
    f.manager.unpin_snapshot(unpin).await.unwrap();
    refused(f.get("old").await, Kind::NotFound, &["old"]);
    // It has a snapshot of no set.
    let f = restarted_once().await;
    let (old, lease) = (f.get("old").await.unwrap(), f.lease().await);
    f.manager.begin_snapshot(begin(old.id, 5, lease, "mirror")).await.unwrap();
    f.manager.retire_sets(retire(1)).await.unwrap();
    f.manager.publish_snapshot(publish(old.id, 5, lease, "mirror", 9)).await.unwrap();
    assert_eq!(f.get("old").await.unwrap().latest, 5);
    // It was made by hand.
    let f = Fixture::new().await;
    for (set, image) in [(1, "a"), (2, "b")] {
        f.image_with(image, "", 1).await;
        f.manager.add_to_set(add(set, 1, vec![member("vm1", image, 1)])).await.unwrap();
    }
    f.manager.retire_sets(retire(1)).await.unwrap();
    assert_eq!(f.get("a").await.unwrap().latest, 1);
}

#[tokio::test]
async fn of_too_many_sets_for_one_call_the_oldest_go_first() {
    let f = Fixture::new().await;
    f.image_with("a", "", 1).await;
    for set in 1..=RETIRE_SETS_MAX as u64 + 5 {
        f.manager.add_to_set(add(set, 1, vec![member("vm1", "a", 1)])).await.unwrap();
    }
    f.manager.retire_sets(retire(1)).await.unwrap();
    let last = RETIRE_SETS_MAX as u64 + 5;
    assert_eq!(sequences(&f).await, [last, last - 1, last - 2, last - 3, last - 4]);
}
