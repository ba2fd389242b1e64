//! Which nodes hold an object: placement tables.

use blobcr_proto::{Hash, v1};

/// A checked placement table.
#[derive(Debug, Clone)]
pub struct Placement {
    version: u64,
    nodes: Vec<v1::Node>,
    /// For each partition, indices into `nodes`, first choice first.
    partitions: Vec<Vec<u32>>,
    /// For each partition, its nodes and then those that held it before, while data moves.
    readers: Vec<Vec<u32>>,
}

/// A table that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("version {version} of the placement table of pool {pool} is malformed: {detail}")]
pub struct PlacementError {
    /// The pool's id.
    pub pool: u32,
    /// The table's version.
    pub version: u64,
    /// What is wrong with it.
    pub detail: &'static str,
}

impl Placement {
    /// Checks a table of a pool whose objects each need `width` nodes.
    ///
    /// # Errors
    /// When its partitions are no power of two, or one names too few, repeated or unknown nodes.
    pub fn new(table: v1::PlacementTable, width: usize) -> Result<Self, PlacementError> {
        let v1::PlacementTable { pool, version, nodes, partitions } = table;
        let check = |good, detail| {
            if good { Ok(()) } else { Err(PlacementError { pool, version, detail }) }
        };
        check(partitions.len().is_power_of_two(), "its partitions are no power of two")?;
        let mut readers: Vec<Vec<u32>> = partitions.iter().map(|p| p.node.clone()).collect();
        for (readers, partition) in readers.iter_mut().zip(&partitions) {
            for from in &partition.moving_from {
                let known = (*from as usize) < nodes.len();
                check(known, "a partition moves from a node that is not in the table")?;
                check(!readers.contains(from), "a partition moves from a node of its own")?;
                readers.push(*from);
            }
        }
        let partitions: Vec<Vec<u32>> = partitions.into_iter().map(|p| p.node).collect();
        for of_one in &partitions {
            check(of_one.len() >= width, "a partition has fewer nodes than the policy needs")?;
            let known = of_one.iter().all(|node| (*node as usize) < nodes.len());
            check(known, "a partition names a node that is not in the table")?;
            let repeated = of_one.iter().enumerate().any(|(i, node)| of_one[..i].contains(node));
            check(!repeated, "a partition names a node twice")?;
        }
        Ok(Self { version, nodes, partitions, readers })
    }

    /// Grows with every change of the table.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// All nodes of the pool.
    #[must_use]
    pub fn nodes(&self) -> &[v1::Node] {
        &self.nodes
    }

    /// Whether both tables send every object to the same nodes at the same addresses.
    #[must_use]
    pub fn same_nodes(&self, other: &Self) -> bool {
        let addresses = |nodes: &[v1::Node]| -> Vec<String> {
            nodes.iter().map(|node| node.address.clone()).collect()
        };
        self.partitions == other.partitions
            && self.readers == other.readers
            && addresses(&self.nodes) == addresses(&other.nodes)
    }

    /// Indices into [`Self::nodes`] of the nodes that hold a partition, first choice first.
    #[must_use]
    pub fn row(&self, partition: usize) -> &[u32] {
        &self.partitions[partition]
    }

    /// Indices into [`Self::nodes`] of the nodes that held a partition before, while data moves.
    #[must_use]
    pub fn moving_from(&self, partition: usize) -> &[u32] {
        &self.readers[partition][self.partitions[partition].len()..]
    }

    /// How many partitions there are: a power of two.
    #[must_use]
    pub fn partitions(&self) -> usize {
        self.partitions.len()
    }

    /// The last identity before those of a partition; `None` for the first.
    #[must_use]
    pub fn before(&self, partition: usize) -> Option<Hash> {
        let bits = self.partitions.len().trailing_zeros();
        let first = (partition as u64).checked_shl(u64::BITS - bits).unwrap_or(0);
        let mut id = [0xFF; Hash::LEN];
        id[..8].copy_from_slice(&first.checked_sub(1)?.to_be_bytes());
        Some(Hash(id))
    }

