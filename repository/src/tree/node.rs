//! The encoding of a tree node.
//!
//! ```text
//! offset  bytes
//!      0      4  magic "BCTN"
//!      4      1  version, 1
//!      5      1  level: 0 when the children are chunks
//!      6      1  binary logarithm of the fan-out F, 1 to 10
//!      7      1  binary logarithm of the chunk size, 16 to 22
//!      8    F/8  which children are present: bit i of byte j is child 8j + i; 1 byte when F < 8,
//!                and then the bits from F on are zero
//!      …   32·n  identities of the n ≥ 1 children that are present, in order
//! ```
//!
//! A node carries no checksum: its identity is the BLAKE3 of these bytes, which whoever read them
//! has checked. A node does not say where in the disk it is, so that equal parts of a disk share
//! nodes; but it says how far above the chunks it is, so no node can be its own descendant.

use std::ops::Range;

use blobcr_proto::{ChunkSize, Hash};
use bytes::{BufMut, Bytes, BytesMut};

use super::geometry::{FanOut, Geometry};

const MAGIC: [u8; 4] = *b"BCTN";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 8;

/// Why bytes are not the node that the tree has in their place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// Shorter than a node's header, or longer than its children.
    #[error("it has {actual} bytes instead of {expected}")]
    Length {
        /// What its header and bitmap ask for.
        expected: usize,
        /// What it has.
        actual: usize,
    },
    /// Not the bytes of a tree node at all.
    #[error("it does not begin as a tree node does")]
    Magic,
    /// Written by a later release.
    #[error("its version is {0}; this release reads {VERSION}: upgrade")]
    Version(u8),
    /// It belongs to another level of a tree.
    #[error("it is of level {actual} in the place of one of level {expected}")]
    Level {
        /// What its place in the tree asks for.
        expected: u32,
        /// What it says.
        actual: u8,
    },
    /// It belongs to a tree of another fan-out.
    #[error("its fan-out is 2^{actual} in a tree of {expected}", expected = expected.get())]
    FanOut {
        /// The tree's.
        expected: FanOut,
        /// What it says, as a logarithm.
        actual: u8,
    },
    /// It belongs to a tree over chunks of another size.
    #[error("its chunk size is 2^{actual} in a tree of {expected:?}")]
    ChunkSize {
        /// The tree's.
        expected: ChunkSize,
        /// What it says, as a logarithm.
        actual: u8,
    },
    /// It has children beyond its fan-out.
    #[error("it marks children as present that its fan-out does not have")]
    Bitmap,
    /// It has no child: it must not exist.
    #[error("it has no children")]
    Empty,
    /// It has children beyond the end of the disk.
    #[error("it holds chunk {chunk} of a disk of {chunks}")]
    BeyondEnd {
        /// The first chunk below the child.
        chunk: u64,
        /// How many the disk has.
        chunks: u64,
    },
}

const fn bitmap_bytes(fan_out: FanOut) -> usize {
    fan_out.slots().div_ceil(8)
}

/// Bytes of a node all of whose children are present: the most that a node has.
#[must_use]
pub const fn node_bytes_max(fan_out: FanOut) -> usize {
    HEADER_BYTES + bitmap_bytes(fan_out) + fan_out.slots() * Hash::LEN
}

/// A node, checked and left in its encoded form. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    encoding: Bytes,
    fan_out: FanOut,
}

