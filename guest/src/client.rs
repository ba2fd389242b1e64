//! The requests of a guest.
//!
//! A request is one frame with an id of its own. It is sent again whenever the host end went away
//! and came back, and now and then while no answer comes (what was written while nobody was there
//! is lost without notice). The host tells a repeated request by its id and a repeated CHECKPOINT by
//! its idempotency key, so sending again never does anything twice.

use std::time::Duration;

use blobcr_proto::channel::{BODY_BYTES_MAX, Decoded, Frame, decode};
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{
    BeginVmSetRequest, ChannelReply, ChannelRequest, CheckpointReply, CheckpointRequest,
    DiskSnapshot, Hello, SetMembership, Snapshot, SnapshotState, VmSet, VmSetStatusRequest,
    VmStatusReply, VmStatusRequest, WaitStableRequest,
};
use bytes::BytesMut;
use prost::Message;
use rustix::io::Errno;

use crate::deadline::Deadline;
use crate::error::GuestError;
use crate::link::{Link, Moved};
use crate::target::Target;

/// Until a request is sent again though nothing seems wrong; doubles up to [`RESEND_MAX`].
const RESEND_FIRST: Duration = Duration::from_millis(500);
const RESEND_MAX: Duration = Duration::from_secs(5);
/// After a connection that the host ended; doubles up to [`AGAIN_MAX`]. Where the hypervisor forwards an
/// address, each one costs it a process, also while there is no proxy behind it.
const AGAIN_FIRST: Duration = Duration::from_millis(20);
const AGAIN_MAX: Duration = Duration::from_millis(500);
/// A wait asks again and again and leaves the port to other programs in between: a CHECKPOINT must
/// not stand in line behind it. The pause grows by half, so a wait is late by half of its length.
const WAIT_PAUSE_FIRST: Duration = Duration::from_millis(5);
const WAIT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Each question of a wait is given at least this, however little is left of the wait itself.
const WAIT_CALL: Duration = Duration::from_secs(1);

/// What a CHECKPOINT is asked with.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Asking again with the same key gives the first answer and no second checkpoint.
    pub key: String,
    /// The checkpoint set that this one belongs to.
    pub set: Option<SetMembership>,
}

impl Ask {
    /// A new checkpoint, which belongs to no set.
    #[must_use]
    pub fn new() -> Self {
        let mut key = [0; 16];
        random(&mut key);
        Self { key: key.iter().map(|b| format!("{b:02x}")).collect(), set: None }
    }
}

impl Default for Ask {
    fn default() -> Self {
        Self::new()
    }
}

