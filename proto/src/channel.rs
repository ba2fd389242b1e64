//! Frames of a VM's checkpoint channel.
//!
//! A channel is one byte stream whose ends come and go (a guest reboots, the host's proxy
//! restarts), so every frame can be found again in a stream that begins in the middle of one:
//!
//! ```text
//! offset  bytes
//!      0      4  magic "BCKF"
//!      4      1  version, 1
//!      5      3  zero
//!      8      8  request id, little endian: a reply carries that of its request
//!     16      4  length of the body, at most 64 KiB
//!     20      4  CRC-32C of bytes 0..20 and of the body
//!     24      …  body: a ChannelRequest or a ChannelReply
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The longest body: a request is tiny, a reply names at most a few hundred disks.
pub const BODY_BYTES_MAX: usize = 64 << 10;
const HEADER_BYTES: usize = 24;
const MAGIC: [u8; 4] = *b"BCKF";
const VERSION: u8 = 1;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Ties a reply to its request.
    pub request_id: u64,
    /// An encoded `ChannelRequest` or `ChannelReply`.
    pub body: Bytes,
}

/// A body longer than [`BODY_BYTES_MAX`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes is longer than the {BODY_BYTES_MAX} that a channel carries")]
pub struct FrameTooLong(pub usize);

fn crc(header: &[u8], body: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(header);
    digest.update(body);
    digest.finalize() as u32
}

impl Frame {
    /// Appends the frame's bytes to `out`.
    ///
    /// # Errors
    /// When the body is too long for a channel.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), FrameTooLong> {
        if self.body.len() > BODY_BYTES_MAX {
            return Err(FrameTooLong(self.body.len()));
        }
        let mut header = [0u8; 20];
        {
            let mut at = &mut header[..];
            at.put_slice(&MAGIC);
            at.put_slice(&[VERSION, 0, 0, 0]);
            at.put_u64_le(self.request_id);
            at.put_u32_le(self.body.len() as u32);
        }
        out.reserve(HEADER_BYTES + self.body.len());
        out.put_slice(&header);
        out.put_u32_le(crc(&header, &self.body));
        out.put_slice(&self.body);
        Ok(())
    }
}

/// What [`decode`] found at the head of the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A whole frame, removed from the buffer.
    Frame(Frame),
    /// Nothing whole yet: read more.
    Incomplete,
    /// So many bytes were no part of a frame and were skipped: call again.
    Skipped(usize),
}

/// Takes the next frame from `buffer`. Bytes that belong to no frame are skipped up to the next
/// magic, so a stream that was cut in the middle of a frame heals by itself.
pub fn decode(buffer: &mut BytesMut) -> Decoded {
    let start = buffer.windows(MAGIC.len()).position(|window| window == MAGIC);
    match start {
        None if buffer.len() < MAGIC.len() => return Decoded::Incomplete,
        None => {
            let skipped = buffer.len() - (MAGIC.len() - 1);
            buffer.advance(skipped);
            return Decoded::Skipped(skipped);
        }
        Some(0) => {}
        Some(skipped) => {
            buffer.advance(skipped);
            return Decoded::Skipped(skipped);
        }
    }
    if buffer.len() < HEADER_BYTES {
        return Decoded::Incomplete;
    }
    let mut header = &buffer[4..HEADER_BYTES];
    let version = header.get_u8();
    let reserved = header.get_uint(3);
    let request_id = header.get_u64_le();
    let len = header.get_u32_le() as usize;
    let expected = header.get_u32_le();
    if version != VERSION || reserved != 0 || len > BODY_BYTES_MAX {
        buffer.advance(1);
        return Decoded::Skipped(1);
    }
    if buffer.len() < HEADER_BYTES + len {
        return Decoded::Incomplete;
    }
    if crc(&buffer[..20], &buffer[HEADER_BYTES..HEADER_BYTES + len]) != expected {
        buffer.advance(1);
        return Decoded::Skipped(1);
    }
    buffer.advance(HEADER_BYTES);
    Decoded::Frame(Frame { request_id, body: buffer.split_to(len).freeze() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(mut buffer: BytesMut) -> Vec<Frame> {
        let mut found = Vec::new();
        loop {
            match decode(&mut buffer) {
                Decoded::Frame(frame) => found.push(frame),
                Decoded::Skipped(n) => assert!(n > 0),
                Decoded::Incomplete => return found,
            }
        }
    }

    #[test]
    fn golden_frame_of_version_1() {
        let mut out = BytesMut::new();
        Frame { request_id: 7, body: Bytes::from_static(b"hi") }.encode(&mut out).unwrap();
        assert_eq!(
            out.iter().map(|b| format!("{b:02x}")).collect::<String>(),
            include_str!("../golden/frame-v1.hex").trim()
        );
    }

    #[test]
    fn a_frame_whose_reserved_bytes_are_set_is_none() {
        let mut bytes = BytesMut::new();
        Frame { request_id: 7, body: Bytes::from_static(b"hi") }.encode(&mut bytes).unwrap();
        bytes[6] = 1;
        let sum = crc(&bytes[..20], b"hi").to_le_bytes();
        bytes[20..HEADER_BYTES].copy_from_slice(&sum);
        assert_eq!(decode(&mut bytes), Decoded::Skipped(1));
    }

    #[test]
    fn a_body_too_long_is_refused() {
        let body = Bytes::from(vec![0; BODY_BYTES_MAX + 1]);
        assert!(Frame { request_id: 1, body }.encode(&mut BytesMut::new()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn a_stream_cut_in_the_middle_heals(
            cut in 0usize..60, junk in proptest::collection::vec(0u8..=255, 0..40),
        ) {
            let first = Frame { request_id: 1, body: Bytes::from_static(b"the first one, which is cut") };
            let second = Frame { request_id: 2, body: Bytes::from_static(b"second") };
            let mut whole = BytesMut::new();
            first.encode(&mut whole).unwrap();
            let mut stream = BytesMut::from(&whole[cut.min(whole.len())..]);
            // Junk that holds no magic of its own.
            stream.extend(junk.iter().filter(|b| **b != b'B'));
            second.encode(&mut stream).unwrap();
            second.encode(&mut stream).unwrap();
            let found = frames(stream);
            proptest::prop_assert!(found.ends_with(&[second.clone(), second]));
        }

        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(0u8..=255, 0..200)) {
            frames(BytesMut::from(&bytes[..]));
        }
    }
}
