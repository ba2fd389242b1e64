//! One pass over a range of partitions: every object that is on any of some nodes is mended.

use std::ops::Range;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::layout::KINDS;
use crate::mend::{Mended, Mender};
use crate::walk::Walk;

/// Objects that are mended at the same time: a node syncs what comes together once.
const OBJECTS_AT_ONCE: usize = 32;

/// What a pass came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pass {
    /// Objects that were looked at.
    pub(crate) objects: u64,
    /// Objects that some node does not have yet.
    pub(crate) owing: u64,
    /// Objects of which no good copy is left.
    pub(crate) lost: u64,
}

/// Mends what `nodes` (indices in the table) list of some partitions.
pub(crate) async fn pass(mender: &Mender<'_>, nodes: &[u32], partitions: Range<usize>) -> Pass {
    let mut done = Pass::default();
    for kind in KINDS {
        let mut walk = Walk::new(mender.layout, mender.members, nodes, kind, partitions.clone());
        let mut under_way = FuturesUnordered::new();
        loop {
            if under_way.len() < OBJECTS_AT_ONCE
                && let Some(object) = walk.next().await
            {
                under_way.push(mender.mend(object));
                continue;
            }
            let Some(mended) = under_way.next().await else { break };
            done.objects += 1;
            done.owing += u64::from(mended == Mended::Owing);
            done.lost += u64::from(mended == Mended::Lost);
        }
    }
    done
}
