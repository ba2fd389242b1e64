//! Repository nodes.

use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// The longest id of a node, in bytes; 128 random bits in hex are 32.
const NODE_ID_BYTES_MAX: usize = 64;

/// A repository node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeRecord {
    /// Its id, which its directory keeps.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Where it answers.
    #[prost(string, tag = "2")]
    pub address: String,
    /// Its failure domain; empty when it is one by itself.
    #[prost(string, tag = "3")]
    pub domain: String,
    /// When it came, or last changed its address or domain, in ms since 1970.
    #[prost(uint64, tag = "4")]
    pub registered_unix_ms: u64,
    /// When it was heard of last, in ms since 1970; written only now and then.
    #[prost(uint64, tag = "5")]
    pub last_seen_unix_ms: u64,
    /// New tables leave it out.
    #[prost(bool, tag = "6")]
    pub draining: bool,
    /// When it was removed, in ms since 1970; 0 before. The record stays, so that it is not taken
    /// again.
    #[prost(uint64, tag = "7")]
    pub removed_unix_ms: u64,
}

impl NodeRecord {
    /// The key of a node.
    #[must_use]
    pub fn key_of(id: &str) -> Key {
        KeyBuilder::new(KeyKind::Node).text(id).key()
    }

    /// The wire form of a node in that state.
    #[must_use]
    pub fn to_wire(&self, state: v1::NodeState) -> v1::Node {
        v1::Node {
            id: self.id.clone(),
            address: self.address.clone(),
            domain: self.domain.clone(),
            registered_unix_ms: self.registered_unix_ms,
            state: state.into(),
            last_seen_unix_ms: self.last_seen_unix_ms,
            draining: self.draining,
            cluster: String::new(),
        }
    }

    /// The failure domain: its own when none was named.
    #[must_use]
    pub fn failure_domain(&self) -> &str {
        if self.domain.is_empty() { &self.id } else { &self.domain }
    }
}

/// Checks the id of a node.
///
/// # Errors
/// What is wrong with it.
pub fn check_node_id(id: &str) -> Result<(), &'static str> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.is_empty() || id.len() > NODE_ID_BYTES_MAX || !id.chars().all(good) {
        return Err("a node's id is 1 to 64 letters, digits, '-', '_' or '.'");
    }
    Ok(())
}

impl Record for NodeRecord {
    const KIND: KeyKind = KeyKind::Node;

    fn key(&self) -> Key {
        Self::key_of(&self.id)
    }

    fn check(&self) -> Result<(), &'static str> {
        check_node_id(&self.id)
    }
}
