//! Which nodes hold each partition of a pool.

use std::collections::{BTreeMap, BTreeSet};

use blobcr_proto::v1;
use blobcr_proto::v1::NodeState;

use super::rebalance::{OldRow, rebalance};
use super::{Held, RecordSwap, VersionManager, mix64, until_won};
use crate::error::Error;
use crate::records::{
    Counter, CounterRecord, KeyKind, MovingFrom, NodeRecord, PART_ROWS, PlacementPartRecord,
    PlacementRecord, PoolRecord, Record, RecordError, TABLE_NODES_MAX, prefix_of,
};
use crate::store::Swap;
use blobcr_proto::policy::{POLICY_NODES_MAX, Policy};

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
        ranked(hashes.get(node).copied().unwrap_or_default(), partition)
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

/// How high a partition ranks a node; rendezvous hashing.
pub(super) fn ranked(node: u64, partition: u32) -> u64 {
    mix64(node ^ mix64(u64::from(partition)))
}

pub(super) fn hash(id: &str) -> u64 {
    blobcr_proto::Hash::of(id.as_bytes()).prefix()
}

/// Who holds one partition, and who held it before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Row {
    nodes: Vec<u32>,
    from: Vec<u32>,
}

/// The newest table of a pool, as it was read.
#[derive(Debug)]
struct Table {
    head: Held<PlacementRecord>,
    parts: Vec<Held<PlacementPartRecord>>,
    rows: Vec<Row>,
}

fn damaged(head: &PlacementRecord, detail: &str) -> Error {
    Error::Record(RecordError::Damaged { key: head.key(), detail: detail.to_owned() })
}

impl Table {
    fn new(
        head: Held<PlacementRecord>,
        parts: Vec<Held<PlacementPartRecord>>,
    ) -> Result<Self, Error> {
        let mut rows: Vec<Row> = Vec::with_capacity(head.value.partitions as usize);
        for part in &parts {
            let first = rows.len();
            let nodes = part.value.rows.chunks(head.value.width as usize);
            rows.extend(nodes.map(|row| Row { nodes: row.to_vec(), from: Vec::new() }));
            for moving in &part.value.moving {
                if let Some(row) = rows.get_mut(first + moving.row as usize) {
                    row.from.clone_from(&moving.nodes);
                }
            }
        }
        let whole = |row: &Row| {
            row.nodes.len() == head.value.width as usize
                && row.nodes.iter().chain(&row.from).all(|n| (*n as usize) < head.value.nodes.len())
        };
        if rows.len() != head.value.partitions as usize || !rows.iter().all(whole) {
            return Err(damaged(&head.value, "the rows of the table do not fit it"));
        }
        Ok(Self { head, parts, rows })
    }
}

fn parts_of(head: &PlacementRecord, rows: &[Row]) -> Vec<PlacementPartRecord> {
    let part = |(rows, part): (&[Row], u32)| PlacementPartRecord {
        pool: head.pool,
        version: head.version,
        part,
        rows: rows.iter().flat_map(|row| row.nodes.iter().copied()).collect(),
        moving: (0..)
            .zip(rows)
            .filter(|(_, row)| !row.from.is_empty())
            .map(|(at, row)| MovingFrom { row: at, nodes: row.from.clone() })
            .collect(),
    };
    rows.chunks(PART_ROWS).zip(0..).map(part).collect()
}

fn candidate(node: &NodeRecord) -> Candidate {
    Candidate { id: node.id.clone(), domain: node.failure_domain().to_owned() }
}

