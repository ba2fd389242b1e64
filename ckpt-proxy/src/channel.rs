//! One connection to a VM's socket: a byte stream from a guest, of which nothing is believed.
//!
//! What a peer can make the proxy hold is bounded: one frame being read, [`REQUESTS_MAX`] requests
//! being answered, and no answer waiting, because no frame is read while one is being written.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use blobcr_proto::channel::{BODY_BYTES_MAX, Decoded, Frame, decode};
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{ChannelError, ChannelReply, ChannelRequest, HelloReply, VmStatusReply};
use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Code, Status};

use crate::limits::{NOISE_MAX, READ_BYTES, REQUESTS_MAX, TEXT_BYTES_MAX};
use crate::requests::{self, Backend, Vm};
use crate::sets;

/// Why a connection ended.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The peer closed it, or it broke.
    Closed,
    /// The peer sent nothing but noise, or took no answer: its socket should rest.
    Misbehaved(&'static str),
}

/// Serves a connection until it ends. Checkpoints that were begun go on behind it.
///
/// `buffer` holds what has been read of it already.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    backend: Arc<Backend>,
    vm: Arc<Vm>,
    stream: S,
    buffer: BytesMut,
) -> Ending {
    let mut connection = Connection {
        backend,
        vm,
        stream,
        buffer,
        frame_until: None,
        noise: 0,
        running: JoinSet::new(),
        ids: HashMap::new(),
    };
    match connection.run().await {
        Ok(ending) => ending,
        Err(error) => {
            tracing::debug!(vm = %connection.vm.name(), %error, "connection broke");
            Ending::Closed
        }
    }
}

struct Connection<S> {
    backend: Arc<Backend>,
    vm: Arc<Vm>,
    stream: S,
    buffer: BytesMut,
    /// When the frame whose beginning is in the buffer must be whole.
    frame_until: Option<Instant>,
    /// Places that looked like a frame and were none, since the last good one.
    noise: usize,
    running: JoinSet<ChannelReply>,
    /// The request id of each running request.
    ids: HashMap<Id, u64>,
}

enum Event {
    Read(usize),
    Answer(Result<(Id, ChannelReply), JoinError>),
    FrameLate,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    async fn run(&mut self) -> io::Result<Ending> {
        loop {
            if let Some(ending) = self.take_frames().await? {
                return Ok(ending);
            }
            match self.next_event().await? {
                Event::Read(0) => return Ok(Ending::Closed),
                Event::Read(_) => {}
                Event::Answer(done) => {
                    let (task, reply) = match done {
                        Ok((task, reply)) => (task, reply),
                        Err(error) => (error.id(), refusal(&internal())),
                    };
                    if let Some(request_id) = self.ids.remove(&task)
                        && let Some(ending) = self.answer(request_id, reply).await?
                    {
                        return Ok(ending);
                    }
                }
                Event::FrameLate => {
                    if self.vm.may_log() {
                        tracing::warn!(vm = %self.vm.name(), "a frame was left unfinished");
                    }
                    self.buffer.advance(1);
                    self.noise += 1;
                    self.frame_until = None;
                }
            }
        }
    }