fn random(out: &mut [u8]) {
    let mut filled = 0;
    while filled < out.len() {
        match rustix::rand::getrandom(&mut out[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(bytes) => filled += bytes,
            Err(Errno::INTR) => {}
            Err(error) => unreachable!("every Linux since 3.17 gives random bytes: {error}"),
        }
    }
}

/// Asks the host.
#[derive(Clone, Debug)]
pub struct Client {
    target: Target,
}

impl Client {
    /// A client that opens the way to the host for each request.
    #[must_use]
    pub fn new(target: Target) -> Self {
        Self { target }
    }

    /// Asks for a CHECKPOINT of all disks of this VM. Returns as soon as the guest may go on; the
    /// snapshots are pending then. What has to be in them must be on the disks before: see
    /// [`crate::flush`].
    ///
    /// # Errors
    /// When there is no way to the host, the host refuses, or it does not answer in time. In the
    /// last case the checkpoint may have been taken: ask again with the same key.
    pub fn checkpoint(&self, ask: &Ask, deadline: Deadline) -> Result<CheckpointReply, GuestError> {
        let request = Request::Checkpoint(CheckpointRequest {
            vm: String::new(),
            set: ask.set.clone(),
            idempotency_key: ask.key.clone(),
        });
        match self.call(request, deadline)? {
            Reply::Checkpoint(reply) => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until the snapshots are stable; without any, until those of the newest checkpoint are.
    ///
    /// # Errors
    /// When one of them is lost, the host refuses, or they are not stable in time.
    pub fn wait_stable(
        &self,
        snapshots: &[DiskSnapshot],
        deadline: Deadline,
    ) -> Result<Vec<Snapshot>, GuestError> {
        let mut pause = WAIT_PAUSE_FIRST;
        loop {
            let request = Request::WaitStable(WaitStableRequest {
                vm: String::new(),
                snapshots: snapshots.to_vec(),
                // No more than a look: zero would be the host's own choice.
                timeout_ms: 1,
            });
            let state = match self.call(request, Deadline::after(deadline.left().max(WAIT_CALL))) {
                Ok(Reply::WaitStable(reply)) => {
                    if let Some(done) = settled(reply.snapshots)? {
                        return Ok(done);
                    }
                    "it is pending".to_owned()
                }
                Ok(other) => return Err(unexpected(&other)),
                Err(error) if error.is_not_yet() => error.to_string(),
                Err(error) => return Err(error),
            };
            if deadline.is_over() {
                return Err(GuestError::NotYet { state });
            }
            std::thread::sleep(pause.min(deadline.left()));
            pause = (pause * 3 / 2).min(WAIT_PAUSE_MAX);
        }
    }

    /// The disks of this VM as its host sees them.
    ///
    /// # Errors
    /// When there is no way to the host, the host refuses, or it does not answer in time.
    pub fn status(&self, deadline: Deadline) -> Result<VmStatusReply, GuestError> {
        match self.call(Request::Status(VmStatusRequest::default()), deadline)? {
            Reply::Status(reply) => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins a new checkpoint set of a group; an empty group is the VM's only one. Each VM, this
    /// one included, then joins it by a CHECKPOINT that names it.
    ///
    /// # Errors
    /// When there is no way to the host, the host refuses, or it does not answer in time. In the
    /// last case a set may have begun, which nobody will join: begin another one.
    pub fn begin_set(
        &self,
        group: &str,
        expected_vms: u32,
        deadline: Deadline,
    ) -> Result<VmSet, GuestError> {
        let request =
            BeginVmSetRequest { vm: String::new(), group: group.to_owned(), expected_vms };
        match self.call(Request::BeginSet(request), deadline)? {
            Reply::BeginSet(set) => Ok(set),
            other => Err(unexpected(&other)),
        }
    }

    /// A set of a group; the sequence 0 is the newest that is complete and stable.
    ///
    /// # Errors
    /// When there is no way to the host, the host refuses, or it does not answer in time.
    pub fn set_status(
        &self,
        group: &str,
        sequence: u64,
        deadline: Deadline,
    ) -> Result<VmSet, GuestError> {
        let request = VmSetStatusRequest { vm: String::new(), group: group.to_owned(), sequence };
        match self.call(Request::SetStatus(request), deadline)? {
            Reply::SetStatus(set) => Ok(set),
            other => Err(unexpected(&other)),
        }
    }

    fn call(&self, request: Request, deadline: Deadline) -> Result<Reply, GuestError> {
        let frame = Sent::new(request)?;
        let mut link = self.target.open(deadline)?;
        let body = exchange(&mut link, &frame, deadline)?;
        answer(body)
    }
}

/// A request as it goes over the way, as often as it must.
struct Sent {
    id: u64,
    bytes: BytesMut,
}

impl Sent {
    fn new(request: Request) -> Result<Self, GuestError> {
        let mut id = [0; 8];
        random(&mut id);
        let id = u64::from_le_bytes(id);
        let body = ChannelRequest { request: Some(request) }.encode_to_vec().into();
        let mut bytes = BytesMut::new();
        Frame { request_id: id, body }
            .encode(&mut bytes)
            .map_err(|e| GuestError::Usage(format!("the request cannot be sent: {e}")))?;
        Ok(Self { id, bytes })
    }
}

fn answer(body: bytes::Bytes) -> Result<Reply, GuestError> {
    let reply = ChannelReply::decode(body).map_err(|e| GuestError::BadAnswer(e.to_string()))?;
    match reply.reply {
        Some(Reply::Error(e)) => Err(GuestError::Refused { code: e.code, message: e.message }),
        Some(reply) => Ok(reply),
        None => Err(GuestError::BadAnswer("it is empty".to_owned())),
    }
}

/// Sends the frame until its answer comes.
fn exchange(link: &mut Link, frame: &Sent, deadline: Deadline) -> Result<bytes::Bytes, GuestError> {
    let (mut resend, mut again) = (RESEND_FIRST, AGAIN_FIRST);
    // Kept over a resend: an answer may have begun to arrive.
    let mut buffer = BytesMut::new();
    while !deadline.is_over() && link.ready(deadline)? {
        // A refusal comes late on purpose, and asking again meanwhile would only be refused again.
        let greeted = greet(link, &mut buffer, deadline.or_after(RESEND_MAX))?;
        let until = deadline.or_after(resend);
        if greeted
            && send(link, &frame.bytes, until)?
            && let Some(body) = receive(link, frame.id, &mut buffer, until)?
        {
            return Ok(body);
        }
        if until.is_over() {
            resend = (resend * 2).min(RESEND_MAX);
        } else {
            std::thread::sleep(again.min(deadline.left()));
            again = (again * 2).min(AGAIN_MAX);
        }
    }
    Err(GuestError::NoAnswer { state: link.state() })
}

/// Whether the host knows whose connection this is, and will answer.
fn greet(link: &mut Link, buffer: &mut BytesMut, until: Deadline) -> Result<bool, GuestError> {
    let Some(credentials) = link.greeting() else { return Ok(true) };
    let (vm, token) = (credentials.vm.clone(), credentials.token.clone());
    let hello = Sent::new(Request::Hello(Hello { vm, token }))?;
    // Nothing of an earlier connection goes on in this one.
    buffer.clear();
    if send(link, &hello.bytes, until)?
        && let Some(body) = receive(link, hello.id, buffer, until)?
    {
        return match answer(body)? {
            Reply::Hello(_) => {
                link.greeted();
                Ok(true)
            }
            other => Err(unexpected(&other)),
        };
    }
    // It comes first on a connection, so it is said again on another one only.
    link.gone();
    Ok(false)
}

/// Whether all of the frame was written.
fn send(link: &mut Link, frame: &[u8], until: Deadline) -> Result<bool, GuestError> {
    let mut rest = frame;
    while !rest.is_empty() {
        match link.write(rest, until)? {
            Moved::Bytes(bytes) => rest = &rest[bytes..],
            Moved::Nothing | Moved::Gone => return Ok(false),
        }
    }
    Ok(true)
}

/// The body of the answer; `None` when it does not come like this.
fn receive(
    link: &mut Link,
    request_id: u64,
    buffer: &mut BytesMut,
    until: Deadline,
) -> Result<Option<bytes::Bytes>, GuestError> {
    let mut piece = vec![0; BODY_BYTES_MAX];
    loop {
        match link.read(&mut piece, until)? {
            Moved::Bytes(bytes) => buffer.extend_from_slice(&piece[..bytes]),
            Moved::Nothing => return Ok(None),
            Moved::Gone => {
                // The rest of a half answer will not come any more.
                buffer.clear();
                return Ok(None);
            }
        }
        loop {
            match decode(buffer) {
                Decoded::Frame(frame) if frame.request_id == request_id => {
                    return Ok(Some(frame.body));
                }
                // An answer to a program that did not wait for it.
                Decoded::Frame(_) | Decoded::Skipped(_) => {}
                Decoded::Incomplete => break,
            }
        }
    }
}

/// The snapshots, when none of them is pending.
fn settled(snapshots: Vec<Snapshot>) -> Result<Option<Vec<Snapshot>>, GuestError> {
    for snapshot in &snapshots {
        match snapshot.state() {
            SnapshotState::Stable => {}
            SnapshotState::Pending => return Ok(None),
            state => {
                let reason = match snapshot.reason.as_str() {
                    "" => format!("it is {}", crate::report::state_name(state)),
                    reason => reason.to_owned(),
                };
                return Err(GuestError::Lost {
                    image: snapshot.image.clone(),
                    number: snapshot.number,
                    reason,
                });
            }
        }
    }
    Ok(Some(snapshots))
}

fn unexpected(reply: &Reply) -> GuestError {
    let kind = match reply {
        Reply::Error(_) => "an error",
        Reply::Checkpoint(_) => "a checkpoint",
        Reply::WaitStable(_) => "a wait",
        Reply::Status(_) => "a status",
        Reply::BeginSet(_) => "a new set",
        Reply::SetStatus(_) => "a set's status",
        Reply::Hello(_) => "a greeting",
    };
    GuestError::BadAnswer(format!("it is of {kind}, which was not asked for"))
}
