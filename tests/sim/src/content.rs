//! What images hold: chunks that follow from a number each, so that expecting them costs nothing.

use std::sync::Arc;

use blobcr_proto::ChunkSize;
use blobcr_repository::tree::{FanOut, Geometry, GeometryError};
use bytes::Bytes;

/// The smallest, for the sake of speed.
pub(crate) const CHUNK: ChunkSize = ChunkSize::MIN;

/// The number of each chunk; 0 is a hole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content(Arc<[u64]>);

impl Content {
    /// Of so many holes.
    #[must_use]
    pub fn holes(chunks: usize) -> Self {
        Self(vec![0; chunks].into())
    }

    /// The same with another number at `index`.
    #[must_use]
    pub fn with(&self, index: usize, number: u64) -> Self {
        let mut numbers = self.0.to_vec();
        numbers[index] = number;
        Self(numbers.into())
    }

    /// How many chunks.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.0.len()
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.len() as u64 * CHUNK.bytes()
    }

    /// The chunk at `index`; `None` is a hole.
    #[must_use]
    pub fn chunk(&self, index: usize) -> Option<Bytes> {
        let number = *self.0.get(index)?;
        (number != 0).then(|| filled(number).into())
    }

    /// Where this differs from `other`.
    #[must_use]
    pub fn differing(&self, other: &Self) -> Vec<u64> {
        let both = self.0.iter().zip(other.0.iter());
        (0..).zip(both).filter(|(_, (a, b))| a != b).map(|(index, _)| index).collect()
    }

    /// The geometry of an image that holds this. Of fan-out 2, so that there are many tree nodes.
    ///
    /// # Errors
    /// Never, for what a run makes.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        Geometry::new(self.bytes(), CHUNK, FanOut::MIN)
    }
}

/// Compresses well: a run is about what happens, not about bytes.
fn filled(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(CHUNK.len() / 8)
}
