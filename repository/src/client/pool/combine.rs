//! Shards as they arrive, until some of them give the object.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::cpu;
use crate::stripe::{Shard, Stripe, Whole};

/// Shards of one object, by the encoding that they are of.
pub(super) struct Pile {
    stripe: Arc<Stripe>,
    shards: HashMap<Whole, Vec<Shard>>,
}

impl Pile {
    pub(super) fn new(stripe: Arc<Stripe>) -> Self {
        Self { stripe, shards: HashMap::new() }
    }

    /// How many shards there are.
    pub(super) fn len(&self) -> usize {
        self.shards.values().map(Vec::len).sum()
    }

    /// Takes a shard, and gives the object's plain bytes if it is now known, checked down to its
    /// identity.
    pub(super) async fn add(&mut self, shard: Shard) -> Option<Bytes> {
        let others = self.shards.entry(shard.whole).or_default();
        if others.iter().any(|other| other.number == shard.number) {
            return None;
        }
        others.push(shard);
        if others.len() < self.stripe.needed() {
            return None;
        }
        let (stripe, shards) = (Arc::clone(&self.stripe), others.clone());
        let bytes = shards.first()?.whole.bytes();
        cpu::read(bytes, move || stripe.recover(&shards).map(|(_, plain)| plain)).await
    }
}
