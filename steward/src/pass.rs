//! One pass over a range of partitions: every object that is on any of some nodes is mended.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::layout::KINDS;
use crate::mend::{Mended, Mender};
use crate::walk::{Object, Walk};

/// Objects that are mended at the same time: a node syncs what comes together once.
const OBJECTS_AT_ONCE: usize = 32;

/// What a pass left of one partition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Objects that some node does not have yet.
    pub(crate) owing: u64,
    /// Objects of which no good copy is left.
    pub(crate) lost: u64,
}

/// Mends what `nodes` (indices in the table) list of a range of partitions, and of those in `only`,
/// if it is there. Returns which are not as they should be.
pub(crate) async fn pass(
    mender: &Mender<'_>,
    nodes: &[u32],
    partitions: Range<usize>,
    only: Option<&BTreeSet<usize>>,
) -> BTreeMap<usize, Left> {
    let mut left: BTreeMap<usize, Left> = BTreeMap::new();
    for kind in KINDS {
        let mut walk = Walk::new(mender.layout, mender.members, nodes, kind, partitions.clone());
        let mut under_way = FuturesUnordered::new();
        loop {
            if under_way.len() < OBJECTS_AT_ONCE
                && let Some(object) = walk.next().await
            {
                let partition = mender.layout.placement.partition(&object.id);
                if only.is_none_or(|only| only.contains(&partition)) {
                    under_way.push(mended(mender, partition, object));
                }
                continue;
            }
            let Some((partition, mended)) = under_way.next().await else { break };
            if mended == Mended::Owing {
                left.entry(partition).or_default().owing += 1;
            } else if mended == Mended::Lost {
                left.entry(partition).or_default().lost += 1;
            }
        }
    }
    left
}

async fn mended(mender: &Mender<'_>, partition: usize, object: Object) -> (usize, Mended) {
    (partition, mender.mend(object).await)
}
