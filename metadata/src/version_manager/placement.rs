//! Which nodes hold each partition of a pool.

use std::collections::BTreeMap;

use blobcr_proto::v1;

use super::{RecordSwap, VersionManager, mix64, until_won};
use crate::error::Error;
use crate::records::{
    KeyKind, NodeRecord, PART_ROWS, PlacementPartRecord, PlacementRecord, PoolRecord, Record,
    TABLE_NODES_MAX, prefix_of,
};
use crate::store::Swap;
use blobcr_proto::policy::Policy;

/// A node that partitions can be given to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: String,
    /// Its failure domain.
    pub domain: String,
}

/// Gives each of `partitions` an ordered row of `width` different nodes, as indices into
/// `candidates`. The same input gives the same table.
///
/// Nodes of one row are in different failure domains as far as there are enough domains. Rows are
/// filled one after the other with the nodes that hold the least so far, and of those with the one
/// that the partition ranks highest (rendezvous hashing); so when domains set no bounds, no two
/// nodes differ by more than one partition. First choices are balanced in the same way.
#[must_use]
pub fn build(candidates: &[Candidate], partitions: u32, width: usize) -> Vec<Vec<u32>> {
    debug_assert!(candidates.len() >= width && candidates.len() <= TABLE_NODES_MAX);
    let hashes: Vec<u64> = candidates.iter().map(|node| hash(&node.id)).collect();
    let rank = |partition: u32, node: usize| {
        let node = hashes.get(node).copied().unwrap_or_default();
        mix64(node ^ mix64(u64::from(partition)))
    };
    let mut held = vec![0u32; candidates.len()];
    let mut first = vec![0u32; candidates.len()];
    let mut rows = Vec::with_capacity(partitions as usize);
    for partition in 0..partitions {
        let mut row: Vec<usize> = Vec::with_capacity(width);
        for _ in 0..width {
            let taken = |node: &usize| row.contains(node);
            let crowded = |node: usize| {
                row.iter().any(|other| candidates[*other].domain == candidates[node].domain)
            };
            let best = (0..candidates.len())
                .filter(|node| !taken(node))
                .min_by_key(|&node| (crowded(node), held[node], rank(partition, node), node));
            row.extend(best);
        }
        row.iter().for_each(|node| held[*node] += 1);
        row.sort_by_key(|&node| (first[node], rank(partition, node), node));
        if let Some(node) = row.first() {
            first[*node] += 1;
        }
        // At most TABLE_NODES_MAX.
        rows.push(row.into_iter().map(|node| node as u32).collect());
    }
    rows
}

fn hash(id: &str) -> u64 {
    blobcr_proto::Hash::of(id.as_bytes()).prefix()
}

impl VersionManager {
    /// The table of a pool. It is made when it is first asked for after enough nodes have
    /// registered, of all nodes that have by then, and is then fixed.
    ///
    /// # Errors
    /// [`Error::Precondition`] while too few nodes have registered for the pool's policy.
    pub async fn get_placement(&self, r: v1::PoolRef) -> Result<v1::PlacementTable, Error> {
        let pool = self.pool_record(&r).await?.value;
        let object = format!("pool {:?}", pool.name);
        let head = until_won!(self, object, self.head_or_build(&pool).await)?;
        self.table(&head).await
    }

    async fn head_or_build(&self, pool: &PoolRecord) -> Result<PlacementRecord, Error> {
        let key = PlacementRecord::key_of(pool.id);
        if let Some(head) = self.load::<PlacementRecord>(key).await? {
            return Ok(head.value);
        }
        let policy: Policy = pool.policy.parse().map_err(Error::invalid)?;
        let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        if nodes.len() < policy.nodes() {
            return Err(Error::precondition(
                format!("pool {:?}", pool.name),
                format!(
                    "needs {} nodes for {policy} and {} have registered; start more",
                    policy.nodes(),
                    nodes.len()
                ),
            ));
        }
        let candidates: Vec<Candidate> = nodes
            .iter()
            .take(TABLE_NODES_MAX)
            .map(|node| Candidate {
                id: node.value.id.clone(),
                domain: node.value.failure_domain().to_owned(),
            })
            .collect();
        let rows = build(&candidates, pool.partitions, policy.nodes());
        let head = PlacementRecord {
            pool: pool.id,
            version: 1,
            nodes: candidates.into_iter().map(|node| node.id).collect(),
            // At most POLICY_NODES_MAX.
            width: policy.nodes() as u32,
            partitions: pool.partitions,
        };
        let parts = rows.chunks(PART_ROWS).zip(0..).map(|(rows, part)| PlacementPartRecord {
            pool: pool.id,
            version: head.version,
            part,
            rows: rows.concat(),
        });
        let swap = parts.fold(Swap::new().create(&head), |swap, part| swap.create(&part));
        self.store.swap(swap).await?;
        Ok(head)
    }

    async fn table(&self, head: &PlacementRecord) -> Result<v1::PlacementTable, Error> {
        let damaged = |detail: &str| {
            let key = head.key();
            Error::Record(crate::records::RecordError::Damaged { key, detail: detail.to_owned() })
        };
        let mut partitions = Vec::with_capacity(head.partitions as usize);
        for part in 0..head.parts() {
            let key = PlacementPartRecord::key_of(head.pool, head.version, part);
            let part = self.load::<PlacementPartRecord>(key).await?;
            let part = part.ok_or_else(|| damaged("a part of the table is missing"))?;
            let rows = part.value.rows.chunks(head.width as usize);
            partitions.extend(rows.map(|row| v1::PartitionNodes { node: row.to_vec() }));
        }
        let whole = |row: &v1::PartitionNodes| {
            row.node.len() == head.width as usize
                && row.node.iter().all(|node| (*node as usize) < head.nodes.len())
        };
        if partitions.len() != head.partitions as usize || !partitions.iter().all(whole) {
            return Err(damaged("the rows of the table do not fit it"));
        }
        let registered = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        let registered: BTreeMap<&str, &NodeRecord> =
            registered.iter().map(|node| (node.value.id.as_str(), &node.value)).collect();
        let nodes: Option<Vec<v1::Node>> = head
            .nodes
            .iter()
            .map(|id| registered.get(id.as_str()).map(|node| node.to_wire()))
            .collect();
        let nodes = nodes.ok_or_else(|| damaged("a node of the table is not registered"))?;
        Ok(v1::PlacementTable { pool: head.pool, version: head.version, nodes, partitions })
    }
}