    async fn next_event(&mut self) -> io::Result<Event> {
        if self.buffer.is_empty() {
            self.frame_until = None;
        } else if self.frame_until.is_none() {
            self.frame_until = Some(Instant::now() + self.backend.limits.frame);
        }
        let late = self.frame_until;
        let frame_late = async move {
            match late {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        self.buffer.reserve(READ_BYTES);
        tokio::select! {
            // Answers first: they free places for requests.
            biased;
            Some(done) = self.running.join_next_with_id() => Ok(Event::Answer(done)),
            read = self.stream.read_buf(&mut self.buffer) => Ok(Event::Read(read?)),
            () = frame_late => Ok(Event::FrameLate),
        }
    }

    async fn take_frames(&mut self) -> io::Result<Option<Ending>> {
        loop {
            match decode(&mut self.buffer) {
                Decoded::Incomplete => return Ok(None),
                Decoded::Skipped(bytes) => {
                    // Once for all that comes together.
                    if self.noise == 0 && self.vm.may_log() {
                        tracing::warn!(vm = %self.vm.name(), bytes, "skipped what is no frame");
                    }
                    self.frame_until = None;
                    self.noise += 1;
                    if self.noise > NOISE_MAX {
                        return Ok(Some(Ending::Misbehaved("it sends nothing but noise")));
                    }
                }
                Decoded::Frame(frame) => {
                    self.frame_until = None;
                    self.noise = 0;
                    if let Some(ending) = self.take(frame).await? {
                        return Ok(Some(ending));
                    }
                }
            }
        }
    }

    async fn take(&mut self, frame: Frame) -> io::Result<Option<Ending>> {
        let Frame { request_id, body } = frame;
        if self.ids.values().any(|running| *running == request_id) {
            tracing::debug!(vm = %self.vm.name(), request_id, "repeated while it is running");
            return Ok(None);
        }
        let request = match self.check(body) {
            Ok(request) => request,
            Err(status) => return self.answer(request_id, refusal(&status)).await,
        };
        let task = answer_to(Arc::clone(&self.backend), Arc::clone(&self.vm), request);
        let handle = self.running.spawn(task);
        self.ids.insert(handle.id(), request_id);
        Ok(None)
    }

    fn check(&self, body: Bytes) -> Result<Request, Status> {
        let request = ChannelRequest::decode(body)
            .map_err(|e| Status::invalid_argument(format!("the request cannot be read: {e}")))?
            .request
            .ok_or_else(|| {
                Status::unimplemented("this host does not know the request; update its blobcr")
            })?;
        let named = match &request {
            Request::Checkpoint(r) => &r.vm,
            Request::WaitStable(r) => &r.vm,
            Request::Status(r) => &r.vm,
            Request::BeginSet(r) => &r.vm,
            Request::SetStatus(r) => &r.vm,
            Request::Hello(r) => &r.vm,
        };
        if !named.is_empty() && named != self.vm.name().as_str() {
            return Err(Status::permission_denied(format!(
                "this channel is of the VM {} and of no other",
                self.vm.name()
            )));
        }
        if self.ids.len() >= REQUESTS_MAX {
            return Err(Status::resource_exhausted(format!(
                "{REQUESTS_MAX} requests of this connection are being answered; wait for one"
            )));
        }
        Ok(request)
    }

    async fn answer(&mut self, request_id: u64, reply: ChannelReply) -> io::Result<Option<Ending>> {
        if let Some(Reply::Error(error)) = &reply.reply
            && is_the_guests_fault(error.code.into())
            && self.vm.may_log()
        {
            tracing::warn!(
                vm = %self.vm.name(), request_id, code = ?Code::from(error.code),
                error = error.message, "request refused"
            );
        }
        let mut body = reply.encode_to_vec();
        if body.len() > BODY_BYTES_MAX {
            let status = Status::out_of_range("the answer does not fit a frame of the channel");
            body = refusal(&status).encode_to_vec();
        }
        let mut bytes = BytesMut::new();
        Frame { request_id, body: body.into() }
            .encode(&mut bytes)
            .expect("a refusal is far shorter than a frame may be");
        match timeout(self.backend.limits.write, self.stream.write_all(&bytes)).await {
            Ok(written) => written.map(|()| None),
            Err(_) => Ok(Some(Ending::Misbehaved("it takes no answers"))),
        }
    }
}

async fn answer_to(backend: Arc<Backend>, vm: Arc<Vm>, request: Request) -> ChannelReply {
    let reply = match request {
        Request::Checkpoint(r) => {
            requests::checkpoint(&backend, &vm, r).await.map(Reply::Checkpoint)
        }
        Request::WaitStable(r) => {
            requests::wait_stable(&backend, &vm, r).await.map(Reply::WaitStable)
        }
        Request::Status(_) => {
            requests::status(&backend, &vm).await.map(for_guest).map(Reply::Status)
        }
        Request::BeginSet(r) => sets::begin(&backend, &vm, r).await.map(Reply::BeginSet),
        Request::SetStatus(r) => sets::status(&backend, &vm, r).await.map(Reply::SetStatus),
        // The channel has said so already.
        Request::Hello(_) => Ok(Reply::Hello(HelloReply { vm: vm.name().to_string() })),
    };
    match reply {
        Ok(reply) => ChannelReply { reply: Some(reply) },
        Err(status) => refusal(&status),
    }
}

/// Whether a refusal says something of who asked, and not only how things are at the moment.
fn is_the_guests_fault(code: Code) -> bool {
    use Code::{InvalidArgument, PermissionDenied, ResourceExhausted, Unimplemented};
    matches!(code, InvalidArgument | PermissionDenied | ResourceExhausted | Unimplemented)
}

/// A guest has no use for its host's paths.
fn for_guest(mut reply: VmStatusReply) -> VmStatusReply {
    for disk in &mut reply.disks {
        disk.path.clear();
        shorten(&mut disk.stalled);
    }
    reply
}

fn shorten(text: &mut String) {
    if text.len() > TEXT_BYTES_MAX {
        let cut = (0..=TEXT_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
    }
}

pub(crate) fn refusal(status: &Status) -> ChannelReply {
    let mut message = status.message().to_owned();
    shorten(&mut message);
    let error = ChannelError { code: i32::from(status.code()), message };
    ChannelReply { reply: Some(Reply::Error(error)) }
}

fn internal() -> Status {
    Status::new(Code::Internal, "the proxy failed while it worked on this; see its log")
}
