//! Garbage collection.
//!
//! What may go is a record that no live root reaches and that no writer may rely on. The order of
//! the steps is what makes that right while disks commit, images are cloned and removed, and writers
//! pause at any point. Nothing here makes any of them wait.
//!
//! 1. **A lease is taken**, of generation *g*. Every lease given later has a higher one.
//! 2. **The bound is read**: the oldest generation of a lease that has not ended, *g* at the most. A
//!    lease that ran out counts until the version manager has failed what was pending under it. So
//!    whatever a writer touches from now on, if it can still be published, gets a generation of the
//!    bound or above, and the same is true of what was touched before under a lease that is alive.
//! 3. **The roots are listed**: all stable snapshots, and those that became obsolete in the bound's
//!    generation or later. So every root that lived at any moment since step 2 is listed, unless it
//!    was published since. That one's new records were touched under a lease, see 2; what it shares
//!    with its base is reached from the base, which was its image's latest, or pinned, until then,
//!    and so is listed itself. A clone has the root of a snapshot that was stable, so one of the two
//!    is listed whatever the order.
//! 4. **Everything the roots reach is marked.** When a tree cannot be read whole, the collection ends
//!    here, and says which.
//! 5. **What is unmarked and was last touched before the bound is deleted.** The node compares the
//!    generation itself, in the order of its writes: a touch that comes first saves the record, and
//!    one that comes later says that it is missing, so that the writer stores it again.
//!
//! What lies on a node that its pool's table does not name for it goes as well, marked or not, once
//! its partition has settled. The tables are read after the bound, so a table that gives the node
//! such records again is either seen here, or newer than the bound: then whatever repair counts on
//! there has a generation above it (see `repair`).
//!
//! Marks are exact and have a budget. When they do not fit, a pass covers only as much of the range
//! of identities as does, and steps 3 to 5 are repeated for the rest, with the same bound.

mod marks;

use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_repository::tree::{GeometryError, NodeSource, Reached, Root, TreeError, for_each_node};
use blobcr_repository::{CatalogError, ConnectOptions, Repository};
use futures::{StreamExt, stream};

use crate::layout::{KINDS, Layout, LayoutError};
use crate::node::{Listed, Node, NodeError, behind};
use marks::{Marks, Visited};

/// Memory for the marks of one pass: two million identities.
pub const MARK_BYTES: usize = 64 << 20;
/// Memory for the tree nodes that a pass has been at: about a million.
pub const VISITED_BYTES: usize = 32 << 20;

/// The lease needs to live from the first step to the second only.
const LEASE_TTL_MS: u64 = 60_000;
/// Roots in one answer.
const ROOTS_PAGE: u32 = 1000;
/// Records on one page of a node's list: about a megabyte.
const LIST_PAGE: u32 = 16_384;
/// Records of one delete: one group of the node's writer, so that writers wait only briefly.
const DELETED_AT_ONCE: usize = 1024;
/// Nodes that are swept at the same time.
const NODES_AT_ONCE: usize = 8;

/// How to collect.
#[derive(Debug, Clone, Copy)]
pub struct CollectOptions {
    /// Tell what would go, and delete nothing.
    pub dry_run: bool,
    /// Memory for marks: [`MARK_BYTES`].
    pub mark_bytes: usize,
    /// Memory for tree nodes visited: [`VISITED_BYTES`].
    pub visited_bytes: usize,
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self { dry_run: false, mark_bytes: MARK_BYTES, visited_bytes: VISITED_BYTES }
    }
}

/// What a collection came to.
#[derive(Debug, Clone, Default)]
pub struct Collection {
    /// What was touched in this generation or later was spared.
    pub bound: u64,
    /// Roots that were live when they were listed last.
    pub roots: u64,
    /// Passes over all trees.
    pub passes: u64,
    /// What went (or would go), by node.
    pub nodes: Vec<NodeCollection>,
}

impl Collection {
    /// Records that went, copies counted each.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.nodes.iter().map(|node| node.chunks + node.tree_nodes).sum()
    }

    /// Bytes of those on the nodes' disks, where compaction wins them back.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.nodes.iter().map(|node| node.bytes).sum()
    }
}

/// What a collection did at one node.
#[derive(Debug, Clone, Default)]
pub struct NodeCollection {
    /// The node's id.
    pub node: String,
    /// Its address.
    pub address: String,
    /// Records looked at.
    pub examined: u64,
    /// Chunks that went.
    pub chunks: u64,
    /// Tree nodes that went.
    pub tree_nodes: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Of the chunks and tree nodes, those that are where they do not belong any more.
    pub misplaced: u64,
    /// Unmarked records that a writer may need, and that were left for that.
    pub spared: u64,
    /// Why the node was not swept to the end; what is left there goes the next time.
    pub failed: Option<NodeError>,
}

