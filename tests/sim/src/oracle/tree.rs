//! Trees as the oracle knows them: from what nodes were asked to put.

use std::collections::{BTreeSet, HashMap};

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_repository::StoreError;
use blobcr_repository::tree::{NodeSource, Reached, Root, for_each_node};
use bytes::Bytes;
use futures::FutureExt;

use super::Object;

/// What tells one root from another.
pub(super) fn name(root: &v1::TreeRoot) -> Vec<u8> {
    let mut name = root.size_bytes.to_le_bytes().to_vec();
    name.extend(&root.node);
    name
}

struct Known<'a>(&'a HashMap<Hash, Bytes>);

#[async_trait]
impl NodeSource for Known<'_> {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let kind = RecordKind::TreeNode;
        let known =
            |id: &Hash| self.0.get(id).cloned().ok_or(StoreError::Missing { kind, id: *id });
        ids.iter().map(known).collect()
    }
}

/// What a root reaches; an error when no node was ever asked to put one of its tree nodes.
pub(super) fn reach(
    nodes: &HashMap<Hash, Bytes>,
    root: &v1::TreeRoot,
) -> Result<BTreeSet<Object>, String> {
    let root = Root::try_from(root).map_err(|error| error.to_string())?;
    let mut reached = BTreeSet::new();
    let mut visit = |found| {
        match found {
            Reached::Node { id, .. } => reached.insert((RecordKind::TreeNode, id)),
            Reached::Chunk { id, .. } => reached.insert((RecordKind::Chunk, id)),
        };
        true
    };
    match for_each_node(&Known(nodes), &root, &mut visit).now_or_never() {
        Some(Ok(())) => Ok(reached),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("the walk waits".into()),
    }
}
