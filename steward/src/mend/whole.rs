//! Objects of which each node has a whole copy.

use blobcr_proto::v1;

use super::{Depth, Mended, Mender};
use crate::walk::{Copied, Object};

impl Mender<'_> {
    pub(super) async fn mend_whole(&self, object: &Object) -> Mended {
        let generation = self.generation_of(object);
        let places = self.places(object);
        let mut held: Vec<&Copied> = places.iter().filter_map(|(_, _, copy)| *copy).collect();
        let mut good: Option<v1::Record> = None;
        if self.depth == Depth::Read {
            let mut whole = Vec::with_capacity(held.len());
            for copy in held {
                if let Some(record) = self.read(copy).await {
                    whole.push(copy);
                    good = Some(record);
                }
            }
            held = whole;
        }
        let lacking: Vec<u32> = places
            .iter()
            .map(|(node, _, _)| *node)
            .filter(|node| !held.iter().any(|copy| copy.node == *node))
            .collect();
        let uneven = object.copies.iter().any(|copy| copy.generation != generation);
        if !lacking.is_empty() {
            for (node, _, copy) in &places {
                let missing = copy.is_none() && self.node(*node).is_some();
                self.tally(*node, |tally| tally.missing += u64::from(missing));
            }
            if good.is_none() {
                good = self.good_copy(object).await;
            }
            let Some(record) = good else { return Mended::Lost };
            let records = lacking.into_iter().map(|node| (node, record.clone())).collect();
            if !self.put(generation, records).await {
                return Mended::Owing;
            }
        }
        if uneven && !self.raise(generation, &held).await {
            return Mended::Owing;
        }
        Mended::Complete
    }

    /// The first copy that is good, wherever it is.
    async fn good_copy(&self, object: &Object) -> Option<v1::Record> {
        for copy in object.copies.iter().filter(|copy| copy.key.shard == 0) {
            if let Some(record) = self.read(copy).await {
                return Some(record);
            }
        }
        None
    }
}
