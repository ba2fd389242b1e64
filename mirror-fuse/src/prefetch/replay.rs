//! Fetching what a trace names, in its order.

use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::Bandwidth;
use futures::StreamExt;
use futures::stream;

use super::Seen;
use crate::base::{Ahead, SnapshotBase};
use crate::disk::BaseError;

/// Chunks of one trace that are fetched, or wait for their turn, at a time.
const UNDER_WAY_MAX: usize = 8;
/// What one trace may fill of the cache: one part in so many.
const CACHE_SHARE: u64 = 4;
/// Before the repository is asked again that could not be reached, at first and at most.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Fetches the chunks of `trace` that nobody has read. Returns when all are there, or there is no more
/// room for them.
pub(super) async fn replay(
    trace: &v1::ReadTrace,
    base: &SnapshotBase,
    seen: &Seen,
    rate: Option<&Bandwidth>,
) {
    let most = base.cache_bytes() / CACHE_SHARE / base.chunk_size().bytes();
    let chunks = trace.chunks().take(usize::try_from(most).unwrap_or(usize::MAX));
    let mut brought = stream::iter(chunks)
        .map(|chunk| async move { (chunk, bring(chunk, base, seen, rate).await) })
        .buffer_unordered(UNDER_WAY_MAX);
    while let Some((chunk, result)) = brought.next().await {
        match result {
            Ok(Ahead::Here) => {}
            Ok(Ahead::Fetched) => {
                seen.fetched.insert(chunk);
            }
            Ok(Ahead::NoRoom) => {
                tracing::debug!(chunk, "the cache has no room for what may be read next");
                return;
            }
            // Whoever reads it is told.
            Err(error) => tracing::debug!(chunk, %error, "a chunk is not fetched ahead"),
        }
    }
}

async fn bring(
    chunk: u64,
    base: &SnapshotBase,
    seen: &Seen,
    rate: Option<&Bandwidth>,
) -> Result<Ahead, BaseError> {
    let mut pause = RETRY_FIRST;
    loop {
        if seen.recorder.read().contains(chunk) {
            return Ok(Ahead::Here);
        }
        let bytes = base.chunk_size().bytes();
        if let Some(rate) = rate {
            rate.take(bytes).await;
        }
        let result = base.bring_ahead(chunk, || !seen.recorder.read().contains(chunk)).await;
        if let (Some(rate), Ok(Ahead::Here)) = (rate, &result) {
            rate.give_back(bytes);
        }
        match result {
            Err(error) if error.is_transient() => tokio::time::sleep(pause).await,
            result => return result,
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}
