//! The two ends of a connection.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::transport::server::Connected;

use super::Net;
use crate::trace::{FNV_BEGIN, fnv};

/// Bytes under way in one direction; who has more to send waits, as with TCP.
const WINDOW_BYTES: usize = 1 << 20;

/// What becomes of one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Open,
    /// From then on everything fails.
    Reset(Instant),
    /// Nothing comes, and what is sent is lost.
    Silent,
}

/// One direction.
#[derive(Debug, Default)]
struct Pipe {
    queue: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    last: Option<Instant>,
    /// Nothing follows what is in the queue.
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn wake(&mut self) {
        [self.reader.take(), self.writer.take()].into_iter().flatten().for_each(Waker::wake);
    }
}

#[derive(Debug)]
struct Ends {
    /// `pipes[side]` is written by that side.
    pipes: [Pipe; 2],
    fates: [Fate; 2],
}

/// A connection.
#[derive(Debug)]
pub(super) struct Wire {
    number: u64,
    hosts: [String; 2],
    ends: Mutex<Ends>,
}

impl Wire {
    pub(super) fn new(number: u64, from: &str, to: &str) -> Self {
        let ends = Ends { pipes: Default::default(), fates: [Fate::Open; 2] };
        Self { number, hosts: [from.to_owned(), to.to_owned()], ends: Mutex::new(ends) }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One host is gone.
    pub(super) fn kill(&self, host: &str, others: Fate) {
        let mut ends = self.ends();
        for side in 0..2 {
            if self.hosts[side] == host {
                ends.fates[side] = Fate::Reset(Instant::now());
                if ends.fates[1 - side] == Fate::Open {
                    ends.fates[1 - side] = others;
                }
            }
        }
        ends.pipes.iter_mut().for_each(Pipe::wake);
    }

    pub(super) fn wake(&self) {
        self.ends().pipes.iter_mut().for_each(Pipe::wake);
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Stream {
    wire: Arc<Wire>,
    side: usize,
    net: Net,
    timer: Pin<Box<Sleep>>,
}

impl Stream {
    pub(super) fn new(wire: Arc<Wire>, side: usize, net: Net) -> Self {
        Self { wire, side, net, timer: Box::pin(sleep_until(Instant::now())) }
    }

    /// Wakes this end at `time`; ready when that has come.
    fn until(&mut self, time: Instant, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= time {
            return Poll::Ready(());
        }
        self.timer.as_mut().reset(time);
        self.timer.as_mut().poll(context)
    }

    /// The error that this end has by now; otherwise, whether it hears nothing any more.
    fn fate(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        let fate = self.wire.ends().fates[self.side];
        match fate {
            Fate::Open => Ok(false),
            Fate::Silent => Ok(true),
            Fate::Reset(at) => match self.until(at, context) {
                Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
                Poll::Pending => Ok(true),
            },
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let silent = this.fate(context)?;
        let wire = Arc::clone(&this.wire);
        let (from, to) = (&wire.hosts[1 - this.side], &wire.hosts[this.side]);
        let cut = this.net.is_cut(from, to);
        let mut ends = wire.ends();
        let pipe = &mut ends.pipes[1 - this.side];
        pipe.reader = Some(context.waker().clone());
        if silent || cut {
            return Poll::Pending;
        }
        let Some((due, _)) = pipe.queue.front() else {
            return if pipe.ended { Poll::Ready(Ok(())) } else { Poll::Pending };
        };
        ready!(this.until(*due, context));
        let Some((_, bytes)) = pipe.queue.front_mut() else { return Poll::Pending };
        let len = bytes.len().min(out.remaining());
        let sum = fnv(FNV_BEGIN, &bytes[..len]);
        this.net.trace.note(format_args!("net: {from} to {to} #{} {len} {sum:016x}", wire.number));
        out.put_slice(&bytes[..len]);
        bytes.advance(len);
        if bytes.is_empty() {
            pipe.queue.pop_front();
        }
        pipe.bytes -= len;
        if let Some(writer) = pipe.writer.take() {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.fate(context)? {
            return Poll::Ready(Ok(bytes.len()));
        }
        let (from, to) = (&this.wire.hosts[this.side], &this.wire.hosts[1 - this.side]);
        let mut due = Instant::now() + this.net.delay(from, to);
        let mut ends = this.wire.ends();
        let pipe = &mut ends.pipes[this.side];
        if pipe.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if pipe.bytes >= WINDOW_BYTES {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        due = pipe.last.map_or(due, |last| due.max(last));
        pipe.last = Some(due);
        pipe.bytes += bytes.len();
        pipe.queue.push_back((due, Bytes::copy_from_slice(bytes)));
        if let Some(reader) = pipe.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ends = self.wire.ends();
        let pipe = &mut ends.pipes[self.side];
        pipe.ended = true;
        pipe.wake();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut ends = self.wire.ends();
        // Nothing more comes from here, and nobody reads what comes here.
        ends.pipes.iter_mut().for_each(|pipe| {
            pipe.ended = true;
            pipe.wake();
        });
    }
}

impl Connected for Stream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
