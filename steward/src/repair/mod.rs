//! Repair and rebalance: pays what was acknowledged with too few copies, and brings what moves to
//! where it belongs. Many nodes copy to many, under one limit on bytes a second.
//!
//! When a partition may be *settled*, so that what held it before is not read any more:
//!
//! 1. **Nobody writes under an older table.** A writer asks for the table with every lease. So the
//!    steward takes a lease after it has seen the table, and waits until all older ones have ended.
//! 2. **A pass that began after that has every object it found on every node of the row**, with one
//!    generation, which no collection that looks at older tables dares to delete.
//! 3. **What it could not see cannot matter.** The nodes that did not answer are so few that each
//!    object which was acknowledged is whole on the others (see `visible.rs`).
//!
//! A *debt* is paid by the same pass, without the first condition: the copies that were acknowledged
//! are there before the debt is, and one that is reported meanwhile is another revision.
//!
//! Nothing here is remembered but to spare work: killed anywhere, another steward begins again.

mod stretch;
mod visible;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::{CatalogError, Repository};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use crate::layout::{Layout, LayoutError};
use crate::members::Members;
use crate::pace::Pace;
use crate::progress::RepairMeter;
use stretch::{Ends, Stuck, Task, Under, stretches};

/// Stretches of partitions that are repaired at the same time.
const STRETCHES_AT_ONCE: usize = 4;
/// The lease needs to live from one call to the next only.
const LEASE_TTL_MS: u64 = 10_000;

/// How to repair.
#[derive(Debug, Clone, Copy, Default)]
pub struct RepairOptions {
    /// Bytes a second to read at most; 0: as fast as it goes.
    pub bytes_per_second: u64,
}

/// What one round came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Partitions that were owing or moving when the round began.
    pub partitions: u64,
    /// Debts that are paid.
    pub paid: u64,
    /// Partitions that have moved.
    pub settled: u64,
    /// What is left waits for these: nodes, or writers.
    pub waits_for: BTreeSet<String>,
}

/// Why a round ended before it was done.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// The metadata service did not tell what there is to do, or did not note what was done.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A pool's placement table cannot be used.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// A table that was seen, and a generation that was given afterwards.
#[derive(Debug, Clone, Copy)]
struct Seen {
    version: u64,
    generation: u64,
}

/// Repairs, round after round.
#[derive(Debug)]
pub struct Repairer {
    repository: Repository,
    pace: Pace,
    meter: RepairMeter,
    seen: HashMap<u32, Seen>,
    stuck: HashMap<(u32, usize), Stuck>,
}

impl Repairer {
    /// A repairer that has done nothing yet.
    #[must_use]
    pub fn new(repository: Repository, options: RepairOptions) -> Self {
        Self {
            repository,
            pace: Pace::new(options.bytes_per_second),
            meter: RepairMeter::default(),
            seen: HashMap::new(),
            stuck: HashMap::new(),
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<v1::RepairProgress> {
        self.meter.watch()
    }

    /// Looks for what there is to do, and does what can be done of it now. Dropping the future at
    /// any point does no harm.
    ///
    /// # Errors
    /// When the metadata service does not answer. A node that does not answer is no error: what
    /// needs it is left to a later round.
    pub async fn round(&mut self) -> Result<Repaired, RepairError> {
        let catalog = self.repository.catalog().clone();
        let mut work = Vec::new();
        for pool in catalog.list_pools(v1::ListPoolsRequest {}).await?.pools {
            // The debts before the table: so a debt's nodes are in the table that repairs it.
            let debts = debts(&self.repository, pool.id).await?;
            let Some(layout) = Layout::load(&*catalog, pool).await?? else { continue };
            let tasks = tasks(&layout, debts);
            if !tasks.is_empty() {
                work.push((layout, tasks));
            }
        }
        let partitions: usize = work.iter().map(|(_, tasks)| tasks.len()).sum();
        let mut done = Repaired { partitions: partitions as u64, ..Repaired::default() };
        if work.is_empty() {
            self.meter.nothing_to_do();
            self.stuck.clear();
            return Ok(done);
        }
        let members = Members::open(&self.repository).await?;
        self.meter.begin(done.partitions);
        for (layout, tasks) in work {
            self.pool(&layout, tasks, &members, &mut done).await?;
        }
        self.meter.end(&done.waits_for);
        Ok(done)
    }

    async fn pool(
        &mut self,
        layout: &Layout,
        tasks: Vec<Task>,
        members: &Members,
        done: &mut Repaired,
    ) -> Result<(), RepairError> {
        let version = layout.placement.version();
        let generation = self.generation_since(layout.pool, version).await?;
        let request = v1::CollectionBoundRequest {};
        let bound = self.repository.catalog().get_collection_bound(request).await?.generation;
        // Read before the pass begins.
        let writers_gone = bound >= generation;
        let under = Under { layout, members, generation, writers_gone };
        let mut stretches = stretches(tasks).into_iter();
        let mut ended = Vec::new();
        let mut under_way = FuturesUnordered::new();
        loop {
            if under_way.len() < STRETCHES_AT_ONCE
                && let Some(stretch) = stretches.next()
            {
                under_way.push(self.stretch(&under, stretch));
                continue;
            }
            let Some(end) = under_way.next().await else { break };
            ended.push(end);
        }
        drop(under_way);
        for end in ended {
            let Ends { paid, settled, left } = end?;
            done.paid += paid;
            done.settled += settled;
            for (partition, stuck) in left {
                let key = (layout.pool, partition);
                match stuck {
                    Some(stuck) => {
                        done.waits_for.extend(stuck.reasons());
                        self.stuck.insert(key, stuck);
                    }
                    None => drop(self.stuck.remove(&key)),
                }
            }
        }
        Ok(())
    }

    /// A generation that was given after this version of the table was seen: all writers that may
    /// use an older one have smaller ones.
    async fn generation_since(&mut self, pool: u32, version: u64) -> Result<u64, CatalogError> {
        if let Some(seen) = self.seen.get(&pool).filter(|seen| seen.version == version) {
            return Ok(seen.generation);
        }
        let catalog = self.repository.catalog();
        let request = v1::AcquireLeaseRequest { holder: "repair".into(), ttl_ms: LEASE_TTL_MS };
        let lease = catalog.acquire_lease(request).await?;
        let release = v1::ReleaseLeaseRequest { lease_id: lease.id };
        if let Err(error) = catalog.release_lease(release).await {
            tracing::debug!(%error, "the lease of a repair was not released: it will run out");
        }
        self.seen.insert(pool, Seen { version, generation: lease.generation });
        Ok(lease.generation)
    }
}

/// What a pool owes, by partition.
async fn debts(
    repository: &Repository,
    pool: u32,
) -> Result<BTreeMap<usize, v1::Debt>, CatalogError> {
    let mut debts = BTreeMap::new();
    let mut request = v1::ListDebtRequest { pool, after: None, limit: 0 };
    loop {
        let page = repository.catalog().list_debt(request).await?;
        request.after = page.debts.last().map(|debt| debt.partition);
        debts.extend(page.debts.into_iter().map(|debt| (debt.partition as usize, debt)));
        if !page.more || request.after.is_none() {
            return Ok(debts);
        }
    }
}

fn tasks(layout: &Layout, mut debts: BTreeMap<usize, v1::Debt>) -> Vec<Task> {
    let task = |partition| {
        let debt = debts.remove(&partition);
        let moving = !layout.placement.moving_from(partition).is_empty();
        (debt.is_some() || moving).then_some(Task { partition, debt, moving })
    };
    layout.partitions().filter_map(task).collect()
}

/// From one look for work to the next, while there is none or it waits.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);
