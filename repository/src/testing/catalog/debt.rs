//! What was acknowledged with too few copies.

use blobcr_proto::v1;

use super::pools::Pools;
use super::{Answer, ById, invalid, page, unix_ms};

#[derive(Debug, Default)]
pub(super) struct Debts {
    by_partition: ById<(u32, u32), v1::Debt>,
    reports: u64,
}

impl Debts {
    pub(super) fn report(
        &mut self,
        r: &v1::ReportDebtRequest,
        pools: &Pools,
    ) -> Answer<v1::ReportDebtResponse> {
        let pool = pools.get(&v1::PoolRef { name: String::new(), id: r.pool })?;
        let bad =
            |debt: &&v1::PartitionDebt| debt.partition >= pool.partitions || debt.objects == 0;
        if let Some(debt) = r.partitions.iter().find(bad) {
            return Err(invalid(format!("no such debt: {debt:?}")));
        }
        self.reports += 1;
        for v1::PartitionDebt { partition, objects, .. } in &r.partitions {
            let debt = self.by_partition.entry((pool.id, *partition)).or_insert_with(|| v1::Debt {
                pool: pool.id,
                partition: *partition,
                since_unix_ms: unix_ms(),
                ..v1::Debt::default()
            });
            debt.objects += objects;
            debt.revision = self.reports;
        }
        Ok(v1::ReportDebtResponse {})
    }

    pub(super) fn list(&self, r: &v1::ListDebtRequest) -> v1::ListDebtResponse {
        let wanted = |debt: &&v1::Debt| {
            debt.pool == r.pool && r.after.is_none_or(|after| debt.partition > after)
        };
        let (debts, more) = page(self.by_partition.values().filter(wanted).cloned(), r.limit);
        v1::ListDebtResponse { debts, more }
    }

    pub(super) fn settle(&mut self, r: &v1::SettleDebtsRequest) -> v1::SettleDebtsResponse {
        let mut kept = Vec::new();
        for v1::SettledDebt { partition, revision } in &r.debts {
            let key = (r.pool, *partition);
            match self.by_partition.get(&key) {
                Some(debt) if debt.revision != *revision => kept.push(*partition),
                _ => drop(self.by_partition.remove(&key)),
            }
        }
        v1::SettleDebtsResponse { kept }
    }
}
