//! Repairs partitions that are near each other: one walk over all nodes that have, or had, any of them.

use std::collections::BTreeSet;

use blobcr_proto::v1;

use super::visible::is_visible;
use super::{RepairError, Repairer};
use crate::layout::Layout;
use crate::members::Members;
use crate::mend::{Depth, Mender};
use crate::pass::pass;

/// Partitions of one stretch at most: what is done is noted after each.
const STRETCH_PARTITIONS: usize = 64;
/// Partitions that need nothing may lie between two of a stretch: to list what they hold costs less
/// than to ask all nodes again.
const STRETCH_GAP: usize = 8;

/// What a partition looked like when a pass over it could not finish it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stuck {
    version: u64,
    revision: Option<u64>,
    /// Nodes that did not answer.
    away: BTreeSet<String>,
    why: Why,
}

/// What a partition waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
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

    pub(super) fn reasons(&self) -> Vec<String> {
        match self.why {
            Why::Nodes => self.away.iter().map(|id| format!("node {id}")).collect(),
            Why::Damage => vec!["damaged records (see `blobcr scrub`)".to_owned()],
            Why::Writers => vec!["writers that began earlier".to_owned()],
        }
    }
}

/// One partition to repair.
pub(super) struct Task {
    pub(super) partition: usize,
    pub(super) debt: Option<v1::Debt>,
    pub(super) moving: bool,
}

/// What all tasks of a pool have in common.
#[derive(Clone, Copy)]
pub(super) struct Under<'a> {
    pub(super) layout: &'a Layout,
    pub(super) members: &'a Members,
    /// Given after the table was seen.
    pub(super) generation: u64,
    /// All writers that may use an older table have ended.
    pub(super) writers_gone: bool,
}

impl Repairer {
    /// Repairs what can be repaired of a stretch, and has that noted.
    pub(super) async fn stretch(
        &self,
        under: &Under<'_>,
        tasks: Vec<Task>,
    ) -> Result<Ends, RepairError> {
        let Under { layout, members, generation, writers_gone } = *under;
        let mut ends = Ends::default();
        let mut open = Vec::new();
        for task in tasks {
            let now = under.stuck(&task, Why::Nodes);
            match self.stuck.get(&(layout.pool, task.partition)) {
                Some(before) if before.lasts(&now, writers_gone) => {
                    ends.left.push((task.partition, Some(before.clone())));
                }
                _ => open.push(task),
            }
        }
        let (Some(first), Some(last)) = (open.first(), open.last()) else { return Ok(ends) };
        let range = first.partition..last.partition + 1;
        let only: BTreeSet<usize> = open.iter().map(|task| task.partition).collect();
        let nodes: BTreeSet<u32> = only.iter().flat_map(|at| layout.sources(*at)).collect();
        let nodes: Vec<u32> = nodes.into_iter().collect();
        // Copies that were there before the partition moved are as safe as new ones only then.
        let floor = if open.iter().any(|task| task.moving) { generation } else { 0 };
        let mender = Mender::new(layout, members, &self.pace, Depth::Listed, floor);
        let passing = pass(&mender, &nodes, range, Some(&only));
        let left = self.meter.watching(&mender, passing).await;
        let mut whole = Vec::new();
        for task in open {
            let left = left.get(&task.partition).copied().unwrap_or_default();
            // Those that went away during the pass count too.
            let silent = under.away(&layout.sources(task.partition));
            let row_answers = under.away(layout.placement.row(task.partition)).is_empty();
            let visible = is_visible(layout.policy, &silent, task.debt.as_ref());
            if left.owing > 0 || !row_answers || !visible {
                ends.left.push((task.partition, Some(under.stuck(&task, Why::Nodes))));
            } else if left.lost > 0 {
                ends.left.push((task.partition, Some(under.stuck(&task, Why::Damage))));
            } else {
                whole.push(task);
            }
        }
        self.note(under, whole, &mut ends).await?;
        let finished = ends.left.iter().filter(|(_, stuck)| stuck.is_none()).count();
        self.meter.partitions_done(finished as u64);
        Ok(ends)
    }

    /// Has the metadata service note which partitions are whole.
    async fn note(
        &self,
        under: &Under<'_>,
        whole: Vec<Task>,
        ends: &mut Ends,
    ) -> Result<(), RepairError> {
        let catalog = self.repository.catalog();
        let (pool, version) = (under.layout.pool, under.layout.placement.version());
        // Table partitions are counted in 32 bits.
        let debts: Vec<v1::SettledDebt> = whole
            .iter()
            .filter_map(|task| Some((task.partition as u32, task.debt.as_ref()?.revision)))
            .map(|(partition, revision)| v1::SettledDebt { partition, revision })
            .collect();
        let mut kept = Vec::new();
        if !debts.is_empty() {
            ends.paid = debts.len() as u64;
            kept = catalog.settle_debts(v1::SettleDebtsRequest { pool, debts }).await?.kept;
            ends.paid -= kept.len() as u64;
        }
        let moved = whole.iter().filter(|task| task.moving).map(|task| task.partition as u32);
        let partitions: Vec<u32> = moved.collect();
        let mut settled = false;
        if under.writers_gone && !partitions.is_empty() {
            let count = partitions.len() as u64;
            let request = v1::SettlePartitionsRequest { pool, partitions, version };
            settled = catalog.settle_partitions(request).await?.settled;
            ends.settled = if settled { count } else { 0 };
        }
        for task in whole {
            let paid = !kept.contains(&(task.partition as u32));
            let stuck = (task.moving && !settled).then(|| {
                let stuck = under.stuck(&task, Why::Writers);
                // The next round finds it without its debt.
                Stuck { revision: stuck.revision.filter(|_| !paid), ..stuck }
            });
            ends.left.push((task.partition, stuck));
        }
        Ok(())
    }
}

impl Under<'_> {
    /// Those of some nodes that do not answer.
    fn away(&self, nodes: &[u32]) -> BTreeSet<String> {
        let ids = nodes.iter().map(|node| self.layout.id(*node));
        ids.filter(|id| self.members.get(id).is_none()).map(str::to_owned).collect()
    }

    /// What a partition that cannot be finished looks like.
    fn stuck(&self, task: &Task, why: Why) -> Stuck {
        Stuck {
            version: self.layout.placement.version(),
            revision: task.debt.as_ref().map(|debt| debt.revision),
            away: self.away(&self.layout.sources(task.partition)),
            why,
        }
    }
}

/// How the work on a stretch ended.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) paid: u64,
    pub(super) settled: u64,
    /// What each partition waits for; `None` for one that is finished.
    pub(super) left: Vec<(usize, Option<Stuck>)>,
}

/// Partitions near each other, in order.
pub(super) fn stretches(tasks: Vec<Task>) -> Vec<Vec<Task>> {
    let mut stretches: Vec<Vec<Task>> = Vec::new();
    for task in tasks {
        let fits = stretches.last().and_then(|stretch| Some((stretch.first()?, stretch.last()?)));
        let fits = fits.is_some_and(|(first, last)| {
            task.partition - last.partition <= STRETCH_GAP
                && task.partition - first.partition < STRETCH_PARTITIONS
        });
        match stretches.last_mut() {
            Some(stretch) if fits => stretch.push(task),
            _ => stretches.push(vec![task]),
        }
    }
    stretches
}
