//! A message that came in, where the frames of the connection lie.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body::Body;
use prost::Message;
use tonic::Status;
use tonic::codegen::StdError;
use tonic::codegen::http::HeaderMap;

use super::PREFIX_BYTES;
use crate::MESSAGE_BYTES_MAX;

/// What one side of a call sent: at most one message, and what came behind it.
#[derive(Debug, Default)]
pub(super) struct Received {
    message: Option<Pieces>,
    pub(super) trailers: HeaderMap,
}

impl Received {
    /// Takes in all of `body`. What is too long, compressed, cut off or more than a message is an
    /// error; nothing longer than [`MESSAGE_BYTES_MAX`] is held.
    pub(super) async fn all_of<B>(body: B) -> Result<Self, Status>
    where
        B: Body<Data = Bytes, Error: Into<StdError>>,
    {
        let mut body = pin!(body);
        let mut received = Self::default();
        let mut pieces = Pieces::default();
        let mut len = None;
        while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            let frame = frame.map_err(|error| Status::from_error(error.into()))?;
            match frame.into_data() {
                Ok(data) => pieces.push(data),
                Err(frame) => received.trailers.extend(frame.into_trailers().unwrap_or_default()),
            }
            if len.is_none() && pieces.remaining() >= PREFIX_BYTES {
                len = Some(message_len(&mut pieces)?);
            }
            if len.is_some_and(|len| pieces.remaining() > len) {
                return Err(Status::internal("more than one message where one is expected"));
            }
        }
        if pieces.remaining() < len.unwrap_or_default() || len.is_none() && pieces.has_remaining() {
            return Err(Status::internal("the stream ended within a message"));
        }
        received.message = len.map(|_| pieces);
        Ok(received)
    }

    /// The message. Its payloads are slices of the frames that they came in; only one that came in
    /// several is copied.
    pub(super) fn message<M: Message + Default>(self) -> Result<M, Status> {
        let pieces = self.message.ok_or_else(|| Status::internal("there is no message"))?;
        M::decode(pieces).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Takes off what is before a message.
fn message_len(pieces: &mut Pieces) -> Result<usize, Status> {
    if pieces.get_u8() != 0 {
        return Err(Status::unimplemented("a compressed message: send it plain"));
    }
    let len = pieces.get_u32() as usize;
    if len > MESSAGE_BYTES_MAX {
        return Err(Status::out_of_range(format!(
            "a message of {len} bytes, more than {MESSAGE_BYTES_MAX}"
        )));
    }
    Ok(len)
}

/// Bytes that follow each other; no piece is empty.
#[derive(Debug, Default)]
struct Pieces {
    pieces: VecDeque<Bytes>,
    remaining: usize,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.remaining += piece.len();
            self.pieces.push_back(piece);
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.remaining, "{count} of {} bytes", self.remaining);
        self.remaining -= count;
        while let Some(front) = self.pieces.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        assert!(len <= self.remaining, "{len} of {} bytes", self.remaining);
        match self.pieces.front_mut() {
            Some(front) if front.len() >= len => {
                let bytes = front.slice(..len);
                self.advance(len);
                bytes
            }
            _ => {
                let mut bytes = BytesMut::with_capacity(len);
                bytes.put(self.take(len));
                bytes.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll};

    use proptest::prelude::*;
    use tonic::Code;

    use super::super::pieces::{Outgoing, pieces};
    use super::*;
    use crate::v1;

    fn receive(frames: impl IntoIterator<Item = Bytes>) -> Result<v1::GetResponse, Status> {
        let pieces = frames.into_iter().collect();
        let mut all = pin!(Received::all_of(Outgoing { pieces, trailers: None }));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match all.as_mut().poll(&mut cx) {
            Poll::Ready(received) => received?.message(),
            Poll::Pending => unreachable!("all frames are here"),
        }
    }

    fn response(lens: &[usize]) -> v1::GetResponse {
        let found = |len: &usize| v1::Found {
            record: (*len > 0).then(|| v1::Record {
                plain_len: *len as u32,
                payload: (0..*len).map(|n| n as u8).collect(),
                ..v1::Record::default()
            }),
            damaged: *len == 0,
        };
        v1::GetResponse { found: lens.iter().map(found).collect(), newest_table: 7 }
    }

    fn sent(message: &v1::GetResponse) -> Bytes {
        pieces(message).unwrap().into_iter().flatten().collect()
    }

    proptest! {
        /// However the connection cuts it.
        #[test]
        fn what_is_sent_is_received(
            lens in prop::collection::vec(prop_oneof![0_usize..200, 16_000_usize..40_000], 0..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            from_begin in prop::collection::vec(0_usize..12, 0..4),
        ) {
            let message = response(&lens);
            let bytes = sent(&message);
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend(from_begin.iter().map(|at| (*at).min(bytes.len())));
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let frames = cuts.windows(2).map(|ends| bytes.slice(ends[0]..ends[1]));
            prop_assert!(receive(frames).unwrap() == message);
        }

        #[test]
        fn what_is_not_whole_is_refused(lens in prop::collection::vec(0_usize..200, 0..6), at: prop::sample::Index) {
            let bytes = sent(&response(&lens));
            let status = receive([bytes.slice(..at.index(bytes.len()))]).unwrap_err();
            prop_assert_eq!(status.code(), Code::Internal);
        }

        #[test]
        fn garbage_is_an_error_or_a_message(bytes: Vec<u8>) {
            let mut framed = vec![0];
            framed.extend((bytes.len() as u32).to_be_bytes());
            framed.extend(&bytes);
            let prost = v1::GetResponse::decode(&bytes[..]).ok();
            prop_assert_eq!(receive([framed.into()]).ok(), prost);
            let _refused_or_not = receive([bytes.into()]);
        }
    }

    #[test]
    fn a_payload_in_one_frame_is_not_copied() {
        let message = response(&[100_000, 20_000, 50]);
        let frames = pieces(&message).unwrap();
        let places: Vec<_> = [1, 3].iter().map(|at| frames[*at].as_ptr()).collect();
        let received = receive(frames).unwrap();
        assert_eq!(received, message);
        let payload = |at: usize| received.found[at].record.as_ref().unwrap().payload.as_ptr();
        assert_eq!([payload(0), payload(1)], places[..]);
    }

    #[test]
    fn what_is_no_single_plain_message_is_refused() {
        let good = sent(&response(&[10]));
        let more = [&good[..], &[0]].concat();
        let compressed = [&[1], &good[1..]].concat();
        let long = [&[0][..], &(MESSAGE_BYTES_MAX as u32 + 1).to_be_bytes()].concat();
        let code = |bytes: Vec<u8>| receive([Bytes::from(bytes)]).unwrap_err().code();
        assert_eq!(code(more), Code::Internal);
        assert_eq!(code(compressed), Code::Unimplemented);
        assert_eq!(code(long), Code::OutOfRange);
        assert_eq!(receive([]).unwrap_err().code(), Code::Internal);
    }
}
