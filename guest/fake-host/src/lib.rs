//! The host's end of a guest's channel, made up for the tests of what runs in a guest.
//!
//! [`Connection`] is one that a test scripts byte by byte; [`FakeHost`] answers by itself over TCP
//! and keeps what it was asked.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::spawn;

use blobcr_proto::channel::{Decoded, Frame, decode};
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{
    ChannelError, ChannelReply, ChannelRequest, CheckpointReply, Disk, DiskSnapshot, HelloReply,
    SetState, Snapshot, SnapshotState, VmSet, VmStatusReply, WaitStableReply,
};
use bytes::BytesMut;
use prost::Message;

/// A connection of a guest.
pub struct Connection<S> {
    /// The stream.
    pub stream: S,
    buffer: BytesMut,
}

impl<S: Read + Write> Connection<S> {
    /// Over this stream.
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// The next request; `None` when the guest has closed the connection.
    pub fn request(&mut self) -> Option<(u64, Request)> {
        loop {
            match decode(&mut self.buffer) {
                Decoded::Frame(frame) => {
                    let request = ChannelRequest::decode(frame.body).unwrap();
                    return Some((frame.request_id, request.request.unwrap()));
                }
                Decoded::Skipped(n) => panic!("the guest sent {n} bytes that are no frame"),
                Decoded::Incomplete => {}
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece).unwrap() {
                0 => return None,
                bytes => self.buffer.extend_from_slice(&piece[..bytes]),
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Answers a request.
    pub fn reply(&mut self, id: u64, reply: Reply) {
        self.send(&encode(id, reply));
    }
}

/// The frame of an answer.
#[must_use]
pub fn encode(request_id: u64, reply: Reply) -> BytesMut {
    let body = ChannelReply { reply: Some(reply) }.encode_to_vec().into();
    let mut bytes = BytesMut::new();
    Frame { request_id, body }.encode(&mut bytes).unwrap();
    bytes
}

/// A refusal with a gRPC status code.
#[must_use]
pub fn refusal(code: i32, message: &str) -> Reply {
    Reply::Error(ChannelError { code, message: message.to_owned() })
}

/// The sets that several hosts serve together.
#[derive(Clone, Default)]
pub struct Sets(Arc<Mutex<Vec<VmSet>>>);

impl Sets {
    fn all(&self) -> MutexGuard<'_, Vec<VmSet>> {
        self.0.lock().unwrap()
    }

    /// Every set that was begun.
    #[must_use]
    pub fn begun(&self) -> Vec<VmSet> {
        self.all().clone()
    }

    fn begin(&self, group: &str, expected_vms: u32) -> VmSet {
        let mut sets = self.all();
        let group = if group.is_empty() { "only" } else { group }.to_owned();
        let sequence = sets.len() as u64 + 1;
        let mut set = VmSet { group, sequence, expected_vms, ..VmSet::default() };
        set.set_state(SetState::Incomplete);
        sets.push(set.clone());
        set
    }

    fn join(&self, sequence: u64) {
        if let Some(set) = self.all().iter_mut().find(|set| set.sequence == sequence) {
            set.joined_vms += 1;
            if set.joined_vms == set.expected_vms {
                set.set_state(SetState::Stable);
            }
        }
    }

    fn find(&self, sequence: u64) -> Option<VmSet> {
        let sets = self.all();
        match sequence {
            0 => sets.iter().rev().find(|set| set.state() == SetState::Stable).cloned(),
            _ => sets.iter().find(|set| set.sequence == sequence).cloned(),
        }
    }
}

type Refuse = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

struct Shared {
    vm: String,
    sets: Sets,
    refuse: Box<Refuse>,
    /// The answers by the ids of their requests: one that is repeated is not done twice.
    answers: Mutex<HashMap<u64, Reply>>,
    asked: Mutex<Vec<Request>>,
}

/// A host of one VM over TCP on this machine, which answers everything at once.
pub struct FakeHost {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl FakeHost {
    /// A host that refuses nothing.
    #[must_use]
    pub fn new(vm: &str, sets: &Sets) -> Self {
        Self::refusing(vm, sets, |_| None)
    }

    /// A host that gives the answers of `refuse` where it has one.
    pub fn refusing(
        vm: &str,
        sets: &Sets,
        refuse: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            vm: vm.to_owned(),
            sets: sets.clone(),
            refuse: Box::new(refuse),
            answers: Mutex::default(),
            asked: Mutex::default(),
        });
        let serving = shared.clone();
        spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = serving.clone();
                spawn(move || shared.serve(stream));
            }
        });
        Self { address, shared }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// What it was asked, in order; greetings and repetitions left out.
    #[must_use]
    pub fn asked(&self) -> Vec<Request> {
        self.shared.asked.lock().unwrap().clone()
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        let mut connection = Connection::new(stream);
        while let Some((id, request)) = connection.request() {
            let known = self.answers.lock().unwrap().get(&id).cloned();
            let reply = known.unwrap_or_else(|| {
                let reply = self.answer(&request);
                self.answers.lock().unwrap().insert(id, reply.clone());
                reply
            });
            let bytes = encode(id, reply);
            if connection.stream.write_all(&bytes).is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: &Request) -> Reply {
        if let Request::Hello(hello) = request {
            return Reply::Hello(HelloReply { vm: hello.vm.clone() });
        }
        self.asked.lock().unwrap().push(request.clone());
        if let Some(reply) = (self.refuse)(request) {
            return reply;
        }
        match request {
            Request::Hello(_) => unreachable!("answered above"),
            Request::Checkpoint(request) => {
                if let Some(set) = &request.set {
                    self.sets.join(set.sequence);
                }
                let snapshot = DiskSnapshot {
                    disk: format!("{}-d0", self.vm),
                    image: format!("{}-ckpt", self.vm),
                    image_id: 7,
                    number: self.asked.lock().unwrap().len() as u64,
                    dirty_bytes: 4096,
                    downtime_ns: 1500,
                };
                Reply::Checkpoint(CheckpointReply {
                    vm: self.vm.clone(),
                    snapshots: vec![snapshot],
                })
            }
            Request::WaitStable(request) => {
                let stable = |s: &DiskSnapshot| {
                    let image = s.image.clone();
                    let mut found = Snapshot { image, number: s.number, ..Snapshot::default() };
                    found.set_state(SnapshotState::Stable);
                    found
                };
                let snapshots = request.snapshots.iter().map(stable).collect();
                Reply::WaitStable(WaitStableReply { snapshots })
            }
            Request::Status(_) => Reply::Status(VmStatusReply {
                vm: self.vm.clone(),
                groups: vec!["only".to_owned()],
                disks: vec![Disk {
                    name: format!("{}-d0", self.vm),
                    checkpoint_image: format!("{}-ckpt", self.vm),
                    size_bytes: 1 << 30,
                    dirty_bytes: 4096,
                    pending: vec![3],
                    last_stable: 2,
                    stalled: "why not".to_owned(),
                    ..Disk::default()
                }],
            }),
            Request::BeginSet(r) => Reply::BeginSet(self.sets.begin(&r.group, r.expected_vms)),
            Request::SetStatus(r) => match self.sets.find(r.sequence) {
                Some(set) => Reply::SetStatus(set),
                None => refusal(5, "there is no such set"),
            },
        }
    }
}
