//! From one placement table to the next: pure code, which moves the least that balance and failure
//! domains allow.
//!
//! Each node has a *quota*: an equal share, as far as no domain needs more than one place in a row
//! (or must have one in each, when there are fewer domains than places). First the places of nodes
//! that are gone are given to the nodes that lack most; then rows with two nodes in one domain are
//! mended; then nodes above their quota give places to nodes below theirs. Every place that stays,
//! stays where it is in its row, because a shard's number is its place.

use std::collections::{BTreeMap, BTreeSet};

use super::placement::{Candidate, hash, ranked};

/// A row as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldRow {
    /// For each place the index of its candidate; `None` when the node is gone.
    pub nodes: Vec<Option<u32>>,
    /// Its data has not come to its nodes yet: only places of nodes that are gone may change.
    pub moving: bool,
}

/// The next table, with rows as indices into `candidates`; `None` when there are fewer of them than
/// places in a row. The same input gives the same table.
#[must_use]
pub fn rebalance(old: &[OldRow], candidates: &[Candidate], width: usize) -> Option<Vec<Vec<u32>>> {
    if candidates.len() < width {
        return None;
    }
    let mut table = Table::new(old, candidates, width);
    for partition in 0..table.rows.len() {
        table.fill(partition);
        table.part_domains(partition);
    }
    table.level();
    table.keep_places(old);
    let whole = |row: Vec<Option<usize>>| row.into_iter().flatten().map(|node| node as u32);
    Some(table.rows.into_iter().map(|row| whole(row).collect()).collect())
}

struct Table {
    /// Of the ids of the nodes.
    hashes: Vec<u64>,
    /// For each node, its domain's index.
    domains: Vec<usize>,
    /// Different domains that a row can have.
    spread: usize,
    quota: Vec<u32>,
    held: Vec<u32>,
    rows: Vec<Vec<Option<usize>>>,
    moving: Vec<bool>,
    /// Places whose data moves anyhow: to give one of them to yet another node costs nothing.
    fresh: BTreeSet<(usize, usize)>,
}

impl Table {
    fn new(old: &[OldRow], candidates: &[Candidate], width: usize) -> Self {
        let mut numbers = BTreeMap::new();
        let domains: Vec<usize> = candidates
            .iter()
            .map(|node| {
                let next = numbers.len();
                *numbers.entry(node.domain.as_str()).or_insert(next)
            })
            .collect();
        let known = |node: &Option<u32>| node.map(|n| n as usize).filter(|n| *n < domains.len());
        let rows: Vec<Vec<Option<usize>>> = old
            .iter()
            .map(|row| row.nodes.iter().map(known).chain(std::iter::repeat(None)))
            .map(|row| row.take(width).collect())
            .collect();
        let mut held = vec![0; candidates.len()];
        rows.iter().flatten().flatten().for_each(|node| held[*node] += 1);
        Self {
            quota: quotas(&domains, numbers.len(), rows.len(), width, &held),
            spread: numbers.len().min(width),
            moving: old.iter().map(|row| row.moving).collect(),
            hashes: candidates.iter().map(|node| hash(&node.id)).collect(),
            domains,
            held,
            rows,
            fresh: BTreeSet::new(),
        }
    }

    /// How much a node lacks; negative when it has too much.
    fn lacks(&self, node: usize) -> i64 {
        i64::from(self.quota[node]) - i64::from(self.held[node])
    }

    fn give(&mut self, partition: usize, place: usize, node: usize) {
        if let Some(before) = self.rows[partition][place].replace(node) {
            self.held[before] -= 1;
        }
        self.held[node] += 1;
    }

    fn has(&self, partition: usize, node: usize) -> bool {
        self.rows[partition].contains(&Some(node))
    }

    /// Whether another place of the row is in the node's domain.
    fn crowded(&self, partition: usize, place: usize, node: usize) -> bool {
        let others = self.rows[partition].iter().enumerate().filter(|(at, _)| *at != place);
        others.filter_map(|(_, other)| *other).any(|o| self.domains[o] == self.domains[node])
    }

    fn spread_of(&self, partition: usize) -> usize {
        let mut domains: Vec<usize> =
            self.rows[partition].iter().flatten().map(|node| self.domains[*node]).collect();
        domains.sort_unstable();
        domains.dedup();
        domains.len()
    }

    /// Gives away the places that nobody has.
    fn fill(&mut self, partition: usize) {
        for place in 0..self.rows[partition].len() {
            if self.rows[partition][place].is_some() {
                continue;
            }
            let best = (0..self.hashes.len())
                .filter(|node| !self.has(partition, *node))
                .min_by_key(|&node| {
                    let crowded = self.crowded(partition, place, node);
                    (crowded, -self.lacks(node), self.rank(partition, node), node)
                });
            if let Some(node) = best {
                self.give(partition, place, node);
                self.fresh.insert((partition, place));
            }
        }
    }

    fn rank(&self, partition: usize, node: usize) -> u64 {
        // At most 65 536 partitions.
        ranked(self.hashes[node], partition as u32)
    }

    /// Replaces nodes that share a domain with another of their row, while other domains are free.
    fn part_domains(&mut self, partition: usize) {
        while !self.moving[partition] && self.spread_of(partition) < self.spread {
            let row = &self.rows[partition];
            let doubled = (0..row.len())
                .rev()
                .find(|&place| row[place].is_some_and(|node| self.crowded(partition, place, node)));
            let Some(place) = doubled else { return };
            let best = (0..self.hashes.len())
                .filter(|&node| !self.has(partition, node))
                .filter(|&node| !self.crowded(partition, place, node))
                .min_by_key(|&node| (-self.lacks(node), self.rank(partition, node), node));
            let Some(node) = best else { return };
            self.give(partition, place, node);
        }
    }

