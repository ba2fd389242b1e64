//! Doors to private decoders, for the fuzzers in `tests/fuzz`. Each reads bytes, and gives what it
//! read as it would be written.

use crate::{format, store};

/// The line of a FORMAT file, or of a marker in etcd.
#[must_use]
pub fn line(bytes: &[u8]) -> Option<String> {
    format::read(bytes).ok().map(format::line)
}

/// The note of the newest version that was acknowledged.
#[must_use]
pub fn acknowledged(bytes: &[u8]) -> Option<Vec<u8>> {
    store::sled::read_acknowledged(bytes)
}

/// A value in sled's tree.
#[must_use]
pub fn stored_value(bytes: &[u8]) -> Option<Vec<u8>> {
    store::sled::read_value(bytes)
}
