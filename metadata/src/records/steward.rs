//! Which steward leads.

use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// The longest name of a steward, in bytes: a host name of 255 and something random.
pub const STEWARD_HOLDER_BYTES_MAX: usize = 300;

/// The one steward that works, and how far it is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StewardRecord {
    /// Who it is.
    #[prost(string, tag = "1")]
    pub holder: String,
    /// When it was heard of last, in ms since 1970; 0 once it has resigned.
    #[prost(uint64, tag = "2")]
    pub seen_unix_ms: u64,
    /// What it repairs.
    #[prost(message, optional, tag = "3")]
    pub repair: Option<v1::RepairProgress>,
    /// Where it scrubs.
    #[prost(message, optional, tag = "4")]
    pub scrub: Option<v1::ScrubProgress>,
}

impl StewardRecord {
    /// The key of the one record.
    #[must_use]
    pub fn key_of() -> Key {
        KeyBuilder::new(KeyKind::Steward).key()
    }
}

impl Record for StewardRecord {
    const KIND: KeyKind = KeyKind::Steward;

    fn key(&self) -> Key {
        Self::key_of()
    }

    fn check(&self) -> Result<(), &'static str> {
        let good = !self.holder.is_empty() && self.holder.len() <= STEWARD_HOLDER_BYTES_MAX;
        if good { Ok(()) } else { Err("no name of a steward") }
    }
}
