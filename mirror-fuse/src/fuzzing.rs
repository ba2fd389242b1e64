//! Doors to private decoders, for the fuzzers in `tests/fuzz`. Each reads bytes, and gives what it
//! read, or that as it would be written.

use std::path::Path;

use blobcr_proto::Hash;
use bytes::Bytes;

pub use crate::disk::fuzzing::{journal, record, state, volatile_facts};

/// The identity of a mirror.
#[must_use]
pub fn identity(bytes: &[u8]) -> Option<Vec<u8>> {
    crate::identity::decode(bytes).map(|identity| crate::identity::encode(identity).to_vec())
}

/// Which of the tree nodes are kept in `dir`, whose bytes are compared with their identities.
///
/// # Panics
/// When the files cannot be used.
#[must_use]
pub fn kept_nodes(dir: &Path, ids: &[Hash]) -> Vec<Option<Bytes>> {
    crate::base::kept_nodes(dir, ids).expect("the directory can be used")
}
