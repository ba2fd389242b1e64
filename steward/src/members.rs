//! The nodes of the repository, each asked by itself.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blobcr_proto::v1;
use blobcr_repository::{CatalogError, Repository};
use futures::{StreamExt, stream};

use crate::node::{Node, NodeError};

/// Nodes that are connected to at the same time.
const OPENED_AT_ONCE: usize = 8;

/// All registered nodes. One that fails once is left out from then on.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    registered: Arc<Vec<v1::Node>>,
    open: Arc<HashMap<String, Node>>,
    failed: Arc<Mutex<BTreeMap<String, NodeError>>>,
}

impl Members {
    /// Connects to all of them.
    pub(crate) async fn open(repository: &Repository) -> Result<Self, CatalogError> {
        let registered = repository.catalog().list_nodes(v1::ListNodesRequest {}).await?.nodes;
        let options = repository.options();
        let (mut open, mut failed) = (HashMap::new(), BTreeMap::new());
        let opening = stream::iter(registered.clone()).map(|node| {
            let (id, options) = (node.id.clone(), options.clone());
            async move { (id, Node::open(node, &options).await) }
        });
        let mut opening = std::pin::pin!(opening.buffer_unordered(OPENED_AT_ONCE));
        while let Some((id, node)) = opening.next().await {
            match node {
                Ok(node) => drop(open.insert(id, node)),
                Err(error) => drop(failed.insert(id, error)),
            }
        }
        let (registered, open) = (Arc::new(registered), Arc::new(open));
        Ok(Self { registered, open, failed: Arc::new(Mutex::new(failed)) })
    }

    pub(crate) fn registered(&self) -> &[v1::Node] {
        &self.registered
    }

    fn failed(&self) -> MutexGuard<'_, BTreeMap<String, NodeError>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node, if it answers.
    pub(crate) fn get(&self, id: &str) -> Option<&Node> {
        self.open.get(id).filter(|_| !self.failed().contains_key(id))
    }

    pub(crate) fn fail(&self, id: &str, error: NodeError) {
        let first = !self.failed().contains_key(id);
        if first {
            tracing::warn!(%error, "left out from now on");
            self.failed().insert(id.to_owned(), error);
        }
    }

    pub(crate) fn failure(&self, id: &str) -> Option<NodeError> {
        self.failed().get(id).cloned()
    }
}