impl Node {
    /// Checks that `encoding` is a whole node of this geometry and level.
    ///
    /// # Errors
    /// When it is anything else; it may be any bytes.
    pub fn decode(encoding: Bytes, geometry: &Geometry, level: u32) -> Result<Self, NodeError> {
        let fan_out = geometry.fan_out;
        let fixed = HEADER_BYTES + bitmap_bytes(fan_out);
        let Some((header, _)) = encoding.split_first_chunk::<HEADER_BYTES>() else {
            return Err(NodeError::Length { expected: fixed + Hash::LEN, actual: encoding.len() });
        };
        let [m0, m1, m2, m3, version, its_level, fan_out_bits, chunk_bits] = *header;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(NodeError::Magic);
        }
        if version != VERSION {
            return Err(NodeError::Version(version));
        }
        if u32::from(its_level) != level {
            return Err(NodeError::Level { expected: level, actual: its_level });
        }
        if u32::from(fan_out_bits) != fan_out.bits() {
            return Err(NodeError::FanOut { expected: fan_out, actual: fan_out_bits });
        }
        if u32::from(chunk_bits) != geometry.chunk_size.bytes().trailing_zeros() {
            let expected = geometry.chunk_size;
            return Err(NodeError::ChunkSize { expected, actual: chunk_bits });
        }
        let Some(bitmap) = encoding.get(HEADER_BYTES..fixed) else {
            return Err(NodeError::Length { expected: fixed + Hash::LEN, actual: encoding.len() });
        };
        if fan_out.slots() < 8 && bitmap[0] >> fan_out.slots() != 0 {
            return Err(NodeError::Bitmap);
        }
        let children: usize = bitmap.iter().map(|byte| byte.count_ones() as usize).sum();
        if children == 0 {
            return Err(NodeError::Empty);
        }
        let expected = fixed + children * Hash::LEN;
        if encoding.len() != expected {
            return Err(NodeError::Length { expected, actual: encoding.len() });
        }
        Ok(Self { encoding, fan_out })
    }

    /// Encodes a node of `fan_out` children. `None` when all are absent: such a node does not
    /// exist.
    #[must_use]
    pub(super) fn encode(
        geometry: &Geometry,
        level: u32,
        children: &[Option<Hash>],
    ) -> Option<Bytes> {
        debug_assert_eq!(children.len(), geometry.fan_out.slots());
        let present = children.iter().flatten().count();
        if present == 0 {
            return None;
        }
        let fixed = HEADER_BYTES + bitmap_bytes(geometry.fan_out);
        let mut out = BytesMut::with_capacity(fixed + present * Hash::LEN);
        out.put_slice(&MAGIC);
        out.put_u8(VERSION);
        // At most 47 levels, whatever the geometry.
        out.put_u8(level as u8);
        out.put_u8(geometry.fan_out.bits() as u8);
        out.put_u8(geometry.chunk_size.bytes().trailing_zeros() as u8);
        for eight in children.chunks(8) {
            let bits =
                eight.iter().enumerate().map(|(bit, child)| u8::from(child.is_some()) << bit);
            out.put_u8(bits.sum());
        }
        for child in children.iter().flatten() {
            out.put_slice(&child.0);
        }
        Some(out.freeze())
    }

    fn bitmap(&self) -> &[u8] {
        &self.encoding[HEADER_BYTES..HEADER_BYTES + bitmap_bytes(self.fan_out)]
    }

    fn hashes(&self) -> &[[u8; Hash::LEN]] {
        let fixed = HEADER_BYTES + bitmap_bytes(self.fan_out);
        self.encoding[fixed..].as_chunks().0
    }

    fn is_present(&self, slot: usize) -> bool {
        self.bitmap().get(slot / 8).is_some_and(|byte| byte >> (slot % 8) & 1 == 1)
    }

    /// How many children are present before `slot`.
    fn rank(&self, slot: usize) -> usize {
        let (whole, part) = self.bitmap().split_at(slot / 8);
        let within = part.first().map_or(0, |byte| byte & ((1u8 << (slot % 8)) - 1));
        (whole.iter().map(|byte| byte.count_ones()).sum::<u32>() + within.count_ones()) as usize
    }

    /// The identity of child `slot`; `None` when it is absent.
    #[must_use]
    pub fn child(&self, slot: usize) -> Option<Hash> {
        self.is_present(slot).then(|| Hash(self.hashes()[self.rank(slot)]))
    }

    /// The children that are present, in order, each with its slot.
    pub fn children(&self) -> impl Iterator<Item = (usize, Hash)> + '_ {
        self.children_in(0..self.fan_out.slots())
    }

    /// Those of [`Self::children`] that are in some slots.
    pub(super) fn children_in(
        &self,
        slots: Range<usize>,
    ) -> impl Iterator<Item = (usize, Hash)> + '_ {
        let slots = slots.start..slots.end.min(self.fan_out.slots());
        let hashes = &self.hashes()[self.rank(slots.start)..];
        slots.filter(|slot| self.is_present(*slot)).zip(hashes.iter().map(|hash| Hash(*hash)))
    }

    /// The slot of the last child that is present.
    #[must_use]
    pub fn last_slot(&self) -> usize {
        let bitmap = self.bitmap();
        // A node without children does not decode.
        let byte = bitmap.iter().rposition(|byte| *byte != 0).unwrap_or(0);
        byte * 8 + bitmap[byte].checked_ilog2().unwrap_or(0) as usize
    }
}
