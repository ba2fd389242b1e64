//! VMs that have a CID. What their connections do is tested in a guest whose kernel has virtual
//! machines of its own (`guest_vsock` of the tests); here nobody connects.

use std::os::unix::fs::symlink;

use blobcr_ckpt_proxy::{NewVm, Proxy, ProxyError, ProxyOptions};
use bytes::BytesMut;
use socket2::{Domain, Socket, Type};
use tokio::net::UnixStream;
use tonic::Code;

use crate::peer::{Peer, Setup, new_vm};

/// Not the port of any service.
const PORT: u32 = 0x626c_6f62;

fn with_cid(name: &str, disk: &str, vsock_cid: u32) -> NewVm {
    NewVm { vsock_cid, ..new_vm(name, &[disk], &[]) }
}

/// A setup that serves guests over vsock at the port, if this kernel has it.
async fn over_vsock(port: u32) -> Option<Setup> {
    let mut setup = Setup::new().await;
    setup.proxy.stop().await;
    let options = ProxyOptions { vsock: Some(port), ..setup.options() };
    match (Proxy::start(options), Socket::new(Domain::VSOCK, Type::STREAM, None)) {
        (Ok(proxy), Ok(_)) => setup.proxy = proxy,
        (Err(ProxyError::NoVsock), Err(_)) => return None,
        (started, socket) => panic!("{:?} {socket:?}", started.err()),
    }
    Some(setup)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cid_is_of_one_vm_and_stays_with_it() {
    let Some(mut setup) = over_vsock(PORT).await else { return };
    let added = setup.proxy.add_vm(with_cid("three", "d", 42)).await.unwrap();
    assert_eq!((added.vsock_cid, added.vsock_port), (42, PORT));
    assert_eq!(setup.proxy.add_vm(with_cid("three", "d", 42)).await.unwrap(), added, "no change");
    let free = |vm| NewVm { replace: true, ..vm };
    for (vm, code, hint) in [
        (with_cid("three", "d", 0), Code::AlreadyExists, "remove it first"),
        (with_cid("three", "d", 43), Code::AlreadyExists, "remove it first"),
        (free(with_cid("two", "c", 42)), Code::FailedPrecondition, "that of the VM three"),
        (with_cid("four", "e", 1), Code::InvalidArgument, "reserved"),
        (with_cid("four", "e", 2), Code::InvalidArgument, "reserved"),
        (with_cid("four", "e", u32::MAX), Code::InvalidArgument, "reserved"),
    ] {
        let status = tonic::Status::from(setup.proxy.add_vm(vm.clone()).await.unwrap_err());
        assert_eq!(status.code(), code, "{vm:?}: {}", status.message());
        assert!(status.message().contains(hint), "{}", status.message());
    }
    // What replaces its disks leaves it its CID, or gives it another one.
    let kept = setup.proxy.add_vm(free(with_cid("three", "d", 0))).await.unwrap();
    assert_eq!(kept.vsock_cid, 42);
    let other = setup.proxy.add_vm(free(with_cid("three", "d", 43))).await.unwrap();
    assert_eq!(other.vsock_cid, 43);
    setup.proxy.add_vm(free(with_cid("two", "c", 42))).await.unwrap();
    // A proxy that serves nobody over vsock keeps the CIDs for one that does.
    setup.restart_proxy().await;
    assert!(setup.proxy.vms().iter().all(|vm| (vm.vsock_cid, vm.vsock_port) == (0, 0)));
    let error = setup.proxy.add_vm(with_cid("four", "e", 44)).await.unwrap_err();
    assert!(error.to_string().contains("--vsock"), "{error}");
    setup.proxy.stop().await;
    let options = ProxyOptions { vsock: Some(PORT), ..setup.options() };
    setup.proxy = Proxy::start(options).unwrap();
    let cids: Vec<_> = setup.proxy.vms().into_iter().map(|vm| (vm.name, vm.vsock_cid)).collect();
    assert_eq!(cids, [("one".into(), 0), ("three".into(), 43), ("two".into(), 42)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_served_by_one_proxy() {
    let Some(setup) = over_vsock(PORT + 1).await else { return };
    let dir = tempfile::tempdir().unwrap();
    let options =
        ProxyOptions { vsock: Some(PORT + 1), ..ProxyOptions::new(dir.path(), "127.0.0.1:1") };
    let error = Proxy::start(options.clone()).map(drop).unwrap_err();
    assert!(matches!(error, ProxyError::ListenVsock { .. }), "{error}");
    setup.proxy.stop().await;
    Proxy::start(options).unwrap().stop().await;
}

/// How hypervisors without a kernel behind them do it (Firecracker, cloud-hypervisor,
/// vhost-device-vsock): the guest's port P is the Unix socket PATH_P.
#[tokio::test(flavor = "multi_thread")]
async fn a_vms_socket_serves_a_hypervisor_that_makes_vsock_of_unix_sockets() {
    let mut setup = Setup::new().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.vsock_7000");
    symlink(setup.socket("one"), &path).unwrap();
    for key in ["before", "after"] {
        let stream = UnixStream::connect(&path).await.unwrap();
        let mut peer = Peer { stream, buffer: BytesMut::new() };
        assert_eq!(peer.checkpoint(1, key).await.vm, "one");
        setup.restart_proxy().await;
    }
}
