//! VMs that come and go, and the gRPC service.

use std::os::unix::fs::PermissionsExt;

use blobcr_ckpt_proxy::{DISKS_PER_VM_MAX, Proxy, ProxyError, ProxyOptions};
use blobcr_proto::v1;
use blobcr_proto::v1::checkpoint_client::CheckpointClient;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::transport::{Channel, Server};

use crate::peer::{Setup, new_vm, quick};

async fn client(proxy: &Proxy) -> CheckpointClient<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(proxy.service());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    CheckpointClient::connect(format!("http://{address}")).await.unwrap()
}

fn names(vms: &[v1::Vm]) -> Vec<&str> {
    vms.iter().map(|vm| vm.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_added_listed_and_removed() {
    let setup = Setup::new().await;
    let mut client = client(&setup.proxy).await;
    let add = |name: &str, disks: &[&str]| v1::AddVmRequest {
        name: name.to_owned(),
        disks: disks.iter().map(ToString::to_string).collect(),
        ..v1::AddVmRequest::default()
    };
    let vm = client.add_vm(add("three", &["d"])).await.unwrap().into_inner();
    assert_eq!(vm.socket, setup.socket("three").to_str().unwrap());
    assert_eq!(client.add_vm(add("three", &["d"])).await.unwrap().into_inner(), vm, "no change");
    let listed = client.list_vms(v1::ListVmsRequest {}).await.unwrap().into_inner().vms;
    assert_eq!(names(&listed), ["one", "three", "two"]);

    let many: Vec<String> = (0..=DISKS_PER_VM_MAX).map(|i| format!("m{i}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let long = "v".repeat(120);
    for (request, code, hint) in [
        (add("three", &["c"]), Code::AlreadyExists, "remove it first"),
        (add("four", &["d"]), Code::FailedPrecondition, "belongs to the VM three"),
        (add("four", &["x"]), Code::NotFound, "attach it first"),
        (add("four", &[]), Code::InvalidArgument, "at least one disk"),
        (add("four", &["x", "x"]), Code::InvalidArgument, "named twice"),
        (add("four", &many), Code::InvalidArgument, "at most 64 disks"),
        (add("../four", &["x"]), Code::InvalidArgument, "'/'"),
        (add("", &["x"]), Code::InvalidArgument, "empty"),
        (add("four", &["a/b"]), Code::InvalidArgument, "'/'"),
    ] {
        let status = client.add_vm(request.clone()).await.unwrap_err();
        assert_eq!(status.code(), code, "{request:?}: {}", status.message());
        assert!(status.message().contains(hint), "{}", status.message());
    }
    client.remove_vm(v1::VmRef { name: "three".into() }).await.unwrap();
    let status = client.remove_vm(v1::VmRef { name: "three".into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(!setup.socket("three").exists());
    assert!(!setup.dir.path().join("three.json").exists());
    let status = client.add_vm(add(&long, &["d"])).await.unwrap_err();
    assert!(status.message().contains("use a shorter"), "{}", status.message());
    client.add_vm(add("four", &["d"])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_vm_loses_its_connections() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    peer.checkpoint(1, "k").await;
    setup.proxy.remove_vm("one").await.unwrap();
    assert!(peer.answer().await.is_none());
    assert_eq!(setup.peer("two").await.checkpoint(1, "k").await.vm, "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_does_what_the_channel_does() {
    let setup = Setup::new().await;
    let mut client = client(&setup.proxy).await;
    let request = v1::CheckpointRequest {
        vm: "one".into(),
        set: None,
        idempotency_key: "from-the-host".into(),
    };
    let first = client.checkpoint(request.clone()).await.unwrap().into_inner();
    assert_eq!(first.snapshots.len(), 2);
    assert_eq!(client.checkpoint(request.clone()).await.unwrap().into_inner(), first);
    let by_guest = setup.peer("one").await.checkpoint(1, "from-the-host").await;
    assert_eq!(by_guest, first, "a key is of the VM, whoever used it");
    let wait = v1::WaitStableRequest { vm: "one".into(), timeout_ms: 10, ..Default::default() };
    assert_eq!(client.wait_stable(wait).await.unwrap_err().code(), Code::DeadlineExceeded);
    let status = client.status(v1::VmStatusRequest { vm: "one".into() }).await.unwrap();
    assert_eq!(status.into_inner().disks[0].path, "/mnt/disks/a.raw", "the host may know");
    for vm in ["none", ""] {
        let request = v1::CheckpointRequest { vm: vm.into(), ..request.clone() };
        assert!(client.checkpoint(request).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_outlive_the_proxy() {
    let mut setup = Setup::new().await;
    let one = setup.dir.path().join("one.sock");
    assert_eq!(std::fs::metadata(&one).unwrap().permissions().mode() & 0o777, 0o660);
    setup.proxy.stop().await;
    assert!(!one.exists(), "stopping leaves no dead socket");
    // What a proxy leaves that was killed.
    drop(std::os::unix::net::UnixListener::bind(&one).unwrap());
    std::fs::write(setup.dir.path().join("broken.json"), b"{}").unwrap();
    setup.restart_proxy().await;
    assert_eq!(names(&setup.proxy.vms()), ["one", "two"]);
    assert_eq!(setup.peer("one").await.checkpoint(1, "k").await.vm, "one");
    assert!(setup.dir.path().join("broken.json").exists(), "what is not understood is kept");
    setup.proxy.add_vm(new_vm("broken", &["d"], &[])).await.unwrap();
    setup.restart_proxy().await;
    assert_eq!(names(&setup.proxy.vms()), ["broken", "one", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_has_one_proxy_and_a_mirror_an_address() {
    let setup = Setup::new().await;
    let refused = Proxy::start(setup.options());
    assert!(matches!(refused, Err(ProxyError::Locked(_))));
    let dir = tempfile::tempdir().unwrap();
    for bad in ["", "host", "1.2.3.4", "http://x y:1"] {
        let refused = Proxy::start(ProxyOptions::new(dir.path(), bad));
        assert!(matches!(refused, Err(ProxyError::BadAddress { .. })), "{bad:?}");
    }
    // A mirror that is not there yet is no reason not to start.
    let options = ProxyOptions { limits: quick(), ..ProxyOptions::new(dir.path(), "127.0.0.1:1") };
    let proxy = Proxy::start(options).unwrap();
    let error = proxy.add_vm(new_vm("one", &["a"], &[])).await.unwrap_err();
    assert_eq!(tonic::Status::from(error).code(), Code::Unavailable);
    assert!(proxy.vms().is_empty());
    proxy.stop().await;
    let error = proxy.add_vm(new_vm("one", &["a"], &[])).await.unwrap_err();
    assert!(matches!(error, ProxyError::Stopping));
}
