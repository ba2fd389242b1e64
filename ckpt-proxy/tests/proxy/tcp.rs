//! Channels over TCP: whose a connection is says the token, and nothing else.

use std::net::SocketAddr;
use std::time::Duration;

use blobcr_ckpt_proxy::{Limits, NewVm};
use blobcr_proto::v1;
use blobcr_proto::v1::Hello;
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use bytes::BytesMut;
use tokio::net::{TcpSocket, TcpStream};
use tonic::Code;

use crate::peer::{
    HUNG, Peer, Setup, checkpoint, in_time, new_vm, quick, raw_frame, status, until,
};

/// The VM `three` (disk `d`) with a token.
async fn with_token(setup: &Setup) -> v1::Vm {
    let vm = setup.proxy.add_vm(NewVm { tcp: true, ..new_vm("three", &["d"], &["g"]) }).await;
    vm.unwrap()
}

async fn dial(vm: &v1::Vm) -> Peer<TcpStream> {
    let address: SocketAddr = vm.address.parse().unwrap();
    Peer { stream: TcpStream::connect(address).await.unwrap(), buffer: BytesMut::new() }
}

fn hello(vm: &str, token: &str) -> Request {
    Request::Hello(Hello { vm: vm.to_owned(), token: token.to_owned() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_its_token_is_served_and_keeps_it_over_a_restart() {
    let mut setup = Setup::new().await;
    let vm = with_token(&setup).await;
    assert_eq!(vm.token.len(), 64);
    let mut peer = dial(&vm).await;
    // In one piece with what follows: nothing of it is lost.
    let mut both = crate::peer::frame(1, hello("three", &vm.token));
    both.extend_from_slice(&crate::peer::frame(2, checkpoint("k")));
    peer.raw(&both).await;
    assert!(matches!(peer.answer().await, Some((1, Reply::Hello(h))) if h.vm == "three"));
    let taken = match peer.answer().await {
        Some((2, Reply::Checkpoint(taken))) => taken,
        other => panic!("no checkpoint: {other:?}"),
    };
    assert_eq!((taken.vm.as_str(), taken.snapshots[0].disk.as_str()), ("three", "d"));
    // It is told once, and not kept.
    let again = NewVm { tcp: true, ..new_vm("three", &["d"], &["g"]) };
    assert_eq!(setup.proxy.add_vm(again).await.unwrap().token, "");
    for entry in std::fs::read_dir(setup.dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") {
            assert!(!std::fs::read_to_string(&path).unwrap().contains(&vm.token));
        }
    }
    setup.restart_proxy().await;
    let address = setup.proxy.vms().into_iter().find(|v| v.name == "three").unwrap().address;
    let mut peer = dial(&v1::Vm { address, ..vm.clone() }).await;
    peer.send(3, hello("three", &vm.token)).await;
    assert!(matches!(peer.answer().await, Some((3, Reply::Hello(_)))));
    assert_eq!(peer.checkpoint(4, "l").await.vm, "three");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_a_vm_without_its_token() {
    let setup = Setup::new().await;
    let vm = with_token(&setup).await;
    let other =
        setup.proxy.add_vm(NewVm { tcp: true, replace: true, ..new_vm("two", &["c"], &[]) });
    let other = other.await.unwrap();
    for (name, token) in [
        ("three", other.token.as_str()),
        ("three", ""),
        ("three", &vm.token[1..]),
        ("two", &vm.token),
        // It has none.
        ("one", ""),
        ("one", &vm.token),
        ("none", &vm.token),
        ("", &vm.token),
    ] {
        let mut peer = dial(&vm).await;
        peer.send(1, hello(name, token)).await;
        let (_, code, message) = peer.refusal().await;
        assert_eq!(code, Code::Unauthenticated, "{name} {token}");
        assert!(message.contains("no such VM, or this is not its token"), "{message}");
        assert!(peer.answer().await.is_none(), "and it is over");
    }
    // A request before that, also in the name of the VM.
    for first in [status(), checkpoint("k")] {
        let mut peer = dial(&vm).await;
        peer.send(1, first).await;
        assert_eq!(peer.refusal().await.1, Code::Unauthenticated);
    }
    assert!(setup.script.calls().is_empty());
    // And with the right one, another VM's name is refused as on any channel.
    let mut peer = dial(&vm).await;
    peer.send(1, hello("three", &vm.token)).await;
    assert!(matches!(peer.answer().await, Some((1, Reply::Hello(_)))));
    peer.send(2, hello("two", &other.token)).await;
    assert_eq!(peer.refusal().await.1, Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_or_noise_is_let_go_and_disturbs_nobody() {
    let setup = Setup::new().await;
    let vm = with_token(&setup).await;
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(dial(&vm).await);
    }
    // More than have a place: the others come to one when those have been let go.
    let served = async {
        loop {
            let mut peer = dial(&vm).await;
            let frame = crate::peer::frame(1, hello("three", &vm.token));
            let written = tokio::io::AsyncWriteExt::write_all(&mut peer.stream, &frame).await;
            if written.is_ok() && peer.answer().await.is_some() {
                return peer.checkpoint(2, "k").await.vm;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert_eq!(in_time("a place", served).await, "three");
    for peer in &mut silent {
        assert!(peer.answer().await.is_none());
    }
    let mut noisy = dial(&vm).await;
    noisy.raw(&[0x55; 4096]).await;
    assert!(noisy.answer().await.is_none());
    let mut half = dial(&vm).await;
    half.raw(&raw_frame(1, vec![0; 60_000])[..100]).await;
    assert!(half.answer().await.is_none());
    assert_eq!(setup.peer("one").await.checkpoint(3, "m").await.vm, "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_leaves_room_for_the_others() {
    // Nobody is let go while this lasts.
    let setup = Setup::with(Limits { frame: HUNG, ..quick() }).await;
    let vm = with_token(&setup).await;
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(dial(&vm).await);
    }
    assert!(dial(&vm).await.answer().await.is_none(), "its places are taken");
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let stream = socket.connect(vm.address.parse().unwrap()).await.unwrap();
    let mut other = Peer { stream, buffer: BytesMut::new() };
    other.send(1, hello("three", &vm.token)).await;
    assert!(matches!(other.answer().await, Some((1, Reply::Hello(_)))));
    assert_eq!(other.checkpoint(2, "k").await.vm, "three");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_vm_loses_its_connections_over_tcp() {
    let setup = Setup::new().await;
    let vm = with_token(&setup).await;
    let mut peer = dial(&vm).await;
    peer.send(1, hello("three", &vm.token)).await;
    assert!(matches!(peer.answer().await, Some((1, Reply::Hello(_)))));
    setup.proxy.remove_vm("three").await.unwrap();
    assert!(peer.answer().await.is_none());
    let mut late = dial(&vm).await;
    late.send(1, hello("three", &vm.token)).await;
    assert_eq!(late.refusal().await.1, Code::Unauthenticated);
    // A VM that is made anew under the name has another token.
    let new = with_token(&setup).await;
    assert_ne!(new.token, vm.token);
    let mut old = dial(&vm).await;
    old.send(1, hello("three", &vm.token)).await;
    assert_eq!(old.refusal().await.1, Code::Unauthenticated);
    until("the listed VM", || setup.proxy.vms().iter().any(|v| v.name == "three")).await;
}
