//! Debt: what was acknowledged with fewer copies than its pool's policy wants, until it is repaired.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use blobcr_proto::v1;

use super::{RecordSwap, VersionManager, list_limit, until_won};
use crate::error::Error;
use crate::records::{DebtRecord, MISSED_NODES_MAX, check_node_id};
use crate::store::{Expect, Key, StoreError, Swap, Version};

/// Partitions in one swap: well inside what a store takes, and few enough that writers which report
/// at the same time do not keep each other from it.
const PARTITIONS_AT_ONCE: usize = 32;

/// What one partition owes.
#[derive(Clone)]
struct Owed {
    objects: u64,
    /// The nodes that lack something; `None` when any may.
    missed: Option<BTreeSet<String>>,
}

impl Owed {
    fn add(&mut self, more: Self) {
        self.objects = self.objects.saturating_add(more.objects);
        self.missed = self.missed.take().zip(more.missed).and_then(|(mut all, more)| {
            all.extend(more);
            (all.len() <= MISSED_NODES_MAX).then_some(all)
        });
    }
}

fn named(nodes: &[String]) -> Option<BTreeSet<String>> {
    let few = !nodes.is_empty() && nodes.len() <= MISSED_NODES_MAX;
    few.then(|| nodes.iter().cloned().collect())
}

fn describe(pool: u32) -> String {
    format!("the debt of the pool with the id {pool}")
}

impl VersionManager {
    /// Adds to what partitions of a pool owe. Partitions are taken in order, so many in one swap; a
    /// failure may leave a part noted, and saying the same again only makes the estimate larger.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such pool, [`Error::Invalid`] for a partition that it
    /// does not have, or a debt of nothing.
    pub async fn report_debt(
        &self,
        r: v1::ReportDebtRequest,
    ) -> Result<v1::ReportDebtResponse, Error> {
        let pool = self.pool_record(&v1::PoolRef { name: String::new(), id: r.pool }).await?.value;
        let mut owed: BTreeMap<u32, Owed> = BTreeMap::new();
        for debt in &r.partitions {
            if debt.partition >= pool.partitions || debt.objects == 0 {
                return Err(Error::invalid(format!(
                    "pool {:?} has {} partitions, and a debt is of 1 object at least; this is of \
                     {} in partition {}",
                    pool.name, pool.partitions, debt.objects, debt.partition
                )));
            }
            debt.missed_nodes
                .iter()
                .try_for_each(|id| check_node_id(id))
                .map_err(Error::invalid)?;
            let more = Owed { objects: debt.objects, missed: named(&debt.missed_nodes) };
            match owed.entry(debt.partition) {
                Entry::Vacant(first) => {
                    first.insert(more);
                }
                Entry::Occupied(mut owed) => owed.get_mut().add(more),
            }
        }
        let owed: Vec<(u32, Owed)> = owed.into_iter().collect();
        let _turn = self.debt_turn.lock().await;
        for some in owed.chunks(PARTITIONS_AT_ONCE) {
            until_won!(self, describe(pool.id), self.try_report(pool.id, some).await)?;
        }
        Ok(v1::ReportDebtResponse {})
    }

    async fn try_report(&self, pool: u32, owed: &[(u32, Owed)]) -> Result<(), Error> {
        let mut swap = Swap::new();
        for (partition, more) in owed {
            let partition = *partition;
            let record = |owed: Owed, since_unix_ms| DebtRecord {
                pool,
                partition,
                objects: owed.objects,
                since_unix_ms,
                missed_nodes: owed.missed.into_iter().flatten().collect(),
            };
            swap = match self.load::<DebtRecord>(DebtRecord::key_of(pool, partition)).await? {
                None => swap.create(&record(more.clone(), self.now())),
                Some(held) => {
                    let old = &held.value;
                    let mut owed = Owed { objects: old.objects, missed: named(&old.missed_nodes) };
                    owed.add(more.clone());
                    swap.update(&held, &record(owed, old.since_unix_ms))
                }
            };
        }
        self.store.swap(swap).await?;
        Ok(())
    }

    /// What a pool owes, in order of partition.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such pool.
    pub async fn list_debt(&self, r: v1::ListDebtRequest) -> Result<v1::ListDebtResponse, Error> {
        let pool = self.pool_record(&v1::PoolRef { name: String::new(), id: r.pool }).await?.value;
        let prefix = DebtRecord::prefix_of(pool.id);
        let after = r.after.map(|partition| DebtRecord::key_of(pool.id, partition));
        let (debts, more) =
            self.page::<DebtRecord>(&prefix, after.as_ref(), list_limit(r.limit)).await?;
        let debts = debts.iter().map(|debt| debt.value.to_wire(debt.version)).collect();
        Ok(v1::ListDebtResponse { debts, more })
    }

    /// Removes the debts of partitions that were repaired as of a revision each. What was reported
    /// meanwhile stays: the repair may have passed it already.
    ///
    /// # Errors
    /// When the store cannot; some may be settled then.
    pub async fn settle_debts(
        &self,
        r: v1::SettleDebtsRequest,
    ) -> Result<v1::SettleDebtsResponse, Error> {
        let mut kept = Vec::new();
        for some in r.debts.chunks(PARTITIONS_AT_ONCE) {
            let mut owed = Vec::with_capacity(some.len());
            for debt in some {
                let key = DebtRecord::key_of(r.pool, debt.partition);
                if self.load::<DebtRecord>(key.clone()).await?.is_some() {
                    owed.push((key, debt));
                }
            }
            if self.strike_off(&owed).await? {
                continue;
            }
            // One has changed: the others by themselves.
            for one in owed {
                if !self.strike_off(std::slice::from_ref(&one)).await? {
                    kept.push(one.1.partition);
                }
            }
        }
        Ok(v1::SettleDebtsResponse { kept })
    }

    /// Removes debts in one swap, if none has changed.
    async fn strike_off(&self, owed: &[(Key, &v1::SettledDebt)]) -> Result<bool, Error> {
        if owed.is_empty() {
            return Ok(true);
        }
        let remove = |swap: Swap, (key, debt): &(Key, &v1::SettledDebt)| {
            swap.delete(key.clone(), Expect::Version(Version(debt.revision)))
        };
        match self.store.swap(owed.iter().fold(Swap::new(), remove)).await {
            Ok(_) => Ok(true),
            Err(StoreError::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