impl VersionManager {
    /// The table of a pool. It is made when it is first asked for after enough nodes have
    /// registered, of all nodes that are there by then; [`VersionManager::place`] changes it.
    ///
    /// # Errors
    /// [`Error::Precondition`] while too few nodes are up for the pool's policy.
    pub async fn get_placement(
        &self,
        r: v1::GetPlacementRequest,
    ) -> Result<v1::PlacementTable, Error> {
        let pool = self.pool_record(&v1::PoolRef { name: r.name, id: r.id }).await?.value;
        if r.known_version != 0 {
            let head = self.load::<PlacementRecord>(PlacementRecord::key_of(pool.id)).await?;
            if head.is_some_and(|head| head.value.version == r.known_version) {
                let (pool, version) = (pool.id, r.known_version);
                return Ok(v1::PlacementTable { pool, version, ..Default::default() });
            }
        }
        let table = match self.table(pool.id).await? {
            Some(table) => table,
            None => {
                let object = format!("pool {:?}", pool.name);
                until_won!(self, object, self.build_table(&pool).await)?;
                let table = self.table(pool.id).await?;
                table.ok_or_else(|| Error::Contended { object: format!("pool {:?}", pool.name) })?
            }
        };
        self.wire_table(&table).await
    }

    /// The newest table of a pool, if it has one.
    async fn table(&self, pool: u32) -> Result<Option<Table>, Error> {
        let key = PlacementRecord::key_of(pool);
        let mut head = self.load::<PlacementRecord>(key.clone()).await?;
        while let Some(found) = head {
            let mut parts = Vec::new();
            for part in 0..found.value.parts() {
                let key = PlacementPartRecord::key_of(pool, found.value.version, part);
                parts.extend(self.load::<PlacementPartRecord>(key).await?);
            }
            if parts.len() == usize::from(found.value.parts()) {
                return Table::new(found, parts).map(Some);
            }
            // A new table takes the parts of the old one with it.
            head = self.load::<PlacementRecord>(key.clone()).await?;
            if head.as_ref().is_some_and(|newer| newer.version == found.version) {
                return Err(damaged(&found.value, "a part of the table is missing"));
            }
        }
        Ok(None)
    }

    /// Nodes that partitions may be given to. Not one at whose address another was heard of since: in
    /// one row, the two would be taken for two nodes, and one machine would get what is meant for both.
    fn places(&self, nodes: &[Held<NodeRecord>]) -> Vec<Candidate> {
        let fit = |node: &NodeRecord| {
            matches!(self.node_state(node), NodeState::Up | NodeState::Suspected)
        };
        let nodes = || nodes.iter().map(|node| &node.value);
        let mut at: BTreeMap<&str, &NodeRecord> = BTreeMap::new();
        for node in nodes().filter(|node| node.removed_unix_ms == 0) {
            let newest = at.entry(&node.address).or_insert(node);
            if node.last_seen_unix_ms > newest.last_seen_unix_ms {
                *newest = node;
            }
        }
        let there =
            |node: &NodeRecord| at.get(node.address.as_str()).is_some_and(|n| n.id == node.id);
        nodes().filter(|node| fit(node) && there(node)).map(candidate).collect()
    }

    async fn build_table(&self, pool: &PoolRecord) -> Result<(), Error> {
        let (_, swap) = self.count(Counter::Membership, 1, Swap::new()).await?;
        if self.load::<PlacementRecord>(PlacementRecord::key_of(pool.id)).await?.is_some() {
            return Ok(());
        }
        let policy: Policy = pool.policy.parse().map_err(Error::invalid)?;
        let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        let mut candidates = self.places(&nodes);
        candidates.truncate(TABLE_NODES_MAX);
        if candidates.len() < policy.nodes() {
            return Err(Error::precondition(
                format!("pool {:?}", pool.name),
                format!(
                    "needs {} nodes for {policy} and {} have registered and are up; start more",
                    policy.nodes(),
                    candidates.len()
                ),
            ));
        }
        let rows: Vec<Row> = build(&candidates, pool.partitions, policy.nodes())
            .into_iter()
            .map(|nodes| Row { nodes, from: Vec::new() })
            .collect();
        let head = PlacementRecord {
            pool: pool.id,
            version: 1,
            nodes: candidates.into_iter().map(|node| node.id).collect(),
            // At most POLICY_NODES_MAX.
            width: policy.nodes() as u32,
            partitions: pool.partitions,
        };
        let parts = parts_of(&head, &rows);
        let swap = parts.iter().fold(swap.create(&head), |swap, part| swap.create(part));
        self.store.swap(swap).await?;
        Ok(())
    }

