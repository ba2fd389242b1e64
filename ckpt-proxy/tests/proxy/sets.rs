//! Sets: those of the VM's own groups.

use blobcr_ckpt_proxy::NewVm;
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{
    BeginVmSetRequest, CheckpointRequest, SetMembership, SetState, VmSet, VmSetStatusRequest,
};
use tonic::Code;

use crate::peer::{Peer, Setup, new_vm};

fn begin(group: &str) -> Request {
    let group = group.to_owned();
    Request::BeginSet(BeginVmSetRequest { group, expected_vms: 2, ..Default::default() })
}

fn status(group: &str, sequence: u64) -> Request {
    let group = group.to_owned();
    Request::SetStatus(VmSetStatusRequest { group, sequence, ..Default::default() })
}

fn join(group: &str, sequence: u64) -> Request {
    Request::Checkpoint(CheckpointRequest {
        set: Some(SetMembership { group: group.to_owned(), sequence, expected_vms: 2 }),
        idempotency_key: format!("{group}-{sequence}"),
        ..Default::default()
    })
}

async fn set(peer: &mut Peer, request: Request) -> VmSet {
    peer.send(1, request).await;
    match peer.answer().await {
        Some((1, Reply::BeginSet(set) | Reply::SetStatus(set))) => set,
        other => panic!("no set: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_begins_joins_and_sees_sets_of_its_group() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    let begun = set(&mut peer, begin("")).await;
    assert_eq!((begun.group.as_str(), begun.sequence, begun.expected_vms), ("g", 1, 2));
    assert_eq!(set(&mut peer, begin("g")).await.sequence, 2);
    peer.send(2, join("", 2)).await;
    assert!(matches!(peer.answer().await, Some((2, Reply::Checkpoint(_)))));
    let seen = set(&mut peer, status("g", 2)).await;
    // How many have joined, and not who.
    assert_eq!((seen.joined_vms, seen.state()), (1, SetState::Pending));
    let known = setup.script.sets();
    assert_eq!((known.len(), known[0].group.as_str(), known[0].sequence), (1, "g", 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_of_other_groups_are_out_of_reach() {
    let setup = Setup::new().await;
    let mut one = setup.peer("one").await;
    for request in [begin("h"), status("h", 1), status("h", 0), join("h", 1), begin("g ")] {
        one.send(7, request).await;
        let (id, code, message) = one.refusal().await;
        assert_eq!((id, code), (7, Code::PermissionDenied), "{message}");
        assert!(message.contains("--group"), "{message}");
    }
    let mut two = setup.peer("two").await;
    two.send(8, begin("")).await;
    let (_, code, message) = two.refusal().await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(message.contains("blobcr vm add two --group"), "{message}");
    setup.proxy.add_vm(new_vm("three", &["d"], &["g", "h"])).await.unwrap();
    let mut three = setup.peer("three").await;
    three.send(9, begin("")).await;
    let (_, code, message) = three.refusal().await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.contains("2 groups"), "{message}");
    assert_eq!(set(&mut three, begin("h")).await.group, "h");
    assert!(setup.script.calls().is_empty(), "nothing was committed for any of these");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_begins_sets_without_end_is_slowed_down() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    for _ in 0..600 {
        set(&mut peer, begin("")).await;
    }
    peer.send(3, begin("")).await;
    let (_, code, message) = peer.refusal().await;
    assert_eq!(code, Code::ResourceExhausted, "{message}");
    // Of its own sets it may still join one.
    peer.send(4, join("", 600)).await;
    assert!(matches!(peer.answer().await, Some((4, Reply::Checkpoint(_)))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_starts_again_has_its_groups_and_other_disks() {
    let mut setup = Setup::new().await;
    let mut old = setup.peer("one").await;
    set(&mut old, begin("")).await;
    let again = NewVm { replace: true, ..new_vm("one", &["d"], &["h"]) };
    let vm = setup.proxy.add_vm(again.clone()).await.unwrap();
    assert_eq!((vm.disks, vm.groups), (vec!["d".to_owned()], vec!["h".to_owned(), "g".to_owned()]));
    // What was connected spoke for the VM that is gone.
    assert!(old.answer().await.is_none());
    setup.restart_proxy().await;
    let mut peer = setup.peer("one").await;
    assert_eq!(set(&mut peer, begin("g")).await.group, "g");
    assert_eq!(peer.checkpoint(5, "k").await.snapshots[0].disk, "d");
    // What it is in already counts, or its record could not be read again.
    let groups = (0..15).map(|n| format!("more{n}")).collect();
    let many = NewVm { groups, ..again.clone() };
    let error = setup.proxy.add_vm(many).await.unwrap_err().to_string();
    assert!(error.contains("at most 16 groups, not 17"), "{error}");
    // Its old disks are free, another VM's are not.
    setup.proxy.add_vm(new_vm("three", &["a"], &[])).await.unwrap();
    let taken = NewVm { disks: vec!["c".to_owned()], ..again };
    let error = setup.proxy.add_vm(taken).await.unwrap_err().to_string();
    assert!(error.contains("belongs to the VM two"), "{error}");
    assert_eq!(setup.peer("one").await.checkpoint(6, "l").await.snapshots.len(), 1);
}
