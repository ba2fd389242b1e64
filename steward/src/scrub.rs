//! Reads every copy on every node down to its identity, and mends what is damaged or missing from a
//! good copy. For pools of replicas.
//!
//! A mended copy is stored with the generation that its good copy has, so that mending does not keep
//! alive what the collector is about to take. Should it take one copy just while another is mended,
//! the mended one goes with the next collection.

mod pace;

use std::collections::{HashMap, HashSet};

use blobcr_proto::policy::Policy;
use blobcr_proto::record::{RecordKey, open};
use blobcr_proto::v1::{self, RecordKind};
use blobcr_proto::{Hash, MESSAGE_BYTES_MAX};
use blobcr_repository::placement::Placement;
use blobcr_repository::{CatalogError, ConnectOptions, Repository};

use crate::node::{Listed, Node, NodeError};
use pace::Pace;

/// Records on one page of a node's list: their identities are held in memory, of each holder.
const LIST_PAGE: u32 = 4096;
/// Bytes of one read: a quarter of a message, and always at least one record.
const READ_BYTES: u64 = MESSAGE_BYTES_MAX as u64 / 4;
/// Lost records that are told one by one; beyond them only their number is.
const LOST_TOLD_MAX: usize = 100;

/// How to scrub.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScrubOptions {
    /// Bytes a second to read at most; 0: as fast as it goes.
    pub bytes_per_second: u64,
}

/// What a scrub came to.
#[derive(Debug, Clone, Default)]
pub struct Scrub {
    /// By node.
    pub nodes: Vec<NodeScrub>,
    /// Records of which no good copy was found.
    pub lost: u64,
    /// The first of those.
    pub lost_ids: Vec<Hash>,
    /// Pools that were left out, because they do not hold replicas or have no nodes yet.
    pub skipped_pools: Vec<String>,
}

/// What a scrub found at one node.
#[derive(Debug, Clone, Default)]
pub struct NodeScrub {
    /// The node's id.
    pub node: String,
    /// Its address.
    pub address: String,
    /// Copies read.
    pub records: u64,
    /// Their bytes, as stored.
    pub bytes: u64,
    /// Copies that were damaged.
    pub damaged: u64,
    /// Copies that should have been there.
    pub missing: u64,
    /// Copies written anew.
    pub mended: u64,
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
    #[error("pool {pool}: {detail}")]
    Placement {
        /// The pool.
        pool: String,
        /// What is wrong.
        detail: String,
    },
}

/// Scrubs all nodes of all pools of replicas. Dropping the future at any point does no harm.
///
/// # Errors
/// When the metadata service does not answer. A node that does not answer is no error: it is left
/// out, and says so in the result.
pub async fn scrub(repository: &Repository, options: ScrubOptions) -> Result<Scrub, ScrubError> {
    let catalog = repository.catalog();
    let registered = catalog.list_nodes(v1::ListNodesRequest {}).await?.nodes;
    let mut work = Work {
        scrub: Scrub::default(),
        at: HashMap::new(),
        open: Vec::new(),
        pace: Pace::new(options.bytes_per_second),
    };
    for node in registered {
        work.open(node, repository.options()).await;
    }
    for pool in catalog.list_pools(v1::ListPoolsRequest {}).await?.pools {
        let invalid = |detail: String| ScrubError::Placement { pool: pool.name.clone(), detail };
        let policy: Policy = pool.policy.parse().map_err(|e| invalid(format!("{e}")))?;
        let by_id = v1::GetPlacementRequest { id: pool.id, ..Default::default() };
        let table = match (policy, catalog.get_placement(by_id).await) {
            (Policy::Replica(_), Ok(table)) => table,
            (_, Ok(_) | Err(CatalogError::Precondition(_))) => {
                work.scrub.skipped_pools.push(pool.name);
                continue;
            }
            (_, Err(error)) => return Err(error.into()),
        };
        let placement =
            Placement::new(table, policy.nodes()).map_err(|e| invalid(e.to_string()))?;
        for at in 0..work.open.len() {
            let place = Place { pool: pool.id, width: policy.nodes(), placement: &placement };
            work.node(at, &place).await;
        }
    }
    Ok(work.scrub)
}

/// Where the records of a pool belong.
struct Place<'a> {
    pool: u32,
    width: usize,
    placement: &'a Placement,
}

/// A page of a node's list: what it has of one kind behind `from`.
struct Page<'a> {
    place: &'a Place<'a>,
    kind: RecordKind,
    from: Option<v1::RecordRef>,
    listed: &'a [Listed],
}

struct Work {
    scrub: Scrub,
    /// From a node's id to its place in `open` and in the result.
    at: HashMap<String, usize>,
    /// `None` for a node that does not answer, or no longer.
    open: Vec<Option<Node>>,
    pace: Pace,
}

impl Work {
    async fn open(&mut self, registered: v1::Node, options: &ConnectOptions) {
        let (node, address) = (registered.id.clone(), registered.address.clone());
        let mut found = NodeScrub { node: node.clone(), address, ..NodeScrub::default() };
        self.at.insert(node, self.open.len());
        match Node::open(registered, options).await {
            Ok(node) => self.open.push(Some(node)),
            Err(error) => {
                found.failed = Some(error);
                self.open.push(None);
            }
        }
        self.scrub.nodes.push(found);
    }

    /// Leaves a node out from now on.
    fn fail(&mut self, at: usize, error: NodeError) {
        tracing::warn!(%error, "not scrubbed to the end");
        self.scrub.nodes[at].failed = Some(error);
        self.open[at] = None;
    }

