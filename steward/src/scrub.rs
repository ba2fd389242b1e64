//! Reads every copy and every shard down to its identity, and mends what is damaged or missing.
//!
//! Partition after partition, so that it can be broken off anywhere and gone on with later, by
//! another steward as well.

use std::collections::BTreeSet;
use std::ops::Range;

use blobcr_proto::{Hash, v1};
use blobcr_repository::{CatalogError, Repository};

use crate::layout::{KINDS, Layout, LayoutError};
use crate::members::Members;
use crate::mend::{Depth, Mender, Tally};
use crate::node::{NodeError, behind};
use crate::pace::Pace;
use crate::pass::pass;

/// Parts that a pool is scrubbed in: where a scrub goes on when it was broken off.
const PARTS: usize = 64;
/// Bytes that a node checks for one question: a rate is kept in such steps.
const CHECK_BYTES: u64 = 8 << 20;
/// Lost records that are told one by one; beyond them only their number is.
const LOST_TOLD_MAX: usize = 100;

/// How to scrub.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScrubOptions {
    /// Bytes a second to read at most; 0: as fast as it goes.
    pub bytes_per_second: u64,
    /// Each node checks what it has by its checksums, and only what is near damage is read whole:
    /// much cheaper, and blind to what is missing or lies.
    pub quick: bool,
}

/// What a scrub came to.
#[derive(Debug, Clone, Default)]
pub struct Scrub {
    /// By node.
    pub nodes: Vec<NodeScrub>,
    /// Records of which no good copy, or too few good shards, were found.
    pub lost: u64,
    /// The first of those.
    pub lost_ids: Vec<Hash>,
    /// Pools that were left out, because they have no nodes yet.
    pub skipped_pools: Vec<String>,
}

/// What a scrub found at one node.
#[derive(Debug, Clone, Default)]
pub struct NodeScrub {
    /// The node's id.
    pub node: String,
    /// Its address.
    pub address: String,
    /// What was found there.
    pub found: Tally,
    /// Why the node was not scrubbed to the end.
    pub failed: Option<NodeError>,
}

/// Why a scrub ended.
#[derive(Debug, thiserror::Error)]
pub enum ScrubError {
    /// The metadata service did not tell what is where.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A pool's placement table cannot be used.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Scrubs all pools, from where `from` says. `tell` is told after each part where the next scrub
/// would go on. Dropping the future at any point does no harm.
///
/// # Errors
/// When the metadata service does not answer. A node that does not answer is no error: it is left
/// out, and says so in the result.
pub async fn scrub(
    repository: &Repository,
    options: ScrubOptions,
    from: v1::ScrubProgress,
    tell: &(dyn Fn(v1::ScrubProgress) + Sync),
) -> Result<Scrub, ScrubError> {
    let catalog = repository.catalog();
    let members = Members::open(repository).await?;
    let mut scrub = Scrub::default();
    scrub.nodes.extend(members.registered().iter().map(|node| NodeScrub {
        node: node.id.clone(),
        address: node.address.clone(),
        ..NodeScrub::default()
    }));
    let pace = Pace::new(options.bytes_per_second);
    let mut pools = catalog.list_pools(v1::ListPoolsRequest {}).await?.pools;
    pools.sort_by_key(|pool| pool.id);
    pools.retain(|pool| pool.id >= from.pool);
    let mut place = v1::ScrubProgress { under_way: true, ..from };
    for pool in pools {
        let (id, name) = (pool.id, pool.name.clone());
        let mut partition = if id == from.pool { from.partition as usize } else { 0 };
        while let Some(layout) = Layout::load(&**catalog, pool.clone()).await?? {
            // The table anew for each part: a scrub takes long, and nodes come and go.
            let Range { end, .. } = layout.partitions();
            if partition >= end {
                break;
            }
            let part = partition..(partition + end.div_ceil(PARTS)).min(end);
            partition = part.end;
            if options.quick {
                for near in scrub.check(&layout, &members, &pace, part).await {
                    scrub.part(&layout, &members, &pace, near..near + 1).await;
                }
            } else {
                scrub.part(&layout, &members, &pace, part).await;
            }
            // Table partitions are counted in 32 bits.
            (place.pool, place.partition) = (id, partition as u32);
            place.damaged_records = from.damaged_records
                + scrub.nodes.iter().map(|node| node.found.damaged).sum::<u64>();
            place.lost_records = from.lost_records + scrub.lost;
            tell(place);
        }
        if partition == 0 {
            scrub.skipped_pools.push(name);
        }
    }
    for node in &mut scrub.nodes {
        node.failed = members.failure(&node.node);
    }
    (place.under_way, place.pool, place.partition) = (false, 0, 0);
    tell(place);
    Ok(scrub)
}

impl Scrub {
    /// Has all nodes check their records of some partitions. Returns the partitions with damage.
    async fn check(
        &mut self,
        layout: &Layout,
        members: &Members,
        pace: &Pace,
        partitions: Range<usize>,
    ) -> BTreeSet<usize> {
        let mut near = BTreeSet::new();
        for at in &mut self.nodes {
            let Some(node) = members.get(&at.node) else { continue };
            for kind in KINDS {
                let before = layout.placement.before(partitions.start);
                let mut after = before.map(|id| behind(kind, id));
                loop {
                    let checked = match node.check(layout.pool, kind, after, CHECK_BYTES).await {
                        Ok(checked) => checked,
                        Err(error) => {
                            members.fail(&at.node, error);
                            break;
                        }
                    };
                    pace.before(checked.bytes).await;
                    at.found.records += checked.records;
                    at.found.bytes += checked.bytes;
                    let id = |wire: &v1::RecordRef| Hash::from_slice(&wire.id);
                    let ids = checked.damaged.iter().filter_map(id);
                    near.extend(ids.map(|id| layout.placement.partition(&id)));
                    let last = checked.last.as_ref().and_then(id);
                    let past =
                        last.is_none_or(|id| layout.placement.partition(&id) >= partitions.end);
                    if !checked.more || past {
                        break;
                    }
                    after = checked.last;
                }
            }
        }
        near
    }

    async fn part(
        &mut self,
        layout: &Layout,
        members: &Members,
        pace: &Pace,
        partitions: Range<usize>,
    ) {
        // At most 512 nodes.
        let nodes: Vec<u32> = (0..layout.placement.nodes().len() as u32).collect();
        let mender = Mender::new(layout, members, pace, Depth::Read, 0);
        pass(&mender, &nodes, partitions, None).await;
        let found = mender.found();
        for node in &mut self.nodes {
            if let Some(more) = found.nodes.get(&node.node) {
                node.found.add(more);
            }
        }
        self.lost += found.lost;
        let room = LOST_TOLD_MAX.saturating_sub(self.lost_ids.len());
        self.lost_ids.extend(found.lost_ids.iter().take(room));
    }
}
