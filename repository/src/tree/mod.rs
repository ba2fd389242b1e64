//! The segment tree: which chunk is where in a disk.
//!
//! A tree of fan-out F over a disk of C chunks has the least number of levels D with F^D ≥ C. The
//! nodes of level 0 hold the identities of F chunks, those of each level above the identities of F
//! nodes below. Whatever is all zeros is absent, from a chunk to the whole tree. Nodes are
//! immutable and addressed by the BLAKE3 of their encoding ([`node`]), so:
//!
//! * a changed disk shares with the old one every node above which nothing changed (*shadowing*);
//! * a CLONE is a second name for the same [`Root`];
//! * trees of equal content and geometry have one root, and where two differ is found by comparing
//!   identities from the top down;
//! * nothing costs more because a disk has many snapshots.
//!
//! This is code over a [`NodeSource`] and nothing else: it stores nothing, holds no clock, and
//! starts no task. Everything is read in windows of bounded memory, with one request per level
//! as long as a level's part fits in one.

mod diff;
mod geometry;
mod lookup;
pub mod node;
mod source;
#[cfg(test)]
mod tests;
mod update;
mod walk;

use blobcr_proto::Hash;

pub use diff::diff;
pub use geometry::{FanOut, Geometry, GeometryError, Root};
pub use lookup::lookup;
pub use source::NodeSource;
pub use update::{Change, NewNode, Updated, Updater, update};
pub use walk::{Lost, Present, Reached, for_each_node, for_each_present, survey};

use crate::store::StoreError;
use node::NodeError;

/// Why a tree could not be read or made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TreeError {
    /// The nodes could not be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The source does not keep to its contract.
    #[error("the source of tree nodes answered {answered} nodes when asked for {asked}")]
    Source {
        /// Nodes asked for.
        asked: usize,
        /// Nodes that came.
        answered: usize,
    },
    /// A node is not what its place in the tree asks for. Its identity was right, so it was
    /// written so: by a faulty writer, or as part of another tree.
    #[error("tree node {id} cannot be used: {error}")]
    Node {
        /// The node's identity.
        id: Hash,
        /// What is wrong with it.
        error: NodeError,
    },
    /// The geometry is impossible, or does not fit the tree.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A change to a chunk that the disk does not have.
    #[error("chunk {index} was changed in a disk of {chunks} chunks")]
    BeyondEnd {
        /// The chunk.
        index: u64,
        /// How many the disk has.
        chunks: u64,
    },
    /// Changes must come in ascending order, each chunk once.
    #[error("chunk {index} was changed after chunk {after}: changes must be sorted, each once")]
    Unsorted {
        /// The chunk.
        index: u64,
        /// The one before it.
        after: u64,
    },
}

impl TreeError {
    /// Whether the same call may succeed later without anybody mending the data.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_transient())
    }

    /// Whether what is stored is damaged or lost.
    #[must_use]
    pub const fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Node { .. }
                | Self::Store(StoreError::Damaged { .. } | StoreError::Missing { .. })
        )
    }
}
