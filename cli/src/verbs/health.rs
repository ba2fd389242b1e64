//! How many chunks have fewer good copies than their pool promises.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use blobcr_proto::policy::Policy;
use blobcr_proto::v1::record_store_client::RecordStoreClient;
use blobcr_proto::{Hash, MESSAGE_BYTES_MAX, v1};
use blobcr_repository::placement::Placement;
use blobcr_repository::{CatalogError, Repository};

use crate::channel::{lazy, within};
use crate::exit::{Exit, Refusal, RemoteError};
use crate::view::NodeView;

/// Records in one answer: about a megabyte.
const PAGE: u32 = 16_384;
/// A page comes from the node's index in memory.
const LIST_DEADLINE: Duration = Duration::from_secs(30);

/// Chunks with a damaged copy, with a copy on a node that is down, or owed: acknowledged with fewer
/// copies than the policy wants. `None` when chunks may be on nodes that are down alone, so that
/// nobody can tell how many there are.
///
/// # Errors
/// When the metadata service, or a node that is up, does not answer.
pub(super) async fn degraded_chunks(
    repository: &Repository,
    nodes: &[NodeView],
    pools: &[v1::Pool],
) -> anyhow::Result<Option<u64>> {
    let damaged: u64 = nodes.iter().filter_map(|node| node.damaged_records).sum();
    let down: HashSet<&str> = nodes
        .iter()
        .filter(|node| node.health == "unreachable")
        .map(|node| node.node.as_str())
        .collect();
    let mut degraded = damaged;
    for pool in pools {
        let mut chunks = owed(repository, pool).await?;
        if !down.is_empty()
            && let Some(table) = table(repository, pool).await?
        {
            let Some(away) = on_down_nodes(pool, table, &down).await? else { return Ok(None) };
            for (partition, away) in (0..).zip(away) {
                // What was written while a node is down is owed because of it: not counted twice.
                let chunks = chunks.entry(partition).or_default();
                *chunks = away.max(*chunks);
            }
        }
        degraded += chunks.values().sum::<u64>();
    }
    Ok(Some(degraded))
}

/// Objects that each partition of the pool owes.
async fn owed(
    repository: &Repository,
    pool: &v1::Pool,
) -> Result<BTreeMap<u32, u64>, CatalogError> {
    let mut owed = BTreeMap::new();
    let mut request = v1::ListDebtRequest { pool: pool.id, after: None, limit: 0 };
    loop {
        let page = repository.catalog().list_debt(request).await?;
        owed.extend(page.debts.iter().map(|debt| (debt.partition, debt.objects)));
        request.after = page.debts.last().map(|debt| debt.partition);
        if !page.more || request.after.is_none() {
            return Ok(owed);
        }
    }
}

/// The pool's table; `None` while the pool has none, and so holds nothing.
async fn table(
    repository: &Repository,
    pool: &v1::Pool,
) -> Result<Option<v1::PlacementTable>, CatalogError> {
    let by_id = v1::GetPlacementRequest { id: pool.id, ..Default::default() };
    match repository.catalog().get_placement(by_id).await {
        Err(CatalogError::Precondition(_)) => Ok(None),
        table => table.map(Some),
    }
}

/// Chunks of each partition of one pool that have a copy on a node that is down.
async fn on_down_nodes(
    pool: &v1::Pool,
    table: v1::PlacementTable,
    down: &HashSet<&str>,
) -> anyhow::Result<Option<Vec<u64>>> {
    let policy: Policy = pool.policy.parse()?;
    let partitions = table.partitions.clone();
    let placement = Placement::new(table, policy.nodes())
        .map_err(|e| Refusal::new(Exit::Integrity, e.to_string()))?;
    let is_down = |at: &u32| down.contains(placement.nodes()[*at as usize].id.as_str());
    // A partition that moves from as many nodes as it needs may be there alone still.
    let lost = |row: &v1::PartitionNodes| {
        let moved_wholly = row.moving_from.len() >= policy.nodes();
        row.node.iter().all(is_down) || (moved_wholly && row.moving_from.iter().all(is_down))
    };
    if partitions.iter().any(lost) {
        return Ok(None);
    }
    // Each chunk is counted where its first copy that is up says so: once.
    let counted_at = |id: &Hash| {
        let holders = placement.readers(id);
        let degraded = holders.iter().any(is_down);
        holders.iter().copied().find(|at| degraded && !is_down(at))
    };
    let mut degraded = vec![0; partitions.len()];
    for (at, node) in (0..).zip(placement.nodes()) {
        if !is_down(&at) {
            let count = |id: &Hash| {
                if counted_at(id) == Some(at) {
                    degraded[placement.partition(id)] += 1;
                }
            };
            each_chunk(pool.id, node, count).await?;
        }
    }
    Ok(Some(degraded))
}

/// Shows every chunk of a node to `see`.
async fn each_chunk(pool: u32, node: &v1::Node, mut see: impl FnMut(&Hash)) -> anyhow::Result<()> {
    let mut client =
        RecordStoreClient::new(lazy(&node.address)?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut request =
        v1::ListRequest { pool, kind: v1::RecordKind::Chunk.into(), after: None, limit: PAGE };
    loop {
        let answer = client.list(within(LIST_DEADLINE, request.clone())).await;
        let page = answer
            .map_err(|status| RemoteError::new("repository node", &node.address, &status))?
            .into_inner();
        let refs = page.records.iter().filter_map(|record| record.r#ref.as_ref());
        refs.filter_map(|r| Hash::from_slice(&r.id)).for_each(|id| see(&id));
        request.after = page.records.into_iter().next_back().and_then(|record| record.r#ref);
        if !page.more || request.after.is_none() {
            return Ok(());
        }
    }
}
