//! Channels over TCP, for guests that reach their host by a network only.
//!
//! A connection says first whose it is, by a token that only that VM was given; until then it costs
//! the proxy one place and a little time. From then on it is a channel like any other.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};

use blobcr_proto::channel::{Decoded, Frame, decode};
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{ChannelReply, ChannelRequest, Hello, HelloReply};
use blobcr_proto::{Hash, VmName};
use bytes::BytesMut;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::channel;
use crate::limits::{GREETINGS_MAX, GREETINGS_PER_ADDRESS_MAX, READ_BYTES};
use crate::lines::Lines;
use crate::requests::Backend;
use crate::served::{Served, Vms, connection};

/// A new token, and what is kept of it: whoever reads the record cannot speak for the VM.
pub(crate) fn new_token() -> (String, Hash) {
    let token = Hash(rand::random()).to_string();
    let hash = Hash::of(token.as_bytes());
    (token, hash)
}

/// Listens on an address for the guests of this host.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// How many connections from each address have not said yet whose they are.
#[derive(Clone, Default)]
struct Greetings(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// The place of one of them.
struct Greeting {
    address: IpAddr,
    all: Greetings,
}

impl Greetings {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().expect("nothing panics while it holds this")
    }

    fn place(&self, address: IpAddr) -> Option<Greeting> {
        let mut all = self.lock();
        let here = all.get(&address).copied().unwrap_or(0);
        if here >= GREETINGS_PER_ADDRESS_MAX || all.values().sum::<usize>() >= GREETINGS_MAX {
            return None;
        }
        all.insert(address, here + 1);
        Some(Greeting { address, all: self.clone() })
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        match all.get(&self.address).copied() {
            Some(here) if here > 1 => drop(all.insert(self.address, here - 1)),
            _ => drop(all.remove(&self.address)),
        }
    }
}

/// The listener for all VMs that have a token.
pub(crate) struct Guests {
    pub(crate) backend: Arc<Backend>,
    pub(crate) vms: Vms,
    pub(crate) tasks: TaskTracker,
    pub(crate) closing: CancellationToken,
    /// About those that have not said whose they are.
    pub(crate) lines: Lines,
}

impl Guests {
    fn may_log(&self) -> bool {
        self.lines.allow("connections over TCP")
    }

    pub(crate) async fn accept(self, listener: TcpListener) {
        let guests = Arc::new(self);
        let greetings = Greetings::default();
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection over TCP");
                    tokio::time::sleep(guests.backend.limits.rest).await;
                    continue;
                }
            };
            let Some(greeting) = greetings.place(peer.ip()) else {
                if guests.may_log() {
                    tracing::warn!(%peer, "too many connections that have not said whose they are");
                }
                continue;
            };
            let (ended, serving) = (guests.closing.clone(), Arc::clone(&guests));
            guests.tasks.spawn(async move {
                ended
                    .run_until_cancelled(async move {
                        let greeted = serving.greet(stream, peer).await;
                        drop(greeting);
                        if let Some((served, stream, rest)) = greeted {
                            serving.serve(&served, stream, rest).await;
                        }
                    })
                    .await
            });
        }
    }

    /// Finds whose the connection is. One that does not say so in time, or says it wrongly, ends.
    async fn greet(
        &self,
        mut stream: TcpStream,
        peer: SocketAddr,
    ) -> Option<(Served, TcpStream, BytesMut)> {
        // A request and its answer are one small write each.
        let _ = stream.set_nodelay(true);
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        let limits = &self.backend.limits;
        let frame = match timeout(limits.frame, first_frame(&mut stream, &mut buffer)).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None) | Err(_)) => return None,
            Err(_) => {
                if self.may_log() {
                    tracing::warn!(%peer, "did not say in time whose connection it is");
                }
                return None;
            }
        };
        let found = self.find(&frame);
        let reply = match &found {
            Ok(served) => {
                let vm = served.vm.name().to_string();
                ChannelReply { reply: Some(Reply::Hello(HelloReply { vm })) }
            }
            Err(status) => {
                if self.may_log() {
                    tracing::warn!(%peer, error = status.message(), "connection over TCP refused");
                }
                // Whoever guesses is to have little of it.
                tokio::time::sleep(limits.rest).await;
                channel::refusal(status)
            }
        };
        let mut bytes = BytesMut::new();
        Frame { request_id: frame.request_id, body: reply.encode_to_vec().into() }
            .encode(&mut bytes)
            .expect("a greeting is far shorter than a frame may be");
        match timeout(limits.write, stream.write_all(&bytes)).await {
            Ok(Ok(())) => Some((found.ok()?, stream, buffer)),
            Ok(Err(_)) | Err(_) => None,
        }
    }

    fn find(&self, frame: &Frame) -> Result<Served, Status> {
        let request = ChannelRequest::decode(frame.body.clone()).ok().and_then(|r| r.request);
        let Some(Request::Hello(Hello { vm, token })) = request else {
            return Err(Status::unauthenticated(
                "the first request on a connection over TCP says whose it is",
            ));
        };
        // One answer for all that is wrong, so that nobody learns which VMs there are.
        let refused = || Status::unauthenticated("there is no such VM, or this is not its token");
        let name = VmName::new(vm).map_err(|_| refused())?;
        let served = self.vms.get(&name).ok_or_else(refused)?;
        let known = served.vm.record.token.as_ref();
        if known.is_some_and(|known| *known == Hash::of(token.as_bytes())) {
            return Ok(served);
        }
        Err(refused())
    }

    async fn serve(&self, served: &Served, stream: TcpStream, buffer: BytesMut) {
        let Some(_place) = served.place() else { return };
        let (backend, vm) = (Arc::clone(&self.backend), Arc::clone(&served.vm));
        served.stop.run_until_cancelled(connection(backend, vm, stream, buffer)).await;
    }
}

/// The first frame of a connection; `None` when it ends before, or begins with anything else.
async fn first_frame(stream: &mut TcpStream, buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
    loop {
        match decode(buffer) {
            Decoded::Frame(frame) => return Ok(Some(frame)),
            Decoded::Skipped(_) => return Ok(None),
            Decoded::Incomplete => {}
        }
        buffer.reserve(READ_BYTES);
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}
