//! Repository nodes: membership.

use blobcr_proto::v1;

use super::{RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{KeyKind, NodeRecord, check_node_id, prefix_of};
use crate::store::Swap;

/// Nodes at most: one reply lists all.
pub const NODES_MAX: usize = 4096;

/// The longest address or failure domain, in bytes: a host name of 255 and a port.
pub const ADDRESS_BYTES_MAX: usize = 300;

fn check_text(what: &str, text: &str) -> Result<(), Error> {
    if text.len() > ADDRESS_BYTES_MAX || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Error::invalid(format!(
            "a node's {what} has at most {ADDRESS_BYTES_MAX} bytes and no spaces; this is {text:?}"
        )));
    }
    Ok(())
}

impl VersionManager {
    /// Adds a node, or notes that it has moved. A node says this whenever it starts; saying the same
    /// again changes nothing. Tables name nodes by id, so a new address is valid for all of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad id, address or domain.
    pub async fn register_node(&self, r: v1::RegisterNodeRequest) -> Result<v1::Node, Error> {
        check_node_id(&r.id).map_err(Error::invalid)?;
        check_text("address", &r.address)?;
        check_text("failure domain", &r.domain)?;
        if r.address.is_empty() {
            return Err(Error::invalid(format!("node {} needs an address", r.id)));
        }
        until_won!(self, format!("node {}", r.id), self.try_register(&r).await)
    }

    async fn try_register(&self, r: &v1::RegisterNodeRequest) -> Result<v1::Node, Error> {
        let held = self.load::<NodeRecord>(NodeRecord::key_of(&r.id)).await?;
        let node = NodeRecord {
            id: r.id.clone(),
            address: r.address.clone(),
            domain: r.domain.clone(),
            registered_unix_ms: self.now(),
        };
        let swap = match &held {
            Some(held) if held.value.address == r.address && held.value.domain == r.domain => {
                return Ok(held.value.to_wire());
            }
            Some(held) => Swap::new().update(held, &node),
            None => {
                let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
                if nodes.len() >= NODES_MAX {
                    let problem = format!("cannot join: there are {NODES_MAX} nodes already");
                    return Err(Error::precondition(format!("node {}", r.id), problem));
                }
                Swap::new().create(&node)
            }
        };
        self.store.swap(swap).await?;
        Ok(node.to_wire())
    }

    /// All nodes (at most [`NODES_MAX`]), in order of id.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_nodes(
        &self,
        _: v1::ListNodesRequest,
    ) -> Result<v1::ListNodesResponse, Error> {
        let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        Ok(v1::ListNodesResponse { nodes: nodes.iter().map(|node| node.value.to_wire()).collect() })
    }
}
