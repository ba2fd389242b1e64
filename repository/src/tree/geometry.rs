//! The shape of a tree: size, chunk size and fan-out decide its depth and every node's place.

use blobcr_proto::units::{ChunkSizeError, IMAGE_SIZE_MAX};
use blobcr_proto::{ChunkSize, Hash, v1};

/// How many children a tree node has at most: a power of two from 2 to 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FanOut(u16);

/// Why a geometry or a root was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The fan-out is none that a tree can have.
    #[error("fan-out {0} is not a power of two from {min} to {max}", min = FanOut::MIN.0, max = FanOut::MAX.0)]
    FanOut(u32),
    /// The chunk size is none that an image can have.
    #[error(transparent)]
    ChunkSize(#[from] ChunkSizeError),
    /// The image is larger than any image may be.
    #[error("an image has at most {IMAGE_SIZE_MAX} bytes; {0} were asked for")]
    TooLarge(u64),
    /// A root whose node is neither absent nor an identity.
    #[error("the root names its top node with {0} bytes instead of none or {len}", len = Hash::LEN)]
    NodeId(usize),
    /// An image of no bytes that nevertheless has a tree.
    #[error("an image of 0 bytes cannot have the top node {0}")]
    NodeOfNothing(Hash),
    /// Two trees that must share chunk size and fan-out do not.
    #[error(
        "a tree of chunk size {left:?} and fan-out {left_fan_out} cannot be combined with one of \
         {right:?} and {right_fan_out}; export and import the image to change them",
        left = .0.chunk_size, left_fan_out = .0.fan_out.get(),
        right = .1.chunk_size, right_fan_out = .1.fan_out.get()
    )]
    Incompatible(Box<Geometry>, Box<Geometry>),
}

impl FanOut {
    /// 2, with which a tree looks as in the paper's figure 3.
    pub const MIN: Self = Self(2);
    /// 1024: a full node has 33 KB. Beyond it every small commit writes more of tree than of data.
    pub const MAX: Self = Self(1024);
    /// What new images get: 256, by the benchmark `fan_out` (`cargo run --release -p blobcr-bench
    /// --bin fan_out`). Full images of 4, 64 and 256 GiB in chunks of 256 KiB; round trip 200 µs,
    /// 10 Gbit/s, 10 µs a record, three copies; mean cost over lookups, commits and differences in
    /// times that of the best fan-out for each; levels and, in nodes and KB, what commits of one
    /// chunk and of 400 scattered ones (100 MiB) write to the tree of 256 GiB:
    ///
    /// | fan-out | mean cost | levels | 1 chunk  | 400 chunks | tree / data of the 400 |
    /// |---------|-----------|--------|----------|------------|------------------------|
    /// |       2 |     16.98 |     20 | 20,  1.5 | 4585,  335 |  0.3 % |
    /// |      16 |      2.32 |      5 |  5,  2.6 |  992,  518 |  0.5 % |
    /// |      64 |      1.42 |      4 |  4,  6.3 |  600, 1237 |  1.2 % |
    /// |     128 |      1.19 |      3 |  3, 10.3 |  454, 1868 |  1.8 % |
    /// | **256** |  **1.14** |      3 |  3, 17.0 |  394, 3236 |  3.1 % |
    /// |     512 |      1.09 |      3 |  3, 33.1 |  370, 6073 |  5.8 % |
    /// |    1024 |      1.10 |      2 |  2, 65.8 |  340, 11187 | 10.7 % |
    ///
    /// Each level is a round trip of a cold lookup, so narrow trees are slow; wide nodes are
    /// written whole for one chunk that changed and are kept as long as the snapshot. 256 is the
    /// least cost among those whose tree adds at most 5 % to scattered commits. With 256, two
    /// levels reach 16 GiB and three 4 TiB. Round trips from 50 to 500 µs pick the same; 1 Gbit/s
    /// would pick 128 (1.06 against 1.13), chunks of 64 KiB 64 and chunks of 1 MiB 1024.
    pub const DEFAULT: Self = Self(256);

    /// Checks a fan-out.
    ///
    /// # Errors
    /// When it is not a power of two in range.
    pub fn new(children: u32) -> Result<Self, GeometryError> {
        match u16::try_from(children) {
            Ok(n) if n.is_power_of_two() && (Self::MIN.0..=Self::MAX.0).contains(&n) => Ok(Self(n)),
            _ => Err(GeometryError::FanOut(children)),
        }
    }

    /// Children of a full node.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Children of a full node, for indexing.
    #[must_use]
    pub const fn slots(self) -> usize {
        self.0 as usize
    }

    /// Its binary logarithm: 1 to 10.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0.trailing_zeros()
    }
}

