//! What a pool is owed: objects that were acknowledged with fewer copies than its policy wants.

use std::collections::BTreeMap;

use blobcr_proto::v1;

use super::RemotePool;
use crate::StoreError;

/// Objects owed by one call, by partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Debt(BTreeMap<u32, u64>);

impl Debt {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One object more lacks a copy.
    pub(super) fn add(&mut self, partition: usize) {
        // Partitions are counted in 32 bits on the wire.
        *self.0.entry(partition as u32).or_default() += 1;
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (partition, objects) in &other.0 {
            *self.0.entry(*partition).or_default() += objects;
        }
    }
}

impl RemotePool {
    /// Has the metadata service record a debt. Nothing may be acknowledged before.
    pub(super) async fn record(&self, debt: Debt) -> Result<(), StoreError> {
        if debt.is_empty() {
            return Ok(());
        }
        let partition = |(partition, objects)| v1::PartitionDebt { partition, objects };
        let partitions = debt.0.into_iter().map(partition).collect();
        let request = v1::ReportDebtRequest { pool: self.pool.id, partitions };
        self.catalog.report_debt(request).await.map_err(|error| {
            let pool = &self.pool.name;
            StoreError::Unavailable(format!("record what pool {pool} is owed: {error}"))
        })?;
        Ok(())
    }
}
