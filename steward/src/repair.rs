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
//!    object which was acknowledged is whole on the others (see [`is_visible`]).
//!
//! A *debt* is paid by the same pass, without the first condition: the copies that were acknowledged
//! are there before the debt is, and one that is reported meanwhile is another revision.
//!
//! Nothing here is remembered but to spare work: killed anywhere, another steward begins again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use blobcr_proto::policy::Policy;
use blobcr_proto::v1::{self, RecordKind};
use blobcr_repository::{CatalogError, Repository};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use crate::layout::{Layout, LayoutError};
use crate::members::Members;
use crate::mend::{Depth, Mender};
use crate::pace::Pace;
use crate::pass::pass;
use crate::progress::RepairMeter;

/// Partitions that are repaired at the same time.
const PARTITIONS_AT_ONCE: usize = 4;
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

/// What a partition looked like when a pass over it could not finish it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stuck {
    version: u64,
    revision: Option<u64>,
    /// Nodes that did not answer.
    away: BTreeSet<String>,
    why: Why,
}

/// What a partition waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Nodes that do not answer, or do not take what they are given.
    Nodes,
    /// Damaged records of which no good copy is left.
    Damage,
    /// Writers that may use an older table.
    Writers,
}

impl Stuck {
    /// Whether another pass now could only find the same.
    fn lasts(&self, now: &Self, writers_gone: bool) -> bool {
        let unchanged = Self { why: self.why, ..now.clone() } == *self;
        unchanged
            && match self.why {
                Why::Nodes => !self.away.is_empty(),
                Why::Damage => false,
                Why::Writers => !writers_gone,
            }
    }

    fn reasons(&self) -> Vec<String> {
        match self.why {
            Why::Nodes => self.away.iter().map(|id| format!("node {id}")).collect(),
            Why::Damage => vec!["damaged records (see `blobcr scrub`)".to_owned()],
            Why::Writers => vec!["writers that began earlier".to_owned()],
        }
    }
}

/// One partition to repair.
struct Task {
    partition: usize,
    debt: Option<v1::Debt>,
    moving: bool,
}

