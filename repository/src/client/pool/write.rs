//! Writes: to all replicas at once.

use std::collections::HashMap;
use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::record::{self, RecordKey};
use blobcr_proto::v1::{self, Codec, RecordKind};
use futures::future::{join_all, try_join_all};
use futures::{StreamExt, TryStreamExt, stream};

use super::RemotePool;
use crate::client::link::NodeLink;
use crate::placement::Placement;
use crate::{Object, StoreError, Stored, cpu};

/// Payload bytes of one put request at most: half of what a message may have.
const PUT_REQUEST_BYTES: usize = blobcr_proto::MESSAGE_BYTES_MAX / 2;
/// Put requests of one call under way at once, each to all its replicas.
const PUTS_AT_ONCE: usize = 8;
/// Objects of one call compressed at once; how many cores they get is decided elsewhere.
const ENCODES_AT_ONCE: usize = 8;
/// Identities of one touch request at most: 48 bytes each, and the node looks each one up.
const TOUCH_REQUEST_REFS: usize = 4096;

/// An object as it goes over the wire.
#[derive(Clone)]
pub(super) struct Encoded {
    key: RecordKey,
    record: v1::Record,
}

impl Encoded {
    fn len(&self) -> usize {
        self.record.payload.len()
    }
}

/// Records that have the same nodes, and those nodes.
struct PutBatch {
    holders: Vec<Arc<NodeLink>>,
    records: Vec<Encoded>,
}

impl RemotePool {
    /// Compresses objects as the pool's policy has it.
    pub(super) async fn encode(&self, objects: Vec<Object>) -> Vec<Encoded> {
        stream::iter(objects)
            .map(|Object { kind, id, plain }| {
                let compressor = Arc::clone(&self.compressor);
                cpu::run(plain.len(), move || {
                    let plain_len = plain.len();
                    let (codec, payload) = match kind {
                        // Hashes do not compress.
                        RecordKind::TreeNode => (Codec::Plain, plain),
                        _ => compressor.encode(plain),
                    };
                    let record = record::whole(kind, id, codec, plain_len, payload);
                    Encoded { key: RecordKey::whole(kind, id), record }
                })
            })
            .buffered(ENCODES_AT_ONCE)
            .collect()
            .await
    }

    /// One request to all the replicas of its records.
    async fn put_batch(&self, generation: u64, batch: PutBatch) -> Result<Stored, StoreError> {
        let PutBatch { holders, records } = batch;
        let Some(first) = records.first().map(|encoded| encoded.key) else {
            return Ok(Stored::default());
        };
        let payload = records.iter().map(|encoded| encoded.len() as u64).sum();
        let records: Vec<v1::Record> = records.into_iter().map(|encoded| encoded.record).collect();
        let count = records.len() as u64;
        let answers = join_all(holders.iter().map(|link| {
            let records = records.clone();
            async move {
                let sending = self.compressor.sending();
                let request = v1::PutRequest { pool: self.pool.id, generation, records };
                let answer = link.put(request).await;
                if answer.is_ok() {
                    sending.done(payload);
                }
                self.links.noted(link, &answer);
                answer.map_err(|e| e.into_store_error(link.address(), first.kind, first.id))
            }
        }))
        .await;
        let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
        // An object is new to the repository when it was new to every one of its nodes.
        let least = answers.iter().min_by_key(|answer| answer.stored).copied().unwrap_or_default();
        let all_new = u64::from(least.stored) >= count;
        let bytes = if all_new { payload } else { least.stored_bytes.min(payload) };
        Ok(Stored { objects: u64::from(least.stored).min(count), bytes })
    }

    fn put_batches(
        &self,
        placement: &Placement,
        encoded: &[Encoded],
    ) -> Result<Vec<PutBatch>, StoreError> {
        let mut by_holders: HashMap<&[u32], Vec<&Encoded>> = HashMap::new();
        for one in encoded {
            by_holders.entry(placement.holders(&one.key.id)).or_default().push(one);
        }
        let mut batches = Vec::new();
        for group in by_holders.into_values() {
            let Some(first) = group.first() else { continue };
            let holders = self.holders(placement, &first.key.id)?;
            let mut records: Vec<Encoded> = Vec::new();
            let mut bytes = 0;
            for one in group {
                if !records.is_empty() && bytes + one.len() > PUT_REQUEST_BYTES {
                    let records = std::mem::take(&mut records);
                    batches.push(PutBatch { holders: holders.clone(), records });
                    bytes = 0;
                }
                bytes += one.len();
                records.push(one.clone());
            }
            batches.push(PutBatch { holders, records });
        }
        Ok(batches)
    }

    pub(super) async fn put_under(
        &self,
        placement: &Placement,
        generation: u64,
        encoded: &[Encoded],
    ) -> Result<Stored, StoreError> {
        stream::iter(self.put_batches(placement, encoded)?)
            .map(|batch| self.put_batch(generation, batch))
            .buffer_unordered(PUTS_AT_ONCE)
            .try_fold(Stored::default(), |sum, stored| async move {
                Ok(Stored {
                    objects: sum.objects + stored.objects,
                    bytes: sum.bytes + stored.bytes,
                })
            })
            .await
    }

    pub(super) async fn touch_under(
        &self,
        placement: &Placement,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        let mut by_node: HashMap<u32, Vec<usize>> = HashMap::new();
        for (at, id) in ids.iter().enumerate() {
            for node in placement.holders(id).iter().take(self.replicas) {
                by_node.entry(*node).or_default().push(at);
            }
        }
        let mut requests = Vec::new();
        for (node, places) in &by_node {
            let link = self.links.to(&placement.nodes()[*node as usize].address)?;
            requests.extend(places.chunks(TOUCH_REQUEST_REFS).map(|some| (link.clone(), some)));
        }
        let answers = try_join_all(requests.into_iter().map(|(link, places)| async move {
            let refs = places.iter().map(|at| RecordKey::whole(kind, ids[*at]).to_ref()).collect();
            let request = v1::TouchRequest { pool: self.pool.id, generation, refs };
            let answer = link.touch(request).await;
            self.links.noted(&link, &answer);
            let of = ids[places[0]];
            let answer = answer.map_err(|e| e.into_store_error(link.address(), kind, of))?;
            Ok::<_, StoreError>((places, answer.present))
        }))
        .await?;
        let mut present = vec![true; ids.len()];
        for (places, of_node) in answers {
            // What a node does not answer about, it does not hold.
            let of_node = of_node.into_iter().chain(std::iter::repeat(false));
            for (at, held) in places.iter().zip(of_node) {
                present[*at] &= held;
            }
        }
        Ok(present)
    }
}
