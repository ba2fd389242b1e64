//! Writes: to all holders at once.

use std::collections::HashMap;

use blobcr_proto::v1::{self, RecordKind};
use futures::{StreamExt, TryStreamExt, stream};

use super::debt::Debt;
use super::encode::Encoded;
use super::read::Answer;
use super::{Holder, RemotePool, graver};
use crate::client::status::NodeError;
use crate::placement::Placement;
use crate::{StoreError, Stored};

/// Payload bytes of one put request at most: half of what a message may have.
const PUT_REQUEST_BYTES: usize = blobcr_proto::MESSAGE_BYTES_MAX / 2;
/// Put requests of one call under way at once, each to all its holders.
const PUTS_AT_ONCE: usize = 8;

/// Objects that have the same holders, and those holders.
struct PutBatch {
    kind: RecordKind,
    holders: Vec<Holder>,
    objects: Vec<Encoded>,
}

impl RemotePool {
    /// One object or more to one of their holders.
    async fn put_to(
        &self,
        generation: u64,
        batch: &PutBatch,
        holder: &Holder,
    ) -> Answer<v1::PutResponse> {
        let records: Vec<v1::Record> =
            batch.objects.iter().map(|object| object.record_for(holder.place)).collect();
        let bytes = records.iter().map(|record| record.payload.len() as u64).sum();
        let sending = self.compressor.sending();
        let (pool, table_version) = (self.pool.id, self.table_version());
        let request = v1::PutRequest { pool, generation, records, table_version };
        let answer = holder.link.put(request).await;
        if let Ok(answer) = &answer {
            sending.done(bytes);
            self.heard_of(answer.newest_table);
        }
        answer
    }

    /// One request to each holder. Done when all have the objects, or as many as must, and then
    /// every object is owed.
    async fn put_batch(
        &self,
        placement: &Placement,
        generation: u64,
        batch: PutBatch,
    ) -> Result<(Stored, Debt), StoreError> {
        let Some(first) = batch.objects.first() else { return Ok(Default::default()) };
        let least = self.policy.of(batch.kind).write_least();
        let links: Vec<_> = batch.holders.iter().map(|holder| holder.link.clone()).collect();
        let asks = batch.holders.iter().map(|holder| self.put_to(generation, &batch, holder));
        let answers = self.gather(&links, asks, least).await;
        let mut good = Vec::with_capacity(answers.len());
        let mut worst: Option<StoreError> = None;
        let mut missed = Vec::new();
        for ((answer, link), holder) in answers.into_iter().zip(&links).zip(&batch.holders) {
            let error = match answer {
                Ok(answer) => {
                    good.push(answer);
                    continue;
                }
                Err(error) => error,
            };
            // Another holder would refuse it as well: this is no want of nodes.
            let fatal = !matches!(error, NodeError::Unreachable(_) | NodeError::Full(_));
            let error = error.into_store_error(link.address(), first.kind, first.id);
            if fatal {
                return Err(error);
            }
            tracing::debug!(%error, "a holder did not take its copy");
            missed.push(holder.node);
            worst = Some(worst.map_or(error.clone(), |worst| graver(worst, error)));
        }
        let mut debt = Debt::default();
        if let Some(error) = worst {
            if good.len() < least {
                return Err(error);
            }
            for object in &batch.objects {
                debt.add(placement, placement.partition(&object.id), &missed);
            }
        }
        Ok((self.stored(&batch, &good), debt))
    }

    /// An object is new to the repository when it was new to every one of its nodes.
    fn stored(&self, batch: &PutBatch, answers: &[v1::PutResponse]) -> Stored {
        let bytes: u64 = batch.objects.iter().map(|object| object.bytes).sum();
        let count = batch.objects.len() as u64;
        let least = answers.iter().min_by_key(|answer| answer.stored).copied().unwrap_or_default();
        if u64::from(least.stored) >= count {
            return Stored { objects: count, bytes };
        }
        let parts = self.stripe_of(batch.kind).map_or(1, |stripe| stripe.needed() as u64);
        let new = least.stored_bytes.saturating_mul(parts).min(bytes);
        Stored { objects: least.stored.into(), bytes: new }
    }

    fn put_batches(
        &self,
        placement: &Placement,
        encoded: &[Encoded],
    ) -> Result<Vec<PutBatch>, StoreError> {
        let mut by_row: HashMap<(bool, &[u32]), Vec<&Encoded>> = HashMap::new();
        for one in encoded {
            let row = self.row(placement, one.kind, &one.id);
            let key = (self.stripe_of(one.kind).is_some(), row);
            by_row.entry(key).or_default().push(one);
        }
        let mut batches = Vec::new();
        for group in by_row.into_values() {
            let Some(first) = group.first() else { continue };
            let (kind, holders) = (first.kind, self.holders(placement, first.kind, &first.id)?);
            let batch = |objects| PutBatch { kind, holders: holders.clone(), objects };
            let mut objects: Vec<Encoded> = Vec::new();
            let mut bytes = 0;
            for one in group {
                if !objects.is_empty() && bytes + one.len_each() > PUT_REQUEST_BYTES {
                    batches.push(batch(std::mem::take(&mut objects)));
                    bytes = 0;
                }
                bytes += one.len_each();
                objects.push(one.clone());
            }
            batches.push(batch(objects));
        }
        Ok(batches)
    }

    pub(super) async fn put_under(
        &self,
        placement: &Placement,
        generation: u64,
        encoded: &[Encoded],
    ) -> Result<(Stored, Debt), StoreError> {
        stream::iter(self.put_batches(placement, encoded)?)
            .map(|batch| self.put_batch(placement, generation, batch))
            .buffer_unordered(PUTS_AT_ONCE)
            .try_fold(
                (Stored::default(), Debt::default()),
                |(sum, mut owed), (stored, debt)| async move {
                    owed.merge(debt);
                    let objects = sum.objects + stored.objects;
                    Ok((Stored { objects, bytes: sum.bytes + stored.bytes }, owed))
                },
            )
            .await
    }
}