    async fn wire_table(&self, table: &Table) -> Result<v1::PlacementTable, Error> {
        let head = &table.head.value;
        let registered = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        let registered: BTreeMap<&str, &NodeRecord> =
            registered.iter().map(|node| (node.value.id.as_str(), &node.value)).collect();
        let wire = |node: &&NodeRecord| node.to_wire(self.node_state(node));
        let nodes: Option<Vec<v1::Node>> =
            head.nodes.iter().map(|id| registered.get(id.as_str()).map(wire)).collect();
        let nodes = nodes.ok_or_else(|| damaged(head, "a node of the table is not registered"))?;
        let row = |row: &Row| v1::PartitionNodes {
            node: row.nodes.clone(),
            moving_from: row.from.clone(),
        };
        let partitions = table.rows.iter().map(row).collect();
        Ok(v1::PlacementTable { pool: head.pool, version: head.version, nodes, partitions })
    }

    /// Whether a pool's table names a node for any partition.
    pub(super) async fn is_in_use(&self, head: &PlacementRecord, id: &str) -> Result<bool, Error> {
        let Some(table) = self.table(head.pool).await? else { return Ok(false) };
        let at = table.head.value.nodes.iter().position(|node| node == id);
        let Some(at) = at.map(|at| at as u32) else { return Ok(false) };
        Ok(table.rows.iter().any(|row| row.nodes.contains(&at) || row.from.contains(&at)))
    }

    /// Gives each pool that has a table a new one when nodes have come, are drained, or have gone
    /// down. Returns how many tables are new. Any number of servers may do this at once.
    ///
    /// # Errors
    /// When the store cannot; the rest is left for the next time.
    pub async fn place(&self) -> Result<usize, Error> {
        let mut new = 0;
        for head in self.all::<PlacementRecord>(&prefix_of(KeyKind::Placement)).await? {
            let pool = head.value.pool;
            let object = format!("the table of the pool with the id {pool}");
            if until_won!(self, object, self.try_place(pool).await)? {
                new += 1;
            }
        }
        Ok(new)
    }

    async fn try_place(&self, pool: u32) -> Result<bool, Error> {
        let order = self.load::<CounterRecord>(CounterRecord::key_of(Counter::Membership)).await?;
        let Some(table) = self.table(pool).await? else { return Ok(false) };
        let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        let Some((head, rows)) = next_table(&table, self.places(&nodes)) else { return Ok(false) };
        let next = CounterRecord {
            counter: Counter::Membership as u32,
            given: order.as_ref().map_or(0, |order| order.value.given) + 1,
        };
        let swap = match &order {
            Some(order) => Swap::new().update(order, &next),
            None => Swap::new().create(&next),
        };
        let swap = swap.update(&table.head, &head);
        let swap = table.parts.iter().fold(swap, |swap, part| swap.remove(part));
        let swap = parts_of(&head, &rows).iter().fold(swap, |swap, part| swap.create(part));
        self.store.swap(swap).await?;
        let moving = rows.iter().filter(|row| !row.from.is_empty()).count();
        tracing::info!(pool, version = head.version, moving, "a new placement table");
        Ok(true)
    }

    /// Everything of those partitions has come to their rows under the table of that version: what
    /// held them before is not read any more. False when the table has changed since.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the pool has no such partition.
    pub async fn settle_partitions(
        &self,
        r: v1::SettlePartitionsRequest,
    ) -> Result<v1::SettlePartitionsResponse, Error> {
        let mut by_part: BTreeMap<u16, Vec<u32>> = BTreeMap::new();
        for partition in r.partitions {
            // At most 256 parts: see `PlacementRecord::check`, and below what is beyond them.
            let part = u16::try_from(partition as usize / PART_ROWS).unwrap_or(u16::MAX);
            by_part.entry(part).or_default().push(partition);
        }
        for (part, partitions) in by_part {
            let object = format!("partitions of the pool with the id {}", r.pool);
            let settle = (r.pool, r.version, part);
            if !until_won!(self, object, self.try_settle(settle, &partitions).await)? {
                return Ok(v1::SettlePartitionsResponse { settled: false });
            }
        }
        Ok(v1::SettlePartitionsResponse { settled: true })
    }

