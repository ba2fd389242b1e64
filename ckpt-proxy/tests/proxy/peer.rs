//! What the tests share: a proxy in a directory of its own, and a peer that says what it likes.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use blobcr_ckpt_proxy::testing::{Script, ScriptedHost};
use blobcr_ckpt_proxy::{Limits, NewVm, Proxy, ProxyOptions};
use blobcr_proto::channel::{Decoded, Frame, decode};
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{
    ChannelReply, ChannelRequest, CheckpointReply, CheckpointRequest, DiskSnapshot,
    VmStatusRequest, WaitStableRequest,
};
use bytes::{Bytes, BytesMut};
use prost::Message;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::Code;

/// Longer than anything here takes; what takes longer has hung.
pub(crate) const HUNG: Duration = Duration::from_secs(30);

/// Limits under which a test does not take long.
pub(crate) fn quick() -> Limits {
    Limits {
        unreachable: Duration::from_millis(500),
        frame: Duration::from_millis(100),
        write: Duration::from_millis(300),
        rest: Duration::from_millis(50),
        wait_default: Duration::from_millis(100),
        ..Limits::default()
    }
}

/// A proxy, its directory, and the host behind it.
pub(crate) struct Setup {
    pub(crate) dir: TempDir,
    pub(crate) script: Script,
    pub(crate) host: ScriptedHost,
    pub(crate) limits: Limits,
    pub(crate) proxy: Proxy,
}

impl Setup {
    /// With the VMs `one` (disks `a` and `b`) and `two` (disk `c`).
    pub(crate) async fn new() -> Self {
        Self::with(quick()).await
    }

    pub(crate) async fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = Script::new(&["a", "b", "c", "d"]);
        let host = ScriptedHost::start(&script, None);
        let options = ProxyOptions {
            limits: limits.clone(),
            guests: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            ..ProxyOptions::new(dir.path(), host.address().to_string())
        };
        let proxy = Proxy::start(options).unwrap();
        proxy.add_vm(new_vm("one", &["a", "b"], &["g"])).await.unwrap();
        proxy.add_vm(new_vm("two", &["c"], &[])).await.unwrap();
        Self { dir, script, host, limits, proxy }
    }

    pub(crate) fn options(&self) -> ProxyOptions {
        ProxyOptions {
            limits: self.limits.clone(),
            guests: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            ..ProxyOptions::new(self.dir.path(), self.host.address().to_string())
        }
    }

    /// Ends the proxy and starts another one on the same directory.
    pub(crate) async fn restart_proxy(&mut self) {
        self.proxy.stop().await;
        self.proxy = Proxy::start(self.options()).unwrap();
    }

    pub(crate) fn socket(&self, vm: &str) -> PathBuf {
        self.dir.path().join(format!("{vm}.sock"))
    }

    pub(crate) async fn peer(&self, vm: &str) -> Peer {
        Peer {
            stream: UnixStream::connect(self.socket(vm)).await.unwrap(),
            buffer: BytesMut::new(),
        }
    }
}

/// Waits for a condition that some other task brings about.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    in_time(what, reached).await;
}

pub(crate) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(HUNG, future).await.unwrap_or_else(|_| panic!("hung: {what}"))
}

/// The end of a channel that a guest is at.
pub(crate) struct Peer<S = UnixStream> {
    pub(crate) stream: S,
    pub(crate) buffer: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        in_time("writing", self.stream.write_all(bytes)).await.unwrap();
    }

    pub(crate) async fn send(&mut self, request_id: u64, request: Request) {
        self.raw(&frame(request_id, request)).await;
    }

    /// The next answer; `None` when the proxy closed the connection.
    pub(crate) async fn answer(&mut self) -> Option<(u64, Reply)> {
        loop {
            match decode(&mut self.buffer) {
                Decoded::Frame(frame) => {
                    let reply = ChannelReply::decode(frame.body).unwrap();
                    return Some((frame.request_id, reply.reply.unwrap()));
                }
                Decoded::Skipped(n) => panic!("the proxy sent {n} bytes that are no frame"),
                Decoded::Incomplete => {}
            }
            let read = in_time("reading", self.stream.read_buf(&mut self.buffer)).await;
            if matches!(read, Ok(0) | Err(_)) {
                return None;
            }
        }
    }

    /// The next answer, which must be a refusal.
    pub(crate) async fn refusal(&mut self) -> (u64, Code, String) {
        match self.answer().await {
            Some((id, Reply::Error(e))) => (id, Code::from(e.code), e.message),
            other => panic!("no refusal: {other:?}"),
        }
    }

    pub(crate) async fn checkpoint(&mut self, request_id: u64, key: &str) -> CheckpointReply {
        self.send(request_id, checkpoint(key)).await;
        match self.answer().await {
            Some((id, Reply::Checkpoint(reply))) if id == request_id => reply,
            other => panic!("no checkpoint: {other:?}"),
        }
    }
}

pub(crate) fn new_vm(name: &str, disks: &[&str], groups: &[&str]) -> NewVm {
    let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let (disks, groups) = (owned(disks), owned(groups));
    NewVm { name: name.to_owned(), disks, groups, ..NewVm::default() }
}

pub(crate) fn checkpoint(key: &str) -> Request {
    let request = CheckpointRequest { idempotency_key: key.to_owned(), ..Default::default() };
    Request::Checkpoint(request)
}

pub(crate) fn wait(snapshots: &[DiskSnapshot], timeout_ms: u64) -> Request {
    let snapshots = snapshots.to_vec();
    Request::WaitStable(WaitStableRequest { vm: String::new(), snapshots, timeout_ms })
}

pub(crate) fn status() -> Request {
    Request::Status(VmStatusRequest::default())
}

pub(crate) fn frame(request_id: u64, request: Request) -> BytesMut {
    raw_frame(request_id, ChannelRequest { request: Some(request) }.encode_to_vec())
}

pub(crate) fn raw_frame(request_id: u64, body: Vec<u8>) -> BytesMut {
    let mut bytes = BytesMut::new();
    Frame { request_id, body: Bytes::from(body) }.encode(&mut bytes).unwrap();
    bytes
}
