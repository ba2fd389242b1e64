//! Objects that are cut into shards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blobcr_proto::record::RecordKey;
use blobcr_proto::v1;
use blobcr_repository::cpu;
use blobcr_repository::stripe::{Shard, Stripe};

use super::{Depth, Mended, Mender};
use crate::walk::{Copied, Object};

/// A shard that was read, with the record that holds it.
struct Read<'o> {
    copy: &'o Copied,
    record: v1::Record,
    shard: Shard,
}

impl Mender<'_> {
    pub(super) async fn mend_shards(&self, object: &Object) -> Mended {
        let Some(stripe) = self.layout.stripe(object.kind).cloned() else { return Mended::Lost };
        let generation = self.generation_of(object);
        let places = self.places(object);
        if self.depth == Depth::Read {
            return self.mend_deep(object, &stripe, &places, generation).await;
        }
        let lacking: Vec<(u32, RecordKey)> = places
            .iter()
            .filter(|(_, _, copy)| copy.is_none())
            .map(|(node, key, _)| (*node, *key))
            .collect();
        let uneven = object.copies.iter().any(|copy| copy.generation != generation);
        if !lacking.is_empty() {
            self.note_missing(&lacking);
            let Some(records) = self.lacking_shards(object, &stripe, &lacking).await else {
                return unrecovered(object, &stripe);
            };
            if !self.put(generation, records).await {
                return Mended::Owing;
            }
        }
        let held: Vec<&Copied> = places.iter().filter_map(|(_, _, copy)| *copy).collect();
        if uneven && !self.raise(generation, &held).await {
            return Mended::Owing;
        }
        Mended::Complete
    }

    fn note_missing(&self, lacking: &[(u32, RecordKey)]) {
        for (node, _) in lacking {
            let there = self.node(*node).is_some();
            self.tally(*node, |tally| tally.missing += u64::from(there));
        }
    }

    /// Those shards: each copied from where the partition was, if it is there, and else made anew
    /// from as many others as it takes.
    async fn lacking_shards(
        &self,
        object: &Object,
        stripe: &Arc<Stripe>,
        lacking: &[(u32, RecordKey)],
    ) -> Option<Vec<(u32, v1::Record)>> {
        let mut records = Vec::with_capacity(lacking.len());
        let mut unmade = Vec::new();
        for (node, key) in lacking {
            let elsewhere = object.copies.iter().find(|copy| copy.key == *key);
            let copied = match elsewhere {
                Some(copy) => self.read(copy).await.filter(|record| stripe.open(record).is_ok()),
                None => None,
            };
            match copied {
                Some(record) => records.push((*node, record)),
                None => unmade.push((*node, *key)),
            }
        }
        if unmade.is_empty() {
            return Some(records);
        }
        let mut shards = BTreeMap::new();
        for copy in &object.copies {
            let Some(read) = self.read_shard(copy, stripe).await else { continue };
            shards.entry(read.shard.number).or_insert(read);
            if shards.len() < stripe.needed() {
                continue;
            }
            if let Some(whole) = recovered(stripe, shards.values()).await {
                let cut = cut(stripe, whole).await?;
                let made = unmade.iter().filter_map(|(node, key)| {
                    Some((*node, cut.get(usize::from(key.shard).checked_sub(1)?)?.clone()))
                });
                records.extend(made);
                return Some(records);
            }
        }
        None
    }

    async fn read_shard<'o>(&self, copy: &'o Copied, stripe: &Stripe) -> Option<Read<'o>> {
        let record = self.read(copy).await?;
        let shard = stripe.open(&record).ok()?;
        Some(Read { copy, record, shard })
    }

    /// Reads all shards, and replaces those that are not what the record gives when it is cut anew.
    async fn mend_deep(
        &self,
        object: &Object,
        stripe: &Arc<Stripe>,
        places: &[(u32, RecordKey, Option<&Copied>)],
        generation: u64,
    ) -> Mended {
        let mut read = Vec::with_capacity(object.copies.len());
        for copy in &object.copies {
            read.extend(self.read_shard(copy, stripe).await);
        }
        let Some(whole) = recovered(stripe, read.iter()).await else {
            return unrecovered(object, stripe);
        };
        let Some(cut) = cut(stripe, whole).await else { return Mended::Lost };
        let right = |found: &&Read<'_>| {
            let should = cut.get(usize::from(found.shard.number) - 1);
            should.is_some_and(|should| should.payload == found.record.payload)
        };
        let mut puts = Vec::new();
        let mut held = Vec::new();
        for ((node, key, copy), should) in places.iter().zip(&cut) {
            let found = read.iter().find(|r| r.copy.node == *node && r.copy.key == *key);
            if let Some(found) = found.filter(right) {
                held.push(found.copy);
                continue;
            }
            if copy.is_none() {
                self.note_missing(&[(*node, *key)]);
            }
            if found.is_some() && !self.withdraw(*node, *key).await {
                return Mended::Owing;
            }
            puts.push((*node, should.clone()));
        }
        let complete = self.put(generation, puts).await
            && (held.iter().all(|copy| copy.generation == generation)
                || self.raise(generation, &held).await);
        if complete { Mended::Complete } else { Mended::Owing }
    }

    /// Takes a shard that lies from its node: what the node holds it would not take again.
    async fn withdraw(&self, node: u32, key: RecordKey) -> bool {
        self.tally(node, |tally| tally.damaged += 1);
        let Some(client) = self.node(node) else { return false };
        match client.delete(self.layout.pool, vec![key.to_ref()], u64::MAX).await {
            Ok(_) => true,
            Err(error) => {
                self.members.fail(self.layout.id(node), error);
                false
            }
        }
    }
}

/// What an object is that its shards do not give.
fn unrecovered(object: &Object, stripe: &Stripe) -> Mended {
    let numbers: BTreeSet<u8> = object.copies.iter().map(|copy| copy.key.shard).collect();
    if numbers.len() < stripe.needed() { Mended::Fragment } else { Mended::Lost }
}

/// The whole record, when some of those shards give it. They may be of several encodings.
async fn recovered<'r>(
    stripe: &Arc<Stripe>,
    read: impl Iterator<Item = &'r Read<'r>>,
) -> Option<v1::Record> {
    let mut encodings: Vec<Vec<Shard>> = Vec::new();
    for Read { shard, .. } in read {
        match encodings.iter_mut().find(|shards| shards[0].whole == shard.whole) {
            Some(shards) if shards.iter().any(|other| other.number == shard.number) => {}
            Some(shards) => shards.push(shard.clone()),
            None => encodings.push(vec![shard.clone()]),
        }
    }
    let stripe = Arc::clone(stripe);
    let bytes = encodings.iter().flatten().next()?.whole.bytes();
    let recover = move || {
        let first_of = |shards: &Vec<Shard>| {
            let counts = stripe.needed()..=shards.len();
            counts.into_iter().find_map(|count| stripe.recover(&shards[..count]))
        };
        encodings.iter().find_map(first_of).map(|(whole, _)| whole)
    };
    cpu::read(bytes, recover).await
}

async fn cut(stripe: &Arc<Stripe>, whole: v1::Record) -> Option<Vec<v1::Record>> {
    let stripe = Arc::clone(stripe);
    cpu::store(whole.payload.len(), move || stripe.cut(&whole).ok()).await
}