/// What all tasks of a pool have in common.
struct Under<'a> {
    layout: &'a Layout,
    members: &'a Members,
    /// Given after the table was seen.
    generation: u64,
    /// All writers that may use an older table have ended.
    writers_gone: bool,
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
        let mut ended = Vec::with_capacity(tasks.len());
        let mut tasks = tasks.into_iter();
        let mut under_way = FuturesUnordered::new();
        loop {
            if under_way.len() < PARTITIONS_AT_ONCE
                && let Some(task) = tasks.next()
            {
                under_way.push(self.task(&under, task));
                continue;
            }
            let Some(end) = under_way.next().await else { break };
            ended.push(end);
        }
        drop(under_way);
        for (task, end) in ended {
            let key = (layout.pool, task.partition);
            let end = end?;
            done.paid += u64::from(end.paid);
            done.settled += u64::from(end.settled);
            match end.stuck {
                Some(stuck) => {
                    done.waits_for.extend(stuck.reasons());
                    self.stuck.insert(key, stuck);
                }
                None => drop(self.stuck.remove(&key)),
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

    async fn task(&self, under: &Under<'_>, task: Task) -> (Task, Result<End, RepairError>) {
        let end = self.one(under, &task).await;
        if end.as_ref().is_ok_and(|end| end.stuck.is_none()) {
            self.meter.partition_done();
        }
        (task, end)
    }

    async fn one(&self, under: &Under<'_>, task: &Task) -> Result<End, RepairError> {
        let Under { layout, members, generation, writers_gone } = *under;
        let sources = layout.sources(task.partition);
        let away = |nodes: &[u32]| -> BTreeSet<String> {
            let ids = nodes.iter().map(|node| layout.id(*node));
            ids.filter(|id| members.get(id).is_none()).map(str::to_owned).collect()
        };
        let stuck = |away, why| Stuck {
            version: layout.placement.version(),
            revision: task.debt.as_ref().map(|debt| debt.revision),
            away,
            why,
        };
        if let Some(before) = self.stuck.get(&(layout.pool, task.partition))
            && before.lasts(&stuck(away(&sources), Why::Nodes), writers_gone)
        {
            return Ok(End { stuck: Some(before.clone()), ..End::default() });
        }
        let floor = if task.moving { generation } else { 0 };
        let mender = Mender::new(layout, members, &self.pace, Depth::Listed, floor);
        let range = task.partition..task.partition + 1;
        let watched = self.meter.watching(&mender, pass(&mender, &sources, range));
        let passed = watched.await;
        // Those that went away during the pass count too.
        let row_answers = away(layout.placement.row(task.partition)).is_empty();
        let silent = away(&sources);
        let visible = is_visible(layout.policy, &silent, task.debt.as_ref());
        if passed.owing > 0 || !row_answers || !visible {
            return Ok(End { stuck: Some(stuck(silent, Why::Nodes)), ..End::default() });
        }
        if passed.lost > 0 {
            return Ok(End { stuck: Some(stuck(silent, Why::Damage)), ..End::default() });
        }
        self.finish(layout, task, writers_gone, stuck(silent, Why::Writers)).await
    }

    /// Has the metadata service note what was done.
    async fn finish(
        &self,
        layout: &Layout,
        task: &Task,
        writers_gone: bool,
        waits_for_writers: Stuck,
    ) -> Result<End, RepairError> {
        let catalog = self.repository.catalog();
        // Table partitions are counted in 32 bits.
        let (pool, partition) = (layout.pool, task.partition as u32);
        let mut end = End::default();
        if let Some(debt) = &task.debt {
            let request = v1::SettleDebtRequest { pool, partition, revision: debt.revision };
            end.paid = catalog.settle_debt(request).await?.settled;
        }
        if task.moving && writers_gone {
            let version = layout.placement.version();
            let request = v1::SettlePartitionRequest { pool, partition, version };
            end.settled = catalog.settle_partition(request).await?.settled;
        } else if task.moving {
            // Its debt is paid: the next round finds it without one.
            let revision = waits_for_writers.revision.filter(|_| !end.paid);
            end.stuck = Some(Stuck { revision, ..waits_for_writers });
        }
        Ok(end)
    }
}

/// How the work on one partition ended.
#[derive(Debug, Default)]
struct End {
    paid: bool,
    settled: bool,
    stuck: Option<Stuck>,
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

/// Whether every object that was acknowledged is whole on the nodes that answered, of all that have
/// held the partition. An object that nobody is owed for is on every node of its row. One that is
/// owed for is on as many as a write needs at least, and lacks at most on those that the debt names.
fn is_visible(policy: Policy, silent: &BTreeSet<String>, debt: Option<&v1::Debt>) -> bool {
    let kinds = [RecordKind::Chunk, RecordKind::TreeNode].map(|kind| policy.of(kind));
    kinds.iter().all(|policy| {
        let needed = match policy {
            Policy::Replica(_) => 1,
            Policy::Erasure { data, .. } => usize::from(*data),
        };
        let whole = policy.nodes().saturating_sub(silent.len());
        let Some(debt) = debt else { return whole >= needed };
        let least = policy.write_least().saturating_sub(silent.len());
        let named = !debt.missed_nodes.is_empty();
        let without = silent.iter().chain(&debt.missed_nodes).collect::<BTreeSet<_>>().len();
        let beside = policy.nodes().saturating_sub(without);
        least >= needed || (named && beside >= needed)
    })
}

/// From one look for work to the next, while there is none or it waits.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn owes(missed: &[&str]) -> Option<v1::Debt> {
        let missed_nodes = missed.iter().map(|id| (*id).to_owned()).collect();
        Some(v1::Debt { objects: 1, missed_nodes, ..v1::Debt::default() })
    }

    #[test]
    fn what_cannot_be_seen_is_not_given_up() {
        let two = "replica:2".parse().unwrap();
        let three = "replica:3".parse().unwrap();
        let shards = "ec:4+2".parse().unwrap();
        for (policy, silent, debt, visible) in [
            (two, &["a"][..], None, true),
            (two, &["a", "b"], None, false),
            // It was away while others wrote, and is lost: the others have everything.
            (two, &["a"], owes(&["a"]), true),
            // The others were away: what was written then may be on the lost ones alone.
            (three, &["a", "b"], owes(&["c"]), false),
            (three, &["a"], owes(&["c"]), true),
            (three, &["a"], owes(&[]), true),
            (three, &["a", "b"], owes(&[]), false),
            (three, &["a", "b"], owes(&["a", "b"]), true),
            (shards, &["a", "b"], None, true),
            (shards, &["a", "b", "c"], None, false),
            (shards, &["a"], owes(&["b"]), true),
            (shards, &["a", "b"], owes(&["a"]), true),
            (shards, &["a", "b"], owes(&["c"]), false),
            (shards, &[], owes(&[]), true),
        ] {
            assert_eq!(
                is_visible(policy, &nodes(silent), debt.as_ref()),
                visible,
                "{policy} {silent:?}"
            );
        }
    }
}
