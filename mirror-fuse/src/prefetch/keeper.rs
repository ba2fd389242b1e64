//! Getting a snapshot's trace from the repository, and keeping what is recorded of it there.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::CatalogError;
use tokio::sync::watch;

use super::replay::replay;
use super::{Prefetcher, ReadAhead, Seen, Snapshot};
use crate::base::SnapshotBase;

/// When a trace is kept for the first time, so that it survives this host. Each time takes twice as
/// long as the one before: seven, until nothing more is recorded.
const KEEP_FIRST: Duration = Duration::from_secs(5);

/// The task that does both, for as long as a disk lies on the snapshot.
pub(super) struct Keeper {
    prefetcher: Arc<Prefetcher>,
    snapshot: Snapshot,
    base: Arc<SnapshotBase>,
    seen: Arc<Seen>,
    /// Closed when no disk lies on the snapshot any more.
    in_use: watch::Receiver<()>,
}

impl Keeper {
    pub(super) fn new(ahead: &ReadAhead, seen: Arc<Seen>) -> Self {
        Self {
            prefetcher: Arc::clone(&ahead.prefetcher),
            snapshot: ahead.snapshot,
            base: Arc::clone(&ahead.base),
            seen,
            in_use: ahead.in_use.subscribe(),
        }
    }

    pub(super) async fn run(self) {
        let found = self.find().await;
        let own = found.as_ref().filter(|found| (found.image_id, found.number) == self.snapshot);
        let kept = own.and_then(|found| found.trace.as_ref()).map_or(0, v1::ReadTrace::count);
        let replayed = async {
            if let Some(trace) = found.as_ref().and_then(|found| found.trace.as_ref()) {
                let rate = self.prefetcher.rate.as_ref();
                tokio::select! {
                    () = replay(trace, &self.base, &self.seen, rate) => {}
                    () = self.unused() => {}
                }
            }
        };
        tokio::join!(replayed, self.keep(kept));
        let (image, number) = self.snapshot;
        tracing::debug!(image, number, "what is read is recorded no more");
    }

    /// Returns when no disk lies on the snapshot any more.
    async fn unused(&self) {
        // Nothing is ever sent.
        let _ = self.in_use.clone().changed().await;
    }

    /// What is kept of the snapshot, or of one that it descends from.
    async fn find(&self) -> Option<v1::GetReadTraceResponse> {
        let (id, number) = self.snapshot;
        let image = Some(v1::ImageRef { id, name: String::new() });
        let catalog = self.prefetcher.repository.catalog();
        let found = catalog.get_read_trace(v1::SnapshotRef { image, number }).await;
        let problem = match found {
            Ok(found) => match found.trace.as_ref().map(v1::ReadTrace::check) {
                Some(Ok(())) => return Some(found),
                Some(Err(problem)) => problem.to_owned(),
                None => "it is empty".to_owned(),
            },
            Err(CatalogError::NotFound(_)) => return None,
            Err(error) => error.to_string(),
        };
        tracing::info!(
            image = id,
            number,
            problem,
            "a read trace cannot be used and is left alone"
        );
        None
    }

    /// Keeps the trace from time to time and at the end, where it is longer than what is `kept`.
    async fn keep(&self, mut kept: u64) {
        let mut pause = KEEP_FIRST;
        loop {
            let ends = tokio::select! {
                () = tokio::time::sleep(pause) => false,
                () = self.unused() => true,
            };
            let ends = ends || self.seen.recorder.is_over();
            let trace = self.seen.recorder.trace();
            let count = trace.count();
            if count > kept && self.put(trace).await {
                kept = count;
            }
            if ends {
                return;
            }
            pause *= 2;
        }
    }

    async fn put(&self, trace: v1::ReadTrace) -> bool {
        let (image_id, number) = self.snapshot;
        let request = v1::PutReadTraceRequest { image_id, number, trace: Some(trace) };
        let put = self.prefetcher.repository.catalog().put_read_trace(request).await;
        match &put {
            Ok(_) => tracing::debug!(image = image_id, number, "a read trace is kept"),
            Err(error) => {
                tracing::debug!(image = image_id, number, %error, "a read trace is not kept");
            }
        }
        put.is_ok()
    }
}
