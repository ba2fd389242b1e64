//! How many chunks have fewer good copies than their pool promises.

use std::collections::HashSet;
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

/// Chunks with a damaged copy, or with a copy on a node that is down. `None` when chunks may be on
/// such nodes alone, so that nobody can tell how many there are.
///
/// # Errors
/// When the metadata service, or a node that is up, does not answer.
pub(super) async fn degraded_chunks(
    repository: &Repository,
    nodes: &[NodeView],
    pools: &[v1::Pool],
) -> anyhow::Result<Option<u64>> {
    let damaged: u64 = nodes.iter().filter_map(|node| node.damaged_records).sum();
    let down: HashSet<&str> =
        nodes.iter().filter(|node| node.state == "down").map(|node| node.node.as_str()).collect();
    let mut degraded = damaged;
    if down.is_empty() {
        return Ok(Some(degraded));
    }
    for pool in pools {
        let Some(table) = table(repository, pool).await? else { continue };
        match on_down_nodes(pool, table, &down).await? {
            Some(chunks) => degraded += chunks,
            None => return Ok(None),
        }
    }
    Ok(Some(degraded))
}

/// The pool's table; `None` while the pool has none, and so holds nothing.
async fn table(
    repository: &Repository,
    pool: &v1::Pool,
) -> Result<Option<v1::PlacementTable>, CatalogError> {
    let by_id = v1::PoolRef { id: pool.id, name: String::new() };
    match repository.catalog().get_placement(by_id).await {
        Err(CatalogError::Precondition(_)) => Ok(None),
        table => table.map(Some),
    }
}

/// Chunks of one pool that have a copy on a node that is down.
async fn on_down_nodes(
    pool: &v1::Pool,
    table: v1::PlacementTable,
    down: &HashSet<&str>,
) -> anyhow::Result<Option<u64>> {
    let policy: Policy = pool.policy.parse()?;
    let partitions = table.partitions.clone();
    let placement = Placement::new(table, policy.nodes())
        .map_err(|e| Refusal::new(Exit::Integrity, e.to_string()))?;
    let is_down = |at: &u32| down.contains(placement.nodes()[*at as usize].id.as_str());
    if partitions.iter().any(|holders| holders.node.iter().all(is_down)) {
        return Ok(None);
    }
    // Each chunk is counted where its first copy that is up says so: once.
    let counted_at = |id: &Hash| {
        let holders = placement.holders(id);
        let degraded = holders.iter().any(is_down);
        holders.iter().copied().find(|at| degraded && !is_down(at))
    };
    let mut degraded = 0;
    for (at, node) in (0..).zip(placement.nodes()) {
        if !is_down(&at) {
            degraded += count(pool.id, node, |id| counted_at(id) == Some(at)).await?;
        }
    }
    Ok(Some(degraded))
}

/// Counts the chunks of a node that `counts` says yes to.
async fn count(pool: u32, node: &v1::Node, counts: impl Fn(&Hash) -> bool) -> anyhow::Result<u64> {
    let mut client =
        RecordStoreClient::new(lazy(&node.address)?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut request =
        v1::ListRequest { pool, kind: v1::RecordKind::Chunk.into(), after: None, limit: PAGE };
    let mut counted = 0;
    loop {
        let answer = client.list(within(LIST_DEADLINE, request.clone())).await;
        let page = answer
            .map_err(|status| RemoteError::new("repository node", &node.address, &status))?
            .into_inner();
        let refs = page.records.iter().filter_map(|record| record.r#ref.as_ref());
        counted += refs.filter_map(|r| Hash::from_slice(&r.id)).filter(&counts).count() as u64;
        request.after = page.records.into_iter().next_back().and_then(|record| record.r#ref);
        if !page.more || request.after.is_none() {
            return Ok(counted);
        }
    }
}