/// Why a collection ended before anything more was deleted.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The metadata service did not tell what must be kept.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A pool's placement table cannot be used.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A live root's tree cannot be read whole, so nobody knows what it needs.
    #[error(
        "nothing more is collected: the tree of {image}@{number} cannot be read ({error}); run \
         `blobcr scrub`, or remove that snapshot if it is lost"
    )]
    Tree {
        /// Its image.
        image: String,
        /// Its number.
        number: u64,
        /// What is wrong.
        error: TreeError,
    },
    /// A root makes no sense.
    #[error("nothing more is collected: the root of {image}@{number} is malformed: {error}")]
    Root {
        /// Its image.
        image: String,
        /// Its number.
        number: u64,
        /// What is wrong.
        error: GeometryError,
    },
}

/// Deletes what nothing needs, as the module says. Dropping the future at any point leaves the
/// repository whole.
///
/// # Errors
/// When the metadata service does not answer, or a live root's tree cannot be read. A node that does
/// not answer is no error: it is left out, and says so in the result.
pub async fn collect(
    repository: &Repository,
    options: CollectOptions,
) -> Result<Collection, CollectError> {
    let catalog = repository.catalog();
    let bound = bound(repository).await?;
    let mut collection = Collection { bound, ..Collection::default() };
    let registered = catalog.list_nodes(v1::ListNodesRequest {}).await?.nodes;
    let mut nodes: Vec<Sweeper> = stream::iter(registered)
        .map(|node| Sweeper::open(node, repository.options(), bound, options.dry_run))
        .buffered(NODES_AT_ONCE)
        .collect()
        .await;
    for pool in catalog.list_pools(v1::ListPoolsRequest {}).await?.pools {
        // After the bound: see the module.
        let layout = Layout::load(&**catalog, pool.clone()).await??;
        let layout = layout.as_ref();
        let mut after = None;
        loop {
            let mut marks = Marks::new(after, options.mark_bytes);
            let roots = mark(repository, pool.id, bound, options, &mut marks).await?;
            marks.settle();
            collection.passes += 1;
            if after.is_none() {
                collection.roots += roots;
            }
            let marks_ref = &marks;
            let sweep = |mut node: Sweeper| async move {
                node.sweep(Range { pool: pool.id, layout, after, marks: marks_ref }).await;
                node
            };
            nodes = stream::iter(nodes).map(sweep).buffered(NODES_AT_ONCE).collect().await;
            after = marks.last();
            if after.is_none() {
                break;
            }
        }
    }
    collection.nodes = nodes.into_iter().map(|node| node.done).collect();
    Ok(collection)
}

/// Steps 1 and 2.
async fn bound(repository: &Repository) -> Result<u64, CatalogError> {
    let catalog = repository.catalog();
    let request = v1::AcquireLeaseRequest { holder: "the collector".into(), ttl_ms: LEASE_TTL_MS };
    let lease = catalog.acquire_lease(request).await?;
    let bound = catalog.get_collection_bound(v1::CollectionBoundRequest {}).await;
    // Only its generation was wanted. One that is not released runs out.
    let release = v1::ReleaseLeaseRequest { lease_id: lease.id };
    if let Err(error) = catalog.release_lease(release).await {
        tracing::debug!(%error, "the collector's lease was not released: it will run out");
    }
    #[cfg(feature = "planted-bugs")]
    if blobcr_proto::planted::has(blobcr_proto::planted::Bug::CollectLeased) {
        return Ok(lease.generation);
    }
    // Should the lease have ended before the bound was read, it counts all the same.
    Ok(bound?.generation.min(lease.generation))
}

/// Marks what the roots of a pool reach. Returns how many roots there are.
async fn mark(
    repository: &Repository,
    pool: u32,
    bound: u64,
    options: CollectOptions,
    marks: &mut Marks,
) -> Result<u64, CollectError> {
    let source = repository.nodes(pool).await?;
    let mut visited = Visited::new(options.visited_bytes);
    let mut roots = 0;
    let mut after = None;
    loop {
        let request = v1::ListRootsRequest { since_generation: bound, after, limit: ROOTS_PAGE };
        let page = repository.catalog().list_roots(request).await?;
        for root in page.roots.into_iter().filter(|root| root.pool == pool) {
            roots += 1;
            mark_root(&source, root, &mut visited, marks).await?;
        }
        after = page.next;
        if after.is_none() {
            return Ok(roots);
        }
    }
}