    /// Whether a place may change hands without more nodes of one domain in the row.
    fn may_have(&self, partition: usize, place: usize, node: usize) -> bool {
        let Some(before) = self.rows[partition][place] else { return false };
        !self.has(partition, node)
            && (self.domains[before] == self.domains[node]
                || !self.crowded(partition, place, node)
                || (self.spread < self.rows[partition].len()
                    && self.crowded(partition, place, before)))
    }

    /// Takes from those that have too much for those that lack. What no single step can mend is
    /// mended by two, through a third node, while that helps.
    fn level(&mut self) {
        while self.level_directly() || self.level_through_a_third() {}
    }

    fn level_directly(&mut self) -> bool {
        let mut changed = false;
        let mut lacking: Vec<usize> =
            (0..self.held.len()).filter(|node| self.lacks(*node) > 0).collect();
        for (partition, place) in self.places() {
            if lacking.is_empty() {
                break;
            }
            let Some(from) = self.rows[partition][place] else { continue };
            if self.lacks(from) >= 0 {
                continue;
            }
            let best = lacking
                .iter()
                .copied()
                .filter(|&node| self.may_have(partition, place, node))
                .min_by_key(|&node| (-self.lacks(node), self.rank(partition, node), node));
            if let Some(node) = best {
                self.give(partition, place, node);
                lacking.retain(|node| self.lacks(*node) > 0);
                changed = true;
            }
        }
        changed
    }

    /// One unit from a node that has too much to one that lacks, through a third.
    fn level_through_a_third(&mut self) -> bool {
        let nodes = 0..self.held.len();
        let Some(lacking) = nodes.clone().find(|node| self.lacks(*node) > 0) else { return false };
        // Where each node could give a place to the one that lacks.
        let mut gives = vec![None; self.held.len()];
        for (partition, place) in self.places() {
            if let Some(node) = self.rows[partition][place]
                && gives[node].is_none()
                && self.may_have(partition, place, lacking)
            {
                gives[node] = Some((partition, place));
            }
        }
        for (partition, place) in self.places() {
            let Some(from) = self.rows[partition][place] else { continue };
            if self.lacks(from) >= 0 {
                continue;
            }
            let third = nodes.clone().find_map(|third| {
                let (row, at) = gives[third]?;
                let good = row != partition && self.may_have(partition, place, third);
                good.then_some((third, row, at))
            });
            if let Some((third, row, at)) = third {
                self.give(partition, place, third);
                self.give(row, at, lacking);
                return true;
            }
        }
        false
    }

    /// A node that was taken out of a row and came back has its old place again.
    fn keep_places(&mut self, old: &[OldRow]) {
        for (row, old) in self.rows.iter_mut().zip(old) {
            for (place, before) in old.nodes.iter().enumerate().take(row.len()) {
                let before = before.map(|node| node as usize);
                if before.is_some()
                    && let Some(now) = row.iter().position(|node| *node == before)
                {
                    row.swap(place, now);
                }
            }
        }
    }

    /// All places that may change, first those that cost nothing, and so that no place of a row comes first in every row: the first
    /// place answers most reads.
    fn places(&self) -> Vec<(usize, usize)> {
        let free = (0..self.rows.len()).filter(|partition| !self.moving[*partition]);
        let places = free.flat_map(|partition| {
            let width = self.rows[partition].len();
            (0..width).map(move |at| (partition, (at + partition) % width))
        });
        let (mut first, others): (Vec<_>, Vec<_>) =
            places.partition(|place| self.fresh.contains(place));
        first.extend(others);
        first
    }
}

/// How many places each node should have.
fn quotas(
    domains: &[usize],
    domain_count: usize,
    partitions: usize,
    width: usize,
    held: &[u32],
) -> Vec<u32> {
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); domain_count];
    domains.iter().enumerate().for_each(|(node, domain)| members[*domain].push(node));
    // Domains that get one place in every row: no more where they could have more, no less where
    // they must have it.
    let mut bound = vec![false; domain_count];
    let (mut places, mut nodes) = (partitions * width, domains.len());
    loop {
        let beyond = (0..domain_count).find(|&domain| {
            let share = members[domain].len() * places;
            let more = domain_count >= width && share > partitions * nodes;
            let less = domain_count <= width && share < partitions * nodes;
            !bound[domain] && (more || less)
        });
        let Some(domain) = beyond else { break };
        bound[domain] = true;
        places = places.saturating_sub(partitions);
        nodes -= members[domain].len();
    }
    let mut quota = vec![0; domains.len()];
    let free = (0..domains.len()).filter(|node| !bound[domains[*node]]).collect();
    share_out(places, free, held, &mut quota);
    for (members, _) in members.into_iter().zip(&bound).filter(|(_, bound)| **bound) {
        share_out(partitions, members, held, &mut quota);
    }
    quota
}

/// Equal shares; those that hold the most already get what is left over.
fn share_out(places: usize, mut nodes: Vec<usize>, held: &[u32], quota: &mut [u32]) {
    nodes.sort_by_key(|node| (std::cmp::Reverse(held[*node]), *node));
    let count = nodes.len();
    for (at, node) in nodes.into_iter().enumerate() {
        // At most 65 536 partitions of 24 nodes.
        quota[node] = (places / count + usize::from(at < places % count)) as u32;
    }
}
