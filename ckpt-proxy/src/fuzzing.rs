//! A door to the decoder of VM records, for the fuzzers in `tests/fuzz`.

use crate::records;

/// Reads the record of a VM, and gives what it read as it would be written.
#[must_use]
pub fn vm_record(bytes: &[u8]) -> Option<Vec<u8>> {
    records::decode(bytes).ok().map(|record| records::encode(&record))
}
