//! Where the records of a pool belong.

use std::ops::Range;
use std::sync::Arc;

use blobcr_proto::policy::Policy;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_proto::{Hash, record::RecordKey};
use blobcr_repository::placement::Placement;
use blobcr_repository::stripe::Stripe;
use blobcr_repository::{Catalog, CatalogError};

/// A pool's placement table cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pool {pool}: {detail}")]
pub struct LayoutError {
    /// The pool.
    pub pool: String,
    /// What is wrong.
    pub detail: String,
}

/// One pool under one version of its table.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) pool: u32,
    pub(crate) policy: Policy,
    pub(crate) placement: Arc<Placement>,
    /// How chunks are cut; `None` when they are kept as whole copies.
    pub(crate) stripe: Option<Arc<Stripe>>,
}

/// Both kinds of records.
pub(crate) const KINDS: [RecordKind; 2] = [RecordKind::Chunk, RecordKind::TreeNode];

impl Layout {
    /// The newest table; `None` while the pool has none, and so holds nothing.
    pub(crate) async fn load(
        catalog: &dyn Catalog,
        pool: v1::Pool,
    ) -> Result<Result<Option<Self>, LayoutError>, CatalogError> {
        let request = v1::GetPlacementRequest { id: pool.id, ..Default::default() };
        let table = match catalog.get_placement(request).await {
            Ok(table) => table,
            Err(CatalogError::Precondition(_)) => return Ok(Ok(None)),
            Err(error) => return Err(error),
        };
        Ok(Self::new(pool, table).map(Some))
    }

    fn new(pool: v1::Pool, table: v1::PlacementTable) -> Result<Self, LayoutError> {
        let invalid = |detail: String| LayoutError { pool: pool.name.clone(), detail };
        let policy: Policy = pool.policy.parse().map_err(|e| invalid(format!("{e}")))?;
        let placement =
            Placement::new(table, policy.nodes()).map_err(|e| invalid(e.to_string()))?;
        let (placement, stripe) = (Arc::new(placement), Stripe::of(policy).map(Arc::new));
        Ok(Self { pool: pool.id, policy, placement, stripe })
    }

    /// The id of a node of the table.
    pub(crate) fn id(&self, node: u32) -> &str {
        &self.placement.nodes()[node as usize].id
    }

    /// The node of each place of a partition that has records of that kind.
    pub(crate) fn row(&self, kind: RecordKind, partition: usize) -> &[u32] {
        // Every row has as many nodes as the policy needs: the table was checked.
        &self.placement.row(partition)[..self.policy.of(kind).nodes()]
    }

    /// How chunks are cut; `None` for what is kept as whole copies.
    pub(crate) fn stripe(&self, kind: RecordKind) -> Option<&Arc<Stripe>> {
        self.stripe.as_ref().filter(|_| kind != RecordKind::TreeNode)
    }

    /// What the node at a place has of an object.
    pub(crate) fn key(&self, kind: RecordKind, id: Hash, place: usize) -> RecordKey {
        // A row has far fewer than 255 nodes.
        let shard = self.stripe(kind).map_or(0, |_| place as u8 + 1);
        RecordKey { kind, id, shard }
    }

    /// Whether a node is to have that record, or may have had it before the partition moved.
    pub(crate) fn belongs(&self, node: Option<u32>, key: &RecordKey) -> bool {
        let partition = self.placement.partition(&key.id);
        if !self.placement.moving_from(partition).is_empty() {
            // Until all has come, what is anywhere may be of use.
            return true;
        }
        let mut row = self.row(key.kind, partition).iter();
        let place = node.and_then(|node| row.position(|at| *at == node));
        place.is_some_and(|place| self.key(key.kind, key.id, place) == *key)
    }

    /// The index of a node, if the table names it.
    pub(crate) fn find(&self, id: &str) -> Option<u32> {
        let found = self.placement.nodes().iter().position(|node| node.id == id);
        // At most 512 nodes.
        found.map(|at| at as u32)
    }

    /// Indices of all nodes that have, or may have, records of a partition.
    pub(crate) fn sources(&self, partition: usize) -> Vec<u32> {
        let from = self.placement.moving_from(partition);
        self.placement.row(partition).iter().chain(from).copied().collect()
    }

    pub(crate) fn partitions(&self) -> Range<usize> {
        0..self.placement.partitions()
    }
}