impl Default for FanOut {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What decides the shape of an image's tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Bytes of the image; the last chunk may be partly beyond its end and is then filled with
    /// zeros to a whole chunk.
    pub size_bytes: u64,
    /// Bytes of a chunk.
    pub chunk_size: ChunkSize,
    /// Children of a tree node.
    pub fan_out: FanOut,
}

impl Geometry {
    /// A checked geometry.
    ///
    /// # Errors
    /// When the image would be larger than any may be.
    pub fn new(
        size_bytes: u64,
        chunk_size: ChunkSize,
        fan_out: FanOut,
    ) -> Result<Self, GeometryError> {
        let geometry = Self { size_bytes, chunk_size, fan_out };
        geometry.check()?;
        Ok(geometry)
    }

    pub(super) fn check(&self) -> Result<(), GeometryError> {
        if self.size_bytes > IMAGE_SIZE_MAX {
            return Err(GeometryError::TooLarge(self.size_bytes));
        }
        Ok(())
    }

    /// Refuses to combine trees whose nodes could not be shared.
    pub(super) fn check_compatible(&self, other: &Self) -> Result<(), GeometryError> {
        if self.chunk_size == other.chunk_size && self.fan_out == other.fan_out {
            return Ok(());
        }
        Err(GeometryError::Incompatible(Box::new(*self), Box::new(*other)))
    }

    /// How many chunks the image has.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.chunk_size.chunks_in(self.size_bytes)
    }

    /// How many levels of nodes the tree has: 0 for an image of no bytes, otherwise the least
    /// number with `fan_out` to the power of it at least [`Self::chunks`]. A cold lookup makes so
    /// many requests.
    #[must_use]
    pub const fn depth(&self) -> u32 {
        let chunks = self.chunks();
        if chunks == 0 {
            return 0;
        }
        // Bits that a chunk index needs, by the bits that one level decides.
        let bits = u64::BITS - (chunks - 1).leading_zeros();
        let depth = bits.div_ceil(self.fan_out.bits());
        if depth == 0 { 1 } else { depth }
    }

    /// The position, among the nodes of `level`, of the one above chunk `index`. Level 0 holds the
    /// chunks.
    pub(super) const fn position(&self, level: u32, index: u64) -> u64 {
        // A level above the chunks' bits has one node, at 0.
        match index.checked_shr(self.fan_out.bits() * (level + 1)) {
            Some(position) => position,
            None => 0,
        }
    }

    /// The first chunk below child `slot` of the node at `position` of `level`.
    pub(super) const fn first_chunk(&self, level: u32, position: u64, slot: usize) -> u64 {
        let bits = self.fan_out.bits();
        ((position << bits) + slot as u64) << (bits * level)
    }

    /// Which child of its parent a node (or chunk) at `position` is.
    pub(super) const fn slot(&self, position: u64) -> usize {
        (position & (self.fan_out.0 as u64 - 1)) as usize
    }
}

/// A whole tree: what [`v1::TreeRoot`] says, checked. Equal roots mean equal disks, and equal
/// disks of one geometry have equal roots, whatever their history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Root {
    /// Its shape.
    pub geometry: Geometry,
    /// Identity of the top node; `None` when the whole disk is zeros.
    pub node: Option<Hash>,
}

impl Root {
    /// A disk of zeros.
    #[must_use]
    pub const fn empty(geometry: Geometry) -> Self {
        Self { geometry, node: None }
    }

    /// Refuses what [`Root::try_from`] would refuse.
    pub(super) fn check(&self) -> Result<(), GeometryError> {
        self.geometry.check()?;
        match self.node {
            Some(id) if self.geometry.chunks() == 0 => Err(GeometryError::NodeOfNothing(id)),
            _ => Ok(()),
        }
    }

    /// The wire form.
    #[must_use]
    pub fn to_wire(&self) -> v1::TreeRoot {
        v1::TreeRoot {
            size_bytes: self.geometry.size_bytes,
            // At most 4 MiB.
            chunk_size: self.geometry.chunk_size.bytes() as u32,
            fan_out: self.geometry.fan_out.get(),
            node: self.node.map(|id| id.to_bytes()).unwrap_or_default(),
        }
    }
}

impl TryFrom<&v1::TreeRoot> for Root {
    type Error = GeometryError;

    fn try_from(wire: &v1::TreeRoot) -> Result<Self, GeometryError> {
        let geometry = Geometry {
            size_bytes: wire.size_bytes,
            chunk_size: ChunkSize::new(u64::from(wire.chunk_size))?,
            fan_out: FanOut::new(wire.fan_out)?,
        };
        let node = match wire.node.len() {
            0 => None,
            len => Some(Hash::from_slice(&wire.node).ok_or(GeometryError::NodeId(len))?),
        };
        let root = Self { geometry, node };
        root.check()?;
        Ok(root)
    }
}
