//! How much moves from one placement table to the next, and how even the next one is.

use std::collections::BTreeSet;

use blobcr_metadata::version_manager::placement::{Candidate, build};
use blobcr_metadata::version_manager::rebalance::{OldRow, rebalance};
use proptest::prelude::*;

const PARTITIONS: usize = 1024;

/// What happens to the nodes of a pool.
#[derive(Clone, Copy, Debug)]
enum Change {
    Add { domain: usize },
    Remove { which: prop::sample::Index },
}

fn changes(domains: usize) -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        (0..domains).prop_map(|domain| Change::Add { domain }),
        any::<prop::sample::Index>().prop_map(|which| Change::Remove { which }),
    ];
    prop::collection::vec(change, 1..8)
}

/// A pool whose nodes come and go.
struct Pool {
    nodes: Vec<Candidate>,
    rows: Vec<Vec<String>>,
    width: usize,
    ever: usize,
}

impl Pool {
    fn new(domains: impl Iterator<Item = String>, width: usize) -> Self {
        let id = |n: usize| format!("{:032x}", (n + 1) * 0x1234_5678_9abc);
        let nodes: Vec<Candidate> =
            domains.enumerate().map(|(n, domain)| Candidate { id: id(n), domain }).collect();
        let rows = build(&nodes, PARTITIONS as u32, width);
        let ids = |row: &Vec<u32>| row.iter().map(|n| nodes[*n as usize].id.clone()).collect();
        let rows = rows.iter().map(ids).collect();
        Self { ever: nodes.len(), nodes, rows, width }
    }

    fn add(&mut self, domain: Option<usize>) {
        self.ever += 1;
        let id = format!("{:032x}", self.ever * 0x1234_5678_9abc);
        let domain = domain.map_or_else(|| id.clone(), |domain| format!("d{domain}"));
        self.nodes.push(Candidate { id, domain });
    }

    /// Makes the next table; returns how many places moved.
    fn next(&mut self) -> usize {
        let at = |id: &String| {
            let found = self.nodes.iter().position(|node| node.id == *id);
            found.map(|at| at as u32)
        };
        let old: Vec<OldRow> = self
            .rows
            .iter()
            .map(|row| OldRow { nodes: row.iter().map(at).collect(), moving: false })
            .collect();
        let new = rebalance(&old, &self.nodes, self.width).unwrap();
        assert_eq!(new, rebalance(&old, &self.nodes, self.width).unwrap(), "deterministic");
        let mut moved = 0;
        for (row, new) in self.rows.iter_mut().zip(new) {
            let new: Vec<String> = new.iter().map(|n| self.nodes[*n as usize].id.clone()).collect();
            for (place, id) in new.iter().enumerate() {
                match row.iter().position(|old| old == id) {
                    None => moved += 1,
                    Some(before) => assert_eq!(before, place, "a shard's number is its place"),
                }
            }
            *row = new;
        }
        moved
    }

    fn held(&self, id: &str) -> usize {
        self.rows.iter().flatten().filter(|held| *held == id).count()
    }

    /// The least that moves when a node goes and the others are balanced: what it held, and what they
    /// have to pass on, because who was in its rows already cannot take those.
    fn least_without(&self, gone: &str) -> usize {
        let full = (PARTITIONS * self.width).div_ceil(self.nodes.len());
        let has = |row: &[String], id: &str| row.iter().any(|held| held == id);
        let takes = |node: &Candidate| {
            let free = self.rows.iter().filter(|row| has(row, gone) && !has(row, &node.id));
            free.count().min(full.saturating_sub(self.held(&node.id)))
        };
        let taken: usize = self.nodes.iter().map(takes).sum();
        let held = self.held(gone);
        held + held.saturating_sub(taken)
    }

    fn most(&self) -> usize {
        self.nodes.iter().map(|node| self.held(&node.id)).max().unwrap()
    }

