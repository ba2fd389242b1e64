//! In which order the chunks of a snapshot were read first.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use blobcr_proto::trace::TRACE_CHUNKS_MAX;
use blobcr_proto::v1;
use tokio::time::Instant;

use super::chunk_set::ChunkSet;

/// For how long reads are recorded: the start of a guest and of what it is there for. Later reads are
/// those of its work, and another guest's differ.
pub(super) const WINDOW: Duration = Duration::from_secs(300);

/// What was read, and the beginning of it in order.
#[derive(Debug)]
pub(super) struct Recorder {
    began: Instant,
    read: ChunkSet,
    /// One more than the number of a chunk; 0: it is just being written down.
    order: Box<[AtomicU32]>,
    next: AtomicUsize,
}

impl Recorder {
    /// Of a snapshot of so many chunks, from now on.
    pub(super) fn new(chunks: u64) -> Self {
        let places = chunks.min(TRACE_CHUNKS_MAX);
        Self {
            began: Instant::now(),
            read: ChunkSet::new(chunks),
            order: (0..places).map(|_| AtomicU32::new(0)).collect(),
            next: AtomicUsize::new(0),
        }
    }

    /// A guest asked for a chunk, which is worth a place if it `has_data`. No lock; after the first
    /// time one load.
    pub(super) fn was_read(&self, chunk: u64, has_data: impl FnOnce() -> bool) {
        if self.read.contains(chunk) || !self.read.insert(chunk) || !has_data() {
            return;
        }
        if self.began.elapsed() < WINDOW
            && let Some(place) = self.order.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            // The largest image has 2^27 chunks.
            place.store(chunk as u32 + 1, Ordering::Relaxed);
        }
    }

    /// All that was read.
    pub(super) const fn read(&self) -> &ChunkSet {
        &self.read
    }

    /// Whether nothing more is recorded.
    pub(super) fn is_over(&self) -> bool {
        self.began.elapsed() >= WINDOW || self.next.load(Ordering::Relaxed) >= self.order.len()
    }

    /// What was recorded so far.
    pub(super) fn trace(&self) -> v1::ReadTrace {
        let chunks = self.order.iter().map(|place| place.load(Ordering::Relaxed));
        v1::ReadTrace::of(chunks.filter_map(|place| Some(u64::from(place.checked_sub(1)?))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(recorder: &Recorder) -> Vec<u64> {
        recorder.trace().chunks().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn first_reads_are_recorded_in_order_until_the_time_is_over() {
        let recorder = Recorder::new(1000);
        for chunk in [5, 6, 2, 5, 900, 2] {
            recorder.was_read(chunk, || true);
        }
        // All zeros: read, and not worth fetching.
        recorder.was_read(7, || false);
        recorder.was_read(7, || true);
        assert_eq!(chunks(&recorder), [5, 6, 2, 900]);
        assert!(recorder.read().contains(7) && !recorder.is_over());
        tokio::time::advance(WINDOW).await;
        recorder.was_read(8, || true);
        assert_eq!(chunks(&recorder), [5, 6, 2, 900]);
        assert!(recorder.read().contains(8) && recorder.is_over());
    }

    #[tokio::test]
    async fn no_more_is_recorded_than_a_trace_holds() {
        let recorder = Recorder::new(1 << 20);
        for chunk in 0..TRACE_CHUNKS_MAX + 10 {
            recorder.was_read(chunk * 2, || true);
        }
        assert!(recorder.is_over());
        let trace = recorder.trace();
        assert_eq!(trace.check(), Ok(()));
        assert!(trace.chunks().zip(0..).all(|(chunk, at)| chunk == at * 2));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn threads_record_each_chunk_once() {
        let recorder = std::sync::Arc::new(Recorder::new(10_000));
        let threads = (0..4).map(|_| {
            let recorder = std::sync::Arc::clone(&recorder);
            tokio::spawn(async move { (0..5000).for_each(|c| recorder.was_read(c, || true)) })
        });
        futures::future::join_all(threads).await;
        let mut found = chunks(&recorder);
        found.sort_unstable();
        assert_eq!(found, (0..5000).collect::<Vec<_>>());
    }
}
