//! What a pass has found to be needed, in memory of a fixed size.

use blobcr_proto::Hash;

/// Identities that a set of marks holds at least, so that every pass gets on.
const MARKS_MIN: usize = 64;
/// Of a full set, no more than this may be left after sorting for it to go on as it is: otherwise
/// it would be sorted for every few marks.
const FULL_NUMERATOR: usize = 3;
const FULL_DENOMINATOR: usize = 4;

/// The needed identities of a range: those above `after`, and up to `last`. When there are more than
/// fit, the range gets shorter, and a later pass begins where it ends. So a set never says of an
/// identity in its range that it is not needed when it was marked.
#[derive(Debug)]
pub(super) struct Marks {
    after: Option<Hash>,
    last: Option<Hash>,
    ids: Vec<Hash>,
    capacity: usize,
}

impl Marks {
    /// A set of at most `bytes` for the identities above `after`.
    pub(super) fn new(after: Option<Hash>, bytes: usize) -> Self {
        let capacity = (bytes / Hash::LEN).max(MARKS_MIN);
        Self { after, last: None, ids: Vec::new(), capacity }
    }

    /// The last identity of the range; `None` when it has no end.
    pub(super) const fn last(&self) -> Option<Hash> {
        self.last
    }

    pub(super) fn mark(&mut self, id: Hash) {
        if !self.covers(&id) {
            return;
        }
        self.ids.push(id);
        if self.ids.len() == self.capacity {
            self.settle();
            if self.ids.len() > self.capacity / FULL_DENOMINATOR * FULL_NUMERATOR {
                self.ids.truncate(self.capacity / 2);
                self.last = self.ids.last().copied();
            }
        }
    }

    /// Sorts; to be called once after the last mark, before [`Self::contains`].
    pub(super) fn settle(&mut self) {
        self.ids.sort_unstable();
        self.ids.dedup();
    }

    pub(super) fn covers(&self, id: &Hash) -> bool {
        self.after.is_none_or(|after| *id > after) && self.last.is_none_or(|last| *id <= last)
    }

    pub(super) fn contains(&self, id: &Hash) -> bool {
        self.ids.binary_search(id).is_ok()
    }
}

/// Tree nodes that a pass has been at, as many as fit: one that was forgotten is gone through again,
/// but none is ever taken for one that was visited.
#[derive(Debug)]
pub(super) struct Visited {
    slots: Vec<Option<Hash>>,
}

impl Visited {
    /// A memory of about `bytes`.
    pub(super) fn new(bytes: usize) -> Self {
        let slots = (bytes / size_of::<Option<Hash>>()).max(1);
        Self { slots: vec![None; slots] }
    }

    /// Whether it was not known to be visited; it is from now on.
    pub(super) fn is_first(&mut self, id: Hash) -> bool {
        let at = (id.prefix() % self.slots.len() as u64) as usize;
        let slot = &mut self.slots[at];
        let first = *slot != Some(id);
        *slot = Some(id);
        first
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn id(n: u32) -> Hash {
        Hash::of(&n.to_le_bytes())
    }

    proptest! {
        /// Passes until a range has no end cover every identity once, and each knows exactly what
        /// was marked in its range.
        #[test]
        fn passes_cover_everything_and_forget_nothing(
            marked in prop::collection::vec(0u32..2000, 0..1500),
            others in prop::collection::vec(2000u32..4000, 0..300),
        ) {
            let mut covered = BTreeSet::new();
            let mut after = None;
            loop {
                let mut marks = Marks::new(after, 0);
                marked.iter().for_each(|n| marks.mark(id(*n)));
                marks.settle();
                prop_assert!(marks.ids.len() <= MARKS_MIN && marks.ids.capacity() <= 2 * MARKS_MIN);
                for n in marked.iter().filter(|n| marks.covers(&id(**n))) {
                    prop_assert!(marks.contains(&id(*n)));
                    covered.insert(*n);
                }
                for n in &others {
                    prop_assert!(!marks.contains(&id(*n)));
                }
                after = marks.last();
                if after.is_none() {
                    break;
                }
            }
            prop_assert_eq!(covered, marked.into_iter().collect::<BTreeSet<_>>());
        }

        #[test]
        fn nothing_is_taken_for_visited_that_was_not(ids in prop::collection::vec(0u32..100, 0..500)) {
            let mut visited = Visited::new(7 * size_of::<Option<Hash>>());
            let mut seen = BTreeSet::new();
            for n in ids {
                let first = visited.is_first(id(n));
                prop_assert!(first || seen.contains(&n));
                seen.insert(n);
            }
        }
    }
}