    /// The partition of an object: the upper bits of its identity.
    #[must_use]
    pub fn partition(&self, id: &Hash) -> usize {
        let bits = self.partitions.len().trailing_zeros();
        // One partition has no bits: a shift by 64 would overflow.
        id.prefix().checked_shr(u64::BITS - bits).unwrap_or(0) as usize
    }

    /// Indices into [`Self::nodes`] of the nodes to read the object from: its holders, then those
    /// that held it before and may have what has not been moved yet.
    #[must_use]
    pub fn readers(&self, id: &Hash) -> &[u32] {
        &self.readers[self.partition(id)]
    }

    /// Indices into [`Self::nodes`] of the nodes that hold the object, first choice first.
    #[must_use]
    pub fn holders(&self, id: &Hash) -> &[u32] {
        &self.partitions[self.partition(id)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(partitions: Vec<Vec<u32>>, nodes: usize) -> v1::PlacementTable {
        let node = |at| v1::Node { address: format!("n{at}:1"), ..v1::Node::default() };
        v1::PlacementTable {
            pool: 1,
            version: 3,
            nodes: (0..nodes).map(node).collect(),
            partitions: partitions
                .into_iter()
                .map(|node| v1::PartitionNodes { node, moving_from: vec![] })
                .collect(),
        }
    }

    #[test]
    fn the_upper_bits_of_the_identity_choose_the_partition() {
        let placement =
            Placement::new(table(vec![vec![0], vec![1], vec![2], vec![0]], 3), 1).unwrap();
        let id = |first: u8| {
            let mut id = [0xFF; 32];
            id[0] = first;
            Hash(id)
        };
        for (first, node) in [(0x00, 0), (0x3F, 0), (0x40, 1), (0x80, 2), (0xBF, 2), (0xC0, 0)] {
            assert_eq!(placement.holders(&id(first)), [node]);
        }
        let one = Placement::new(table(vec![vec![0, 1]], 2), 2).unwrap();
        assert_eq!(one.holders(&id(0xFF)), [0, 1], "one partition has no bits");
    }

    #[test]
    fn tables_that_cannot_be_used_are_refused() {
        for (partitions, width) in [
            (vec![], 1),
            (vec![vec![0]; 3], 1),
            (vec![vec![0], vec![]], 1),
            (vec![vec![0], vec![1]], 2),
            (vec![vec![0, 2], vec![0, 1]], 2),
            (vec![vec![0, 0], vec![0, 1]], 2),
        ] {
            assert!(Placement::new(table(partitions.clone(), 2), width).is_err(), "{partitions:?}");
        }
    }

    #[test]
    fn what_moves_is_read_from_where_it_was_too() {
        let id = Hash([0; 32]);
        let mut moving = table(vec![vec![0, 1]], 4);
        moving.partitions[0].moving_from = vec![3, 2];
        let placement = Placement::new(moving.clone(), 2).unwrap();
        assert_eq!(
            (placement.holders(&id), placement.readers(&id)),
            (&[0, 1][..], &[0, 1, 3, 2][..])
        );
        let settled = Placement::new(table(vec![vec![0, 1]], 4), 2).unwrap();
        assert_eq!(settled.readers(&id), [0, 1]);
        assert!(!settled.same_nodes(&placement));
        for from in [vec![4], vec![1], vec![3, 3]] {
            moving.partitions[0].moving_from = from;
            assert!(Placement::new(moving.clone(), 2).is_err());
        }
    }

    #[test]
    fn tables_are_compared_by_where_they_send_objects() {
        let placement = |table| Placement::new(table, 1).unwrap();
        let before = placement(table(vec![vec![0], vec![1]], 2));
        let mut same = table(vec![vec![0], vec![1]], 2);
        same.version = 4;
        assert!(placement(same).same_nodes(&before));
        assert!(!placement(table(vec![vec![1], vec![0]], 2)).same_nodes(&before));
        let mut moved = table(vec![vec![0], vec![1]], 2);
        moved.nodes[1].address = "elsewhere:1".into();
        assert!(!placement(moved).same_nodes(&before));
    }
}
