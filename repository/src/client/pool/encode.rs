//! From plain bytes to what each holder gets.

use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::record;
use blobcr_proto::v1::{self, Codec, RecordKind};

use super::RemotePool;
use crate::compression::Compressor;
use crate::stripe::Stripe;
use crate::{Object, StoreError, cpu};

/// An object as it goes over the wire.
#[derive(Clone)]
pub(super) struct Encoded {
    pub(super) kind: RecordKind,
    pub(super) id: Hash,
    /// Bytes of its payload as a whole.
    pub(super) bytes: u64,
    /// One whole record for all holders, or a shard for each.
    records: Vec<v1::Record>,
}

impl Encoded {
    /// The record for the holder at `place`.
    pub(super) fn record_for(&self, place: usize) -> v1::Record {
        self.records[place.min(self.records.len() - 1)].clone()
    }

    /// Payload bytes that one holder gets.
    pub(super) fn len_each(&self) -> usize {
        self.records.iter().map(|record| record.payload.len()).max().unwrap_or(0)
    }
}

impl RemotePool {
    /// Compresses objects as the pool has it, and cuts them when its policy wants shards; those of one
    /// call on one thread, because several calls are under way at once.
    pub(super) async fn encode(&self, objects: Vec<Object>) -> Result<Vec<Encoded>, StoreError> {
        let compressor = Arc::clone(&self.compressor);
        let bytes = objects.iter().map(|object| object.plain.len()).sum();
        let stripe_of = |object: Object| (self.stripe_of(object.kind).cloned(), object);
        let objects: Vec<_> = objects.into_iter().map(stripe_of).collect();
        cpu::store(bytes, move || {
            let encode = |(stripe, object): (Option<Arc<Stripe>>, _)| {
                encode(object, &compressor, stripe.as_deref())
            };
            objects.into_iter().map(encode).collect()
        })
        .await
    }
}

fn encode(
    Object { kind, id, plain }: Object,
    compressor: &Compressor,
    stripe: Option<&Stripe>,
) -> Result<Encoded, StoreError> {
    let plain_len = plain.len();
    let (codec, payload) = match kind {
        // Hashes do not compress.
        RecordKind::TreeNode => (Codec::Plain, plain),
        _ => compressor.encode(plain),
    };
    let bytes = payload.len() as u64;
    let record = record::whole(kind, id, codec, plain_len, payload);
    let records = match stripe {
        None => vec![record],
        Some(stripe) => stripe.cut(&record).map_err(|error| StoreError::Damaged {
            kind,
            id,
            detail: error.to_string(),
        })?,
    };
    Ok(Encoded { kind, id, bytes, records })
}
