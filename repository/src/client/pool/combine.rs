//! Shards as they arrive, until some of them give the object.

use std::collections::HashMap;
use std::sync::Arc;

use blobcr_proto::record;
use bytes::Bytes;

use crate::cpu;
use crate::stripe::{Shard, Stripe, Whole};

/// Combinations that are tried for each shard that arrives. One lying shard among the first K+1
/// takes K, so this finds two or three liars of the widest stripes.
const COMBINATIONS_MAX: usize = 1024;

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
        cpu::run(bytes, move || combined(&stripe, &shards)).await
    }
}

/// Tries every combination that has the newest shard in it: those without it were tried before.
fn combined(stripe: &Stripe, shards: &[Shard]) -> Option<Bytes> {
    let (newest, others) = shards.split_last()?;
    let mut chosen: Vec<usize> = (0..stripe.needed() - 1).collect();
    for _ in 0..COMBINATIONS_MAX {
        let mut some: Vec<&Shard> = chosen.iter().map(|at| &others[*at]).collect();
        some.push(newest);
        let plain = stripe.join(&some).ok().and_then(|whole| record::open(&whole).ok());
        if let Some((_, plain)) = plain {
            return Some(plain);
        }
        if !advance(&mut chosen, others.len()) {
            break;
        }
    }
    None
}

/// The next choice of as many of `of` things, in order; false when this was the last.
fn advance(chosen: &mut [usize], of: usize) -> bool {
    let count = chosen.len();
    let Some(at) = (0..count).rev().find(|at| chosen[*at] < of - count + at) else {
        return false;
    };
    chosen[at] += 1;
    for behind in at + 1..count {
        chosen[behind] = chosen[behind - 1] + 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_is_made_once() {
        let mut chosen = vec![0, 1, 2];
        let mut seen = vec![chosen.clone()];
        while advance(&mut chosen, 6) {
            seen.push(chosen.clone());
        }
        assert_eq!(seen.len(), 20);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 20);
        assert!(seen.iter().all(|some| some.is_sorted() && some[2] < 6));
        assert!(!advance(&mut [], 3));
    }
}
