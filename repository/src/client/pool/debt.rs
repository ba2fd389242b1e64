//! What a pool is owed: objects that were acknowledged with fewer copies than its policy wants.

use std::collections::{BTreeMap, BTreeSet};

use blobcr_proto::v1;

use super::RemotePool;
use crate::StoreError;
use crate::placement::Placement;

/// Objects owed by one call, by partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Debt(BTreeMap<u32, Owed>);

/// What one partition owes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Owed {
    objects: u64,
    /// Ids of the nodes that lack some of them.
    missed: BTreeSet<String>,
}

impl Debt {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One object more lacks its copies on those nodes of the table.
    pub(super) fn add(&mut self, placement: &Placement, partition: usize, missed: &[u32]) {
        // Partitions are counted in 32 bits on the wire.
        let owed = self.0.entry(partition as u32).or_default();
        owed.objects += 1;
        for node in missed {
            let id = &placement.nodes()[*node as usize].id;
            if !owed.missed.contains(id) {
                owed.missed.insert(id.clone());
            }
        }
    }

    pub(super) fn merge(&mut self, other: Self) {
        for (partition, more) in other.0 {
            let owed = self.0.entry(partition).or_default();
            owed.objects += more.objects;
            owed.missed.extend(more.missed);
        }
    }
}

impl RemotePool {
    /// Has the metadata service record a debt. Nothing may be acknowledged before.
    pub(super) async fn record(&self, debt: Debt) -> Result<(), StoreError> {
        if debt.is_empty() {
            return Ok(());
        }
        let partition = |(partition, Owed { objects, missed })| v1::PartitionDebt {
            partition,
            objects,
            missed_nodes: missed.into_iter().collect(),
        };
        let partitions = debt.0.into_iter().map(partition).collect();
        let request = v1::ReportDebtRequest { pool: self.pool.id, partitions };
        self.catalog.report_debt(request).await.map_err(|error| {
            let pool = &self.pool.name;
            StoreError::Unavailable(format!("record what pool {pool} is owed: {error}"))
        })?;
        Ok(())
    }
}