    /// 5 % above the mean, or what whole numbers allow.
    fn most_allowed(&self) -> usize {
        let places = PARTITIONS * self.width;
        (places * 105 / 100 / self.nodes.len()).max(places.div_ceil(self.nodes.len()))
    }

    fn check_rows(&self) {
        let domains: BTreeSet<&str> = self.nodes.iter().map(|n| n.domain.as_str()).collect();
        let domain = |id: &String| {
            self.nodes.iter().find(|node| node.id == *id).map(|node| node.domain.as_str())
        };
        for row in &self.rows {
            assert_eq!(row.iter().collect::<BTreeSet<_>>().len(), self.width, "different nodes");
            let used: BTreeSet<&str> = row.iter().map(|id| domain(id).unwrap()).collect();
            assert_eq!(used.len(), domains.len().min(self.width), "different domains");
        }
    }
}

fn own_domains(nodes: usize) -> impl Iterator<Item = String> {
    (0..nodes).map(|n| format!("own{n}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn one_node_more_or_less_moves_its_share_alone(
        nodes in 2..=64usize, width in 1..=9usize, history in changes(1),
    ) {
        let width = width.min(nodes);
        let mut pool = Pool::new(own_domains(nodes), width);
        for change in history {
            let least = match change {
                Change::Add { .. } => {
                    pool.add(None);
                    PARTITIONS * width / pool.nodes.len()
                }
                Change::Remove { .. } if pool.nodes.len() == width => continue,
                Change::Remove { which } => {
                    let gone = pool.nodes.remove(which.index(pool.nodes.len()));
                    pool.least_without(&gone.id)
                }
            };
            let moved = pool.next();
            pool.check_rows();
            prop_assert!(pool.most() <= pool.most_allowed(), "{} held", pool.most());
            prop_assert!(moved * 5 <= least * 6, "{moved} moved, {least} would do");
        }
    }

    #[test]
    fn rows_keep_to_different_domains(
        domains in prop::collection::vec(0..7usize, 2..24), width in 1..=9usize,
        history in changes(8),
    ) {
        let width = width.min(domains.len());
        let mut pool = Pool::new(domains.iter().map(|domain| format!("d{domain}")), width);
        for change in history {
            match change {
                Change::Add { domain } => pool.add(Some(domain)),
                Change::Remove { .. } if pool.nodes.len() == width => continue,
                Change::Remove { which } => {
                    pool.nodes.remove(which.index(pool.nodes.len()));
                }
            }
            pool.next();
            pool.check_rows();
        }
    }

    #[test]
    fn a_row_that_is_moving_changes_only_where_a_node_is_gone(
        nodes in 4..20usize, width in 1..=3usize, moving in prop::collection::vec(any::<bool>(), PARTITIONS),
    ) {
        let mut pool = Pool::new(own_domains(nodes), width);
        pool.nodes.remove(0);
        pool.add(None);
        let at = |id: &String| pool.nodes.iter().position(|n| n.id == *id).map(|at| at as u32);
        let old: Vec<OldRow> = pool.rows.iter().zip(&moving)
            .map(|(row, moving)| OldRow { nodes: row.iter().map(at).collect(), moving: *moving })
            .collect();
        let new = rebalance(&old, &pool.nodes, width).unwrap();
        for (old, new) in old.iter().zip(&new).filter(|(old, _)| old.moving) {
            for (before, now) in old.nodes.iter().zip(new) {
                prop_assert!(before.is_none_or(|before| before == *now));
            }
        }
        prop_assert_eq!(rebalance(&old, &pool.nodes[..width - 1], width), None);
    }
}

#[test]
fn five_nodes_are_even() {
    for width in 1..=5 {
        let mut pool = Pool::new(own_domains(4.max(width)), width);
        while pool.nodes.len() < 5 {
            pool.add(None);
        }
        pool.next();
        assert!(pool.most() * 100 * 5 <= PARTITIONS * width * 105, "{} held", pool.most());
        assert_eq!(pool.next(), 0, "nothing more to move");
    }
}
