//! Where nodes come from.

use std::collections::HashMap;

use async_trait::async_trait;
use blobcr_proto::Hash;
use bytes::Bytes;

use super::TreeError;
use super::geometry::{FanOut, Geometry};
use super::node::{Node, node_bytes_max};
use crate::store::StoreError;

/// Bytes of nodes that one request asks for at most: half of the largest message, and little
/// enough to hold several such in memory.
const REQUEST_BYTES_MAX: usize = 8 << 20;
/// Nodes that one request asks for at most: small nodes cost more by their number than by their
/// bytes.
const REQUEST_NODES_MAX: usize = 4096;

/// Reads tree nodes. A request is one round trip; a tree is read with one request per level.
#[async_trait]
pub trait NodeSource: Send + Sync {
    /// The plain encodings of nodes, one for each identity and in their order. The source has
    /// checked that each has its identity.
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError>;
}

/// How many nodes a walk holds at once.
pub(super) fn window(fan_out: FanOut) -> usize {
    (REQUEST_BYTES_MAX / node_bytes_max(fan_out)).clamp(1, REQUEST_NODES_MAX)
}

/// Reads and checks the nodes at some places of one level: `(position, identity)`. At most
/// [`window`] places, so that it is one request; a node that is in several places is read once.
pub(super) async fn fetch(
    source: &dyn NodeSource,
    geometry: &Geometry,
    level: u32,
    places: &[(u64, Hash)],
) -> Result<Vec<Node>, TreeError> {
    let mut ids = Vec::with_capacity(places.len());
    let mut index_of = HashMap::new();
    match places {
        [] => return Ok(Vec::new()),
        // The way to one chunk is what is read most.
        [(_, id)] => ids.push(*id),
        _ => {
            for (_, id) in places {
                index_of.entry(*id).or_insert_with(|| {
                    ids.push(*id);
                    ids.len() - 1
                });
            }
        }
    }
    let encodings = source.nodes(&ids).await?;
    if encodings.len() != ids.len() {
        return Err(TreeError::Source { asked: ids.len(), answered: encodings.len() });
    }
    let mut nodes = Vec::with_capacity(ids.len());
    for (id, encoding) in ids.iter().zip(encodings) {
        let node = Node::decode(encoding, geometry, level);
        nodes.push(node.map_err(|error| TreeError::Node { id: *id, error })?);
    }
    if ids.len() < places.len() {
        nodes = places.iter().map(|(_, id)| nodes[index_of[id]].clone()).collect();
    }
    for ((position, id), node) in places.iter().zip(&nodes) {
        super::walk::check_extent(geometry, level, *position, *id, node)?;
    }
    Ok(nodes)
}
