//! From shards of which some may lie to the record.

use blobcr_proto::{record, v1};
use bytes::Bytes;

use super::{Shard, Stripe};

/// Combinations that are tried for each shard that arrives. One lying shard among the first K+1
/// takes K, so this finds two or three liars of the widest stripes.
const COMBINATIONS_MAX: usize = 1024;

impl Stripe {
    /// Puts a record together from different shards of one encoding of it, some of which may lie:
    /// the whole record, and its plain bytes, checked down to its identity. Tries every combination
    /// that has the last shard in it; whoever adds shards one by one has tried those without it.
    #[must_use]
    pub fn recover(&self, shards: &[Shard]) -> Option<(v1::Record, Bytes)> {
        let (newest, others) = shards.split_last()?;
        if shards.len() < self.needed() {
            return None;
        }
        let mut chosen: Vec<usize> = (0..self.needed() - 1).collect();
        for _ in 0..COMBINATIONS_MAX {
            let mut some: Vec<&Shard> = chosen.iter().map(|at| &others[*at]).collect();
            some.push(newest);
            if let Ok(whole) = self.join(&some)
                && let Ok((_, plain)) = record::open(&whole)
            {
                return Some((whole, plain));
            }
            if !advance(&mut chosen, others.len()) {
                break;
            }
        }
        None
    }
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