async fn mark_root(
    source: &Arc<dyn NodeSource>,
    live: v1::LiveRoot,
    visited: &mut Visited,
    marks: &mut Marks,
) -> Result<(), CollectError> {
    let v1::LiveRoot { image, number, root, .. } = live;
    let root = match Root::try_from(&root.unwrap_or_default()) {
        Ok(root) => root,
        Err(error) => return Err(CollectError::Root { image, number, error }),
    };
    let mut visit = |reached| match reached {
        Reached::Node { id, .. } => {
            marks.mark(id);
            visited.is_first(id)
        }
        Reached::Chunk { id, .. } => {
            marks.mark(id);
            true
        }
    };
    let walked = for_each_node(&**source, &root, &mut visit).await;
    walked.map_err(|error| CollectError::Tree { image, number, error })
}

/// What a pass sweeps of one pool.
#[derive(Clone, Copy)]
struct Range<'a> {
    pool: u32,
    /// Absent while the pool has no table.
    layout: Option<&'a Layout>,
    after: Option<Hash>,
    marks: &'a Marks,
}

impl Range<'_> {
    /// Whether the node is to have the record, as far as the table says.
    fn belongs(&self, node: Option<u32>, listed: &Listed) -> bool {
        let Ok(key) = RecordKey::try_from(&listed.key) else { return true };
        self.layout.is_none_or(|layout| layout.belongs(node, &key))
    }
}

/// Sweeps one node.
struct Sweeper {
    node: Option<Node>,
    bound: u64,
    dry_run: bool,
    done: NodeCollection,
}

impl Sweeper {
    async fn open(
        registered: v1::Node,
        options: &ConnectOptions,
        bound: u64,
        dry_run: bool,
    ) -> Self {
        let (node, address) = (registered.id.clone(), registered.address.clone());
        let mut done = NodeCollection { node, address, ..NodeCollection::default() };
        let node = match Node::open(registered, options).await {
            Ok(node) => Some(node),
            Err(error) => {
                done.failed = Some(error);
                None
            }
        };
        Self { node, bound, dry_run, done }
    }

    /// Sweeps a range. A node that failed once is left out from then on.
    async fn sweep(&mut self, range: Range<'_>) {
        let Some(node) = self.node.take() else { return };
        for kind in KINDS {
            if let Err(error) = self.sweep_kind(&node, kind, range).await {
                tracing::warn!(%error, "not swept to the end");
                self.done.failed = Some(error);
                return;
            }
        }
        self.node = Some(node);
    }

    async fn sweep_kind(
        &mut self,
        node: &Node,
        kind: RecordKind,
        range: Range<'_>,
    ) -> Result<(), NodeError> {
        let Range { pool, layout, after, marks } = range;
        let at = layout.and_then(|layout| layout.find(&node.registered.id));
        let mut from = after.map(|id| behind(kind, id));
        loop {
            let (page, more) = node.list(pool, kind, from, LIST_PAGE).await?;
            from = page.last().map(|listed| listed.key.clone());
            let listed = page.len();
            let within: Vec<Listed> =
                page.into_iter().filter(|listed| marks.covers(&listed.id)).collect();
            // What lies beyond the range is behind everything in it.
            let more = more && within.len() == listed;
            self.done.examined += within.len() as u64;
            let (marked, unmarked): (Vec<Listed>, Vec<Listed>) =
                within.into_iter().partition(|listed| marks.contains(&listed.id));
            let old = |listed: &Listed| listed.generation < self.bound;
            let (mut garbage, spared): (Vec<Listed>, Vec<Listed>) =
                unmarked.into_iter().partition(old);
            let misplaced = marked.into_iter().filter(old);
            let misplaced: Vec<Listed> =
                misplaced.filter(|listed| !range.belongs(at, listed)).collect();
            self.done.spared += spared.len() as u64;
            self.done.misplaced += misplaced.len() as u64;
            garbage.extend(misplaced);
            for some in garbage.chunks(DELETED_AT_ONCE) {
                self.delete(node, pool, kind, some).await?;
            }
            if !more {
                return Ok(());
            }
        }
    }

    async fn delete(
        &mut self,
        node: &Node,
        pool: u32,
        kind: RecordKind,
        garbage: &[Listed],
    ) -> Result<(), NodeError> {
        let mut records = garbage.len() as u64;
        let mut bytes: u64 = garbage.iter().map(|listed| listed.stored_bytes).sum();
        if !self.dry_run {
            let refs = garbage.iter().map(|listed| listed.key.clone()).collect();
            let deleted = node.delete(pool, refs, self.bound).await?;
            self.done.spared += u64::from(deleted.kept);
            if u64::from(deleted.deleted) != records {
                // Some were touched in this very moment: they count as of mean size.
                bytes = bytes / records.max(1) * u64::from(deleted.deleted);
                records = u64::from(deleted.deleted);
            }
        }
        self.done.bytes += bytes;
        match kind {
            RecordKind::TreeNode => self.done.tree_nodes += records,
            _ => self.done.chunks += records,
        }
        Ok(())
    }
}
