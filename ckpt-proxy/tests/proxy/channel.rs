//! What a well-behaved guest asks for.

use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{CheckpointRequest, DiskSnapshot, SetMembership, SnapshotState};
use tonic::{Code, Status};

use crate::peer::{Setup, checkpoint, quick, status, wait};

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_takes_all_disks_of_the_vm_that_the_socket_belongs_to() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    let reply = peer.checkpoint(77, "k1").await;
    assert_eq!(reply.vm, "one");
    let names: Vec<_> =
        reply.snapshots.iter().map(|s| format!("{} {}@{}", s.disk, s.image, s.number)).collect();
    assert_eq!(names, ["a a-ckpt@1", "b b-ckpt@1"]);
    assert_eq!(setup.script.calls(), ["one/k1"], "one call for all disks, so one barrier");
    let reply = setup.peer("two").await.checkpoint(1, "k1").await;
    assert_eq!(reply.vm, "two", "the same key of another VM is another key");
    assert_eq!(reply.snapshots.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_one_connection_are_answered_as_they_get_done() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    setup.script.hold();
    peer.send(1, checkpoint("slow")).await;
    peer.send(2, status()).await;
    let (id, reply) = peer.answer().await.unwrap();
    assert!(matches!(reply, Reply::Status(_)));
    assert_eq!(id, 2);
    setup.script.release();
    let (id, reply) = peer.answer().await.unwrap();
    assert!(matches!(reply, Reply::Checkpoint(_)));
    assert_eq!(id, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_every_request_is_a_checkpoint_of_its_own() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("two").await;
    assert_eq!(peer.checkpoint(1, "").await.snapshots[0].number, 1);
    assert_eq!(peer.checkpoint(2, "").await.snapshots[0].number, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_when_the_snapshots_are_stable_or_lost() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    peer.send(1, wait(&[], 50)).await;
    assert_eq!(peer.refusal().await.1, Code::FailedPrecondition, "there is none to wait for");

    let taken = peer.checkpoint(2, "k").await.snapshots;
    peer.send(3, wait(&taken, 20)).await;
    assert_eq!(peer.refusal().await.1, Code::DeadlineExceeded);
    peer.send(4, wait(&taken, 20_000)).await;
    setup.script.settle(SnapshotState::Stable, "");
    let Some((4, Reply::WaitStable(reply))) = peer.answer().await else { panic!("no wait") };
    assert_eq!(reply.snapshots.len(), 2);
    assert!(reply.snapshots.iter().all(|s| s.state() == SnapshotState::Stable));

    peer.checkpoint(5, "l").await;
    setup.script.settle(SnapshotState::Failed, "the disk is full");
    // None named: those of the newest checkpoint.
    peer.send(6, wait(&[], 0)).await;
    let Some((6, Reply::WaitStable(reply))) = peer.answer().await else { panic!("no wait") };
    assert_eq!(reply.snapshots[0].number, 2);
    assert_eq!(reply.snapshots[0].reason, "the disk is full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_only_the_mirror_knows_yet_is_pending() {
    let setup = Setup::new().await;
    setup.script.set_unborn(true);
    let mut peer = setup.peer("two").await;
    let taken = peer.checkpoint(1, "k").await.snapshots;
    for time in [1, 60] {
        peer.send(2, wait(&taken, time)).await;
        assert_eq!(peer.refusal().await.1, Code::DeadlineExceeded);
    }
    peer.send(3, wait(&taken, 20_000)).await;
    peer.send(4, status()).await;
    assert_eq!(peer.answer().await.unwrap().0, 4, "the wait goes on meanwhile");
    setup.script.set_unborn(false);
    setup.script.settle(SnapshotState::Stable, "");
    assert!(matches!(peer.answer().await, Some((3, Reply::WaitStable(_)))));
    // One that was never taken is not waited for.
    let never = DiskSnapshot { number: 99, ..taken[0].clone() };
    peer.send(5, wait(&[never], 20_000)).await;
    assert_eq!(peer.refusal().await.1, Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_own_checkpoints_can_be_waited_for() {
    let setup = Setup::new().await;
    let other = setup.peer("two").await.checkpoint(1, "k").await.snapshots;
    let mut peer = setup.peer("one").await;
    let own = peer.checkpoint(1, "k").await.snapshots;
    let forged = DiskSnapshot { image: "c-ckpt".into(), ..own[0].clone() };
    for (id, asked) in [(2, &other[0]), (3, &forged), (4, &DiskSnapshot::default())] {
        peer.send(id, wait(std::slice::from_ref(asked), 10)).await;
        let (answered, code, _) = peer.refusal().await;
        assert_eq!((answered, code), (id, Code::PermissionDenied), "{asked:?}");
    }
    peer.send(5, wait(&vec![own[0].clone(); 3], 10)).await;
    assert_eq!(peer.refusal().await.1, Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_sees_its_disks_but_not_where_its_host_keeps_them() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    peer.send(1, status()).await;
    let Some((1, Reply::Status(reply))) = peer.answer().await else { panic!("no status") };
    assert_eq!(reply.vm, "one");
    assert_eq!(reply.disks.len(), 2);
    assert!(reply.disks.iter().all(|d| d.path.is_empty() && d.image == "debian"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_joins_its_set() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    let set = |group: &str, expected_vms| {
        Request::Checkpoint(CheckpointRequest {
            vm: "one".into(),
            set: Some(SetMembership { group: group.into(), sequence: 5, expected_vms }),
            idempotency_key: format!("key-{}-{expected_vms}", group.len()),
        })
    };
    peer.send(1, set("", 4)).await;
    assert!(matches!(peer.answer().await, Some((1, Reply::Checkpoint(_)))));
    let sets = setup.script.sets();
    assert_eq!(sets.len(), 1);
    assert_eq!((sets[0].group.as_str(), sets[0].sequence, sets[0].expected_vms), ("g", 5, 4));
    let members: Vec<_> =
        sets[0].members.iter().map(|m| (m.vm.as_str(), m.disk.as_str(), m.number)).collect();
    assert_eq!(members, [("one", "a", 1), ("one", "b", 1)]);
    for (id, wrong, code) in
        [(2, set("../x", 4), Code::PermissionDenied), (3, set("g", 0), Code::InvalidArgument)]
    {
        peer.send(id, wrong).await;
        assert_eq!(peer.refusal().await.1, code);
    }
    assert_eq!(setup.script.calls().len(), 1, "nothing is committed for a set that cannot be");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_the_mirror_reaches_the_guest() {
    let setup = Setup::with(quick()).await;
    let mut peer = setup.peer("one").await;
    setup.script.fail_next(Status::failed_precondition("the disk a is being rolled back"));
    peer.send(9, checkpoint("k")).await;
    let (id, code, message) = peer.refusal().await;
    assert_eq!((id, code), (9, Code::FailedPrecondition));
    assert_eq!(message, "the disk a is being rolled back");
    assert_eq!(peer.checkpoint(10, "k").await.snapshots.len(), 2, "it can be tried again");
}
