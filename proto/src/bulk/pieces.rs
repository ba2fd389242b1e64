//! A message on its way out, in pieces.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::buf::UninitSlice;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::Message;
use tonic::codegen::http::{HeaderMap, HeaderValue};
use tonic::{Code, Status};

use super::PREFIX_BYTES;

/// A payload up to this size is copied to what is around it: a frame of its own would cost more.
const COPIED_BYTES_MAX: usize = 16 << 10;

/// `message` as gRPC frames it, but for HTTP/2: its large payloads as they are, and what is between
/// them.
pub(super) fn pieces(message: &impl Message) -> Result<VecDeque<Bytes>, Status> {
    let len = message.encoded_len();
    let prefix = u32::try_from(len).map_err(|_| {
        Status::resource_exhausted(format!("a message of {len} bytes is too large"))
    })?;
    let mut out = Pieces::default();
    out.put_u8(0);
    out.put_u32(prefix);
    debug_assert_eq!(out.between.len(), PREFIX_BYTES);
    message.encode(&mut out).map_err(|error| Status::internal(error.to_string()))?;
    Ok(out.finish())
}

/// Takes large `Bytes` as they are.
#[derive(Default)]
struct Pieces {
    done: VecDeque<Bytes>,
    between: BytesMut,
}

impl Pieces {
    /// Ends the piece that is being written.
    fn cut(&mut self) {
        if !self.between.is_empty() {
            self.done.push_back(self.between.split().freeze());
        }
    }

    fn finish(mut self) -> VecDeque<Bytes> {
        self.cut();
        self.done
    }
}

// SAFETY: what is promised of the memory at the end is what `BytesMut` promises, which does it all.
unsafe impl BufMut for Pieces {
    fn remaining_mut(&self) -> usize {
        self.between.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller wrote so many bytes to `chunk_mut()`, which is that of `between`.
        unsafe { self.between.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.between.chunk_mut()
    }

    fn put<T: Buf>(&mut self, mut source: T) {
        let len = source.remaining();
        if len <= COPIED_BYTES_MAX {
            self.between.put(source);
        } else {
            self.cut();
            // No copy where the source is `Bytes`, as payloads are.
            self.done.push_back(source.copy_to_bytes(len));
        }
    }
}

/// What is sent: pieces, and behind an answer that all went well.
pub(super) struct Outgoing {
    pub(super) pieces: VecDeque<Bytes>,
    pub(super) trailers: Option<HeaderMap>,
}

impl Outgoing {
    pub(super) fn request(message: &impl Message) -> Result<Self, Status> {
        Ok(Self { pieces: pieces(message)?, trailers: None })
    }

    pub(super) fn answer(message: &impl Message) -> Result<Self, Status> {
        let mut trailers = HeaderMap::with_capacity(1);
        trailers.insert(Status::GRPC_STATUS, HeaderValue::from(Code::Ok as i32));
        Ok(Self { pieces: pieces(message)?, trailers: Some(trailers) })
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match self.pieces.pop_front() {
            Some(piece) => Some(Frame::data(piece)),
            None => self.trailers.take().map(Frame::trailers),
        };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty() && self.trailers.is_none()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::v1;

    fn request(payloads: &[Bytes]) -> v1::PutRequest {
        let record = |payload: &Bytes| v1::Record {
            plain_len: payload.len() as u32,
            payload: payload.clone(),
            ..v1::Record::default()
        };
        let records = payloads.iter().map(record).collect();
        v1::PutRequest { pool: 1, generation: 2, records, table_version: 3 }
    }

    fn payload(len: usize) -> Bytes {
        (0..len).map(|n| n as u8).collect()
    }

    #[test]
    fn together_they_are_what_grpc_has() {
        for lens in
            [&[][..], &[0], &[1, 100_000, 0, 100_000], &[100_000, 100_000, 20, 16_384, 16_385]]
        {
            let payloads: Vec<_> = lens.iter().map(|len| payload(*len)).collect();
            let message = request(&payloads);
            let sent: Vec<u8> = pieces(&message).unwrap().into_iter().flatten().collect();
            let bytes = message.encode_to_vec();
            let prefix = [&[0][..], &(bytes.len() as u32).to_be_bytes()].concat();
            assert!(sent == [prefix, bytes].concat(), "{lens:?}");
        }
    }

    #[test]
    fn a_large_payload_is_not_copied() {
        let payloads = [payload(100_000), payload(10), payload(300_000)];
        let sent = pieces(&request(&payloads)).unwrap();
        assert_eq!(sent.len(), 5);
        assert_eq!(sent[1].as_ptr(), payloads[0].as_ptr());
        assert_eq!(sent[3].as_ptr(), payloads[2].as_ptr());
    }
}
