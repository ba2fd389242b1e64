//! Which chunk lies where in a snapshot, as far as this host knows it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use blobcr_proto::Hash;

/// Chunks that are looked up together: 128 MiB of 256 KiB chunks, a few tree nodes, 16 KiB here.
pub(super) const RUN_CHUNKS: u64 = 512;

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaf {
    /// Its run was not looked up, or was forgotten.
    Unknown,
    /// All zeros.
    Hole,
    /// Stored under this identity.
    Chunk(Hash),
}

impl From<Option<Hash>> for Leaf {
    fn from(id: Option<Hash>) -> Self {
        id.map_or(Self::Hole, Self::Chunk)
    }
}

#[derive(Debug)]
struct Run {
    /// Empty when every chunk is a hole.
    ids: Box<[Option<Hash>]>,
    /// Looked at since the budget last came by.
    used: AtomicBool,
}

/// Runs whose places are made together, when the first of them is known: a snapshot of terabytes is
/// opened and closed as quickly as a small one.
const SEGMENT_RUNS: usize = 512;

type Segment = Box<[ArcSwapOption<Run>]>;

/// The runs of one snapshot. Looking a chunk up takes no lock.
#[derive(Debug)]
pub(super) struct Leaves(Box<[OnceLock<Segment>]>);

impl Leaves {
    pub(super) fn new(chunks: u64) -> Self {
        let segments = chunks.div_ceil(RUN_CHUNKS * SEGMENT_RUNS as u64);
        Self((0..segments).map(|_| OnceLock::new()).collect())
    }

    /// Where a run is kept, once one near it was.
    fn known_place(&self, run: u64) -> Option<&ArcSwapOption<Run>> {
        let run = run as usize;
        Some(&self.0[run / SEGMENT_RUNS].get()?[run % SEGMENT_RUNS])
    }

    fn place(&self, run: u64) -> &ArcSwapOption<Run> {
        let run = run as usize;
        let make = || (0..SEGMENT_RUNS).map(|_| ArcSwapOption::empty()).collect();
        &self.0[run / SEGMENT_RUNS].get_or_init(make)[run % SEGMENT_RUNS]
    }

    pub(super) fn get(&self, chunk: u64) -> Leaf {
        let Some(place) = self.known_place(chunk / RUN_CHUNKS) else { return Leaf::Unknown };
        let run = place.load();
        let Some(run) = &*run else { return Leaf::Unknown };
        if !run.used.load(Ordering::Relaxed) {
            run.used.store(true, Ordering::Relaxed);
        }
        run.ids.get((chunk % RUN_CHUNKS) as usize).copied().flatten().into()
    }

    fn forget(&self, run: u64) {
        if let Some(place) = self.known_place(run) {
            place.store(None);
        }
    }

    /// Whether the run was looked at since this was last asked.
    fn was_used(&self, run: u64) -> bool {
        self.known_place(run).is_some_and(|place| {
            place.load().as_ref().is_some_and(|run| run.used.swap(false, Ordering::Relaxed))
        })
    }
}

/// Bounds the runs that all snapshots of a host keep together.
#[derive(Debug)]
pub(super) struct LeafBudget {
    runs_max: usize,
    kept: Mutex<VecDeque<(Weak<Leaves>, u64)>>,
}

impl LeafBudget {
    pub(super) fn new(bytes: u64) -> Self {
        let run = RUN_CHUNKS * size_of::<Option<Hash>>() as u64;
        Self {
            runs_max: usize::try_from(bytes / run).unwrap_or(usize::MAX).max(1),
            kept: Mutex::default(),
        }
    }

    /// Keeps a run, and forgets others, which were not looked at for longest, where there are too
    /// many. Runs of holes cost nothing and are not counted.
    pub(super) fn keep(&self, leaves: &Arc<Leaves>, run: u64, ids: &[Option<Hash>]) {
        let holes = ids.iter().all(Option::is_none);
        let ids = if holes { Box::default() } else { ids.into() };
        let place = leaves.place(run);
        let fresh = Arc::new(Run { ids, used: AtomicBool::new(false) });
        if place.swap(Some(fresh)).is_some() || holes {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Room is made before the new one is listed, so that it is not the first to go.
        while kept.len() >= self.runs_max {
            let Some((owner, run)) = kept.pop_front() else { break };
            let Some(leaves) = owner.upgrade() else { continue };
            // Ends: the mark is cleared, so the second time round there is one to forget.
            if leaves.was_used(run) {
                kept.push_back((owner, run));
            } else {
                leaves.forget(run);
            }
        }
        kept.push_back((Arc::downgrade(leaves), run));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(seed: u64) -> Vec<Option<Hash>> {
        (0..RUN_CHUNKS).map(|n| (n % 3 != 0).then(|| Hash::of(&(seed + n).to_le_bytes()))).collect()
    }

    #[test]
    fn a_kept_run_answers_for_its_chunks_and_no_others() {
        let leaves = Arc::new(Leaves::new(RUN_CHUNKS * 2 + 1));
        let budget = LeafBudget::new(1 << 20);
        assert_eq!(leaves.get(0), Leaf::Unknown);
        budget.keep(&leaves, 1, &ids(0));
        assert_eq!(leaves.get(RUN_CHUNKS - 1), Leaf::Unknown);
        assert_eq!(leaves.get(RUN_CHUNKS), Leaf::Hole);
        assert_eq!(leaves.get(RUN_CHUNKS + 1), Leaf::Chunk(Hash::of(&1u64.to_le_bytes())));
        assert_eq!(leaves.get(2 * RUN_CHUNKS), Leaf::Unknown);
        budget.keep(&leaves, 2, &[None]);
        assert_eq!(leaves.get(2 * RUN_CHUNKS), Leaf::Hole);
    }

    #[test]
    fn the_budget_forgets_what_is_not_looked_at() {
        let run_bytes = RUN_CHUNKS * size_of::<Option<Hash>>() as u64;
        let budget = LeafBudget::new(4 * run_bytes);
        let leaves = Arc::new(Leaves::new(100 * RUN_CHUNKS));
        let known = || (0..100).filter(|run| leaves.place(*run).load().is_some()).count();
        budget.keep(&leaves, 0, &ids(0));
        for run in 1..100 {
            assert_ne!(leaves.get(0), Leaf::Unknown, "in use before run {run}");
            budget.keep(&leaves, run, &ids(run));
            assert!(known() <= 4);
        }
        let gone = Arc::new(Leaves::new(RUN_CHUNKS));
        budget.keep(&gone, 0, &ids(0));
        drop(gone);
        budget.keep(&leaves, 1, &ids(0));
        assert!(known() <= 4);
    }
}