    /// The nodes that should hold a record, as places in `open`.
    fn holders(&self, place: &Place<'_>, id: &Hash) -> Vec<usize> {
        let nodes = place.placement.nodes();
        let holders = place.placement.holders(id).iter().take(place.width);
        holders.filter_map(|node| self.at.get(&nodes[*node as usize].id).copied()).collect()
    }

    async fn node(&mut self, at: usize, place: &Place<'_>) {
        for kind in [RecordKind::Chunk, RecordKind::TreeNode] {
            let mut from = None;
            loop {
                let Some(node) = self.open[at].clone() else { return };
                let page = node.list(place.pool, kind, from.clone(), LIST_PAGE).await;
                let (page, more) = match page {
                    Ok(page) => page,
                    Err(error) => return self.fail(at, error),
                };
                if let Err(error) = self.read(at, &node, place, &page).await {
                    return self.fail(at, error);
                }
                self.complete(&node, &Page { place, kind, from, listed: &page }).await;
                from = page.last().map(|listed| listed.key.clone());
                if !more {
                    break;
                }
            }
        }
    }

    /// Reads the records of a page, and mends those that are damaged.
    async fn read(
        &mut self,
        at: usize,
        node: &Node,
        place: &Place<'_>,
        page: &[Listed],
    ) -> Result<(), NodeError> {
        let mut rest = page;
        while !rest.is_empty() {
            let (some, behind) = rest.split_at(batch(rest));
            rest = behind;
            let bytes: u64 = some.iter().map(|listed| listed.stored_bytes).sum();
            self.pace.before(bytes).await;
            let refs = some.iter().map(|listed| listed.key.clone()).collect();
            let found = node.get(place.pool, refs).await?;
            for (listed, found) in some.iter().zip(found) {
                let gone = found.record.is_none() && !found.damaged;
                if gone {
                    continue;
                }
                let seen = &mut self.scrub.nodes[at];
                seen.records += 1;
                seen.bytes += listed.stored_bytes;
                if found.record.as_ref().is_none_or(|record| !is_good(record, &listed.key)) {
                    seen.damaged += 1;
                    self.mend(at, node, place, listed).await?;
                }
            }
        }
        Ok(())
    }

    /// Writes a good copy from another holder over a damaged one.
    async fn mend(
        &mut self,
        at: usize,
        node: &Node,
        place: &Place<'_>,
        listed: &Listed,
    ) -> Result<(), NodeError> {
        for other in self.holders(place, &listed.id) {
            let Some(source) = self.open[other].clone().filter(|_| other != at) else { continue };
            let Some(record) = good_copy(&source, place.pool, &listed.key).await else { continue };
            node.put(place.pool, listed.generation, vec![record]).await?;
            self.scrub.nodes[at].mended += 1;
            return Ok(());
        }
        self.scrub.lost += 1;
        if self.scrub.lost_ids.len() < LOST_TOLD_MAX {
            self.scrub.lost_ids.push(listed.id);
        }
        Ok(())
    }

    /// Copies what other holders of a page's records lack.
    async fn complete(&mut self, node: &Node, page: &Page<'_>) {
        let mut wanted: HashMap<usize, Vec<&Listed>> = HashMap::new();
        for listed in page.listed {
            for holder in self.holders(page.place, &listed.id) {
                wanted.entry(holder).or_default().push(listed);
            }
        }
        for (holder, wanted) in wanted {
            let Some(target) = self.open[holder].clone() else { continue };
            if target.registered.id == node.registered.id {
                continue;
            }
            if let Err(error) = self.copy_missing(holder, node, &target, page, &wanted).await {
                self.fail(holder, error);
            }
        }
    }

    async fn copy_missing(
        &mut self,
        at: usize,
        node: &Node,
        target: &Node,
        page: &Page<'_>,
        wanted: &[&Listed],
    ) -> Result<(), NodeError> {
        let pool = page.place.pool;
        let Some(last) = wanted.last().map(|listed| listed.id) else { return Ok(()) };
        let ids: HashSet<Hash> = wanted.iter().map(|listed| listed.id).collect();
        let mut held = HashSet::new();
        let mut from = page.from.clone();
        loop {
            let (its, more) = target.list(pool, page.kind, from, LIST_PAGE).await?;
            from = its.last().map(|listed| listed.key.clone());
            let past = its.last().is_none_or(|listed| listed.id >= last);
            held.extend(its.into_iter().map(|listed| listed.id).filter(|id| ids.contains(id)));
            if !more || past {
                break;
            }
        }
        for listed in wanted.iter().filter(|listed| !held.contains(&listed.id)) {
            self.pace.before(listed.stored_bytes).await;
            // Damaged here as well, or gone meanwhile: another holder's turn finds a good one.
            let Some(record) = good_copy(node, pool, &listed.key).await else { continue };
            let stored = target.put(pool, listed.generation, vec![record]).await?.stored;
            self.scrub.nodes[at].missing += u64::from(stored);
            self.scrub.nodes[at].mended += u64::from(stored);
        }
        Ok(())
    }
}

/// How many of the first records fit one read.
fn batch(listed: &[Listed]) -> usize {
    let mut bytes = 0;
    let fits = |listed: &&Listed| {
        bytes += listed.stored_bytes;
        bytes <= READ_BYTES
    };
    listed.iter().take_while(fits).count().max(1)
}

async fn good_copy(node: &Node, pool: u32, key: &v1::RecordRef) -> Option<v1::Record> {
    let found = node.get(pool, vec![key.clone()]).await.ok()?.pop()?;
    found.record.filter(|record| is_good(record, key))
}

/// Whether a whole record is what it was asked for, down to its identity.
fn is_good(record: &v1::Record, asked: &v1::RecordRef) -> bool {
    let Ok(asked) = RecordKey::try_from(asked) else { return false };
    open(record).is_ok_and(|(key, _)| key == asked)
}
