//! Which repository this is.

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// The repository's own id: nodes keep it too, so that none serves two.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ClusterRecord {
    /// 128 random bits in hex.
    #[prost(string, tag = "1")]
    pub id: String,
}

impl ClusterRecord {
    /// The key of the one record.
    #[must_use]
    pub fn key_of() -> Key {
        KeyBuilder::new(KeyKind::Cluster).key()
    }
}

impl Record for ClusterRecord {
    const KIND: KeyKind = KeyKind::Cluster;

    fn key(&self) -> Key {
        Self::key_of()
    }

    fn check(&self) -> Result<(), &'static str> {
        let good = self.id.len() == 32 && self.id.chars().all(|c| c.is_ascii_hexdigit());
        if good { Ok(()) } else { Err("no id of a repository") }
    }
}