    async fn try_settle(
        &self,
        (pool, version, part): (u32, u64, u16),
        partitions: &[u32],
    ) -> Result<bool, Error> {
        let missing = |partition| {
            let object = format!("partition {partition} in the pool with the id {pool}");
            Error::not_found(object, "`blobcr pool list` shows what there is")
        };
        let key = PlacementRecord::key_of(pool);
        let head = self.load::<PlacementRecord>(key).await?;
        let first = partitions.first().copied().unwrap_or_default();
        let head = head.ok_or_else(|| missing(first))?;
        if let Some(beyond) = partitions.iter().find(|at| **at >= head.value.partitions) {
            return Err(missing(*beyond));
        }
        if head.value.version != version {
            return Ok(false);
        }
        let key = PlacementPartRecord::key_of(pool, version, part);
        // Gone, it has been replaced since the head was read.
        let Some(part) = self.load::<PlacementPartRecord>(key).await? else { return Ok(false) };
        let rows: BTreeSet<usize> = partitions.iter().map(|at| *at as usize % PART_ROWS).collect();
        let mut settled = part.value.clone();
        settled.moving.retain(|moving| !rows.contains(&(moving.row as usize)));
        if settled != part.value {
            self.store.swap(Swap::new().unchanged(&head).update(&part, &settled)).await?;
        }
        Ok(true)
    }
}

/// The table that follows when those are the nodes to give partitions to; `None` when it would be
/// the same, or they are too few.
fn next_table(table: &Table, candidates: Vec<Candidate>) -> Option<(PlacementRecord, Vec<Row>)> {
    let old = &table.head.value;
    let used: BTreeSet<u32> =
        table.rows.iter().flat_map(|row| row.nodes.iter().chain(&row.from)).copied().collect();
    let used: BTreeSet<&str> = used.iter().map(|at| old.nodes[*at as usize].as_str()).collect();
    let fit: BTreeSet<&str> = candidates.iter().map(|node| node.id.as_str()).collect();
    let gone: Vec<String> =
        used.iter().filter(|id| !fit.contains(**id)).map(|id| (*id).to_owned()).collect();
    // Those that hold something first: there is room for so many in a table.
    let (stay, come): (Vec<_>, Vec<_>) =
        candidates.iter().cloned().partition(|node| used.contains(node.id.as_str()));
    let room = TABLE_NODES_MAX.saturating_sub(gone.len());
    let candidates: Vec<Candidate> = stay.into_iter().chain(come).take(room).collect();
    let mut nodes: Vec<String> = candidates.iter().map(|node| node.id.clone()).collect();
    nodes.extend(gone);
    let numbers: BTreeMap<&str, u32> = nodes.iter().map(String::as_str).zip(0..).collect();
    let renumbered = |at: &u32| numbers.get(old.nodes[*at as usize].as_str()).copied();
    let fits = |at: &u32| (*at as usize) < candidates.len();
    let before: Vec<Row> = table
        .rows
        .iter()
        .map(|row| Row {
            nodes: row.nodes.iter().filter_map(renumbered).collect(),
            from: row.from.iter().filter_map(renumbered).collect(),
        })
        .collect();
    let rows: Vec<OldRow> = before
        .iter()
        .map(|row| OldRow {
            nodes: row.nodes.iter().map(|at| Some(*at).filter(fits)).collect(),
            moving: !row.from.is_empty(),
        })
        .collect();
    let next = rebalance(&rows, &candidates, old.width as usize)?;
    let rows: Vec<Row> = before.iter().zip(next).map(|(old, new)| moved(old, new)).collect();
    if rows == before {
        return None;
    }
    let head = PlacementRecord { version: old.version + 1, nodes, ..old.clone() };
    Some((head, rows))
}

/// A row that follows another: who is not in it any more is still read, until its data has come.
fn moved(old: &Row, new: Vec<u32>) -> Row {
    let mut from = old.from.clone();
    from.extend(&old.nodes);
    from.retain(|node| !new.contains(node));
    // Beyond that the first ones, which have the data, and not those that came and went since.
    from.truncate(POLICY_NODES_MAX);
    Row { nodes: new, from }
}
