//! What [`crate::fuzzing`] shows of a disk's files.

use std::path::Path;
use std::sync::Arc;

use super::files::Files;
use super::io::HostFiles;
use super::journal::Journal;
use super::map::Identity;
use super::{facts, record as record_file, state_file};

/// What a disk is.
#[must_use]
pub fn record(bytes: &[u8]) -> Option<Vec<u8>> {
    record_file::decode(bytes).ok().map(|spec| record_file::encode(&spec))
}

/// The durable facts.
#[must_use]
pub fn state(bytes: &[u8]) -> Option<Vec<u8>> {
    state_file::decode(bytes).ok().map(|(seq, facts)| state_file::encode(seq, &facts))
}

/// The volatile facts, in the head of a map.
#[must_use]
pub fn volatile_facts(bytes: &[u8]) -> Option<Vec<u8>> {
    facts::decode(bytes).ok().map(|facts| facts::encode(&facts))
}

/// The entries of the journal at `path` (of the disk and generation that are all zeros), each with
/// `words` words of presence; `None` when it is damaged.
#[must_use]
pub fn journal(path: &Path, words: usize) -> Option<Vec<(u64, Vec<u64>)>> {
    let files = Files::new("disk".to_owned(), Arc::new(HostFiles));
    let mut entries = Vec::new();
    let visit = |chunk, presence: &[u64]| {
        entries.push((chunk, presence.to_vec()));
        Ok(())
    };
    Journal::open(&files, path, words, &Identity::default(), visit).ok()?;
    Some(entries)
}
