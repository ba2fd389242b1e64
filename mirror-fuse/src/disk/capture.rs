//! What the persister reads: a chunk as of a snapshot's cut.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blobcr_repository::Identified;
use bytes::Bytes;

use super::DiskError;
use super::aside::{Aside, Content};
use super::facts::Pending;
use super::generation::Generation;
use super::map::Mark;
use super::shape::Sectors;
use super::stripes::Stripe;
use super::upstreams::SnapshotChunks;

/// Between two tries to fetch a chunk of the base that a snapshot needs: each try waits for the
/// repository by itself already.
const RETRY: Duration = Duration::from_secs(1);

/// The chunks of the oldest pending snapshot.
pub(super) struct Captures {
    pub(super) generation: Arc<Generation>,
    pub(super) snapshot: Pending,
    pub(super) stalled: Arc<dyn Fn(Option<String>) + Send + Sync>,
}

enum Captured {
    Read(Content),
    Aside(Arc<Aside>),
    /// The whole chunk was discarded.
    Zeros,
    /// Its content as of the snapshot is gone.
    Gone,
}

/// The same as bytes: what was aside is given up.
enum Got {
    /// All of it; nothing when it is zeros.
    Whole(Option<Identified>),
    /// But for these sectors, which the base has.
    Part(Vec<u8>, Vec<Sectors>),
    Gone,
}

impl Generation {
    /// Takes a chunk's content as of `snapshot`, the oldest pending one: copy or delta, whichever
    /// has it. The chunk is `Idle` for that snapshot afterwards: the next write copies nothing.
    fn capture(&self, snapshot: &Pending, chunk: u64) -> Result<Captured, DiskError> {
        let mut stripe = self.stripes.lock(chunk);
        if let Some(aside) = self.take_aside(&mut stripe, snapshot, chunk) {
            return Ok(Captured::Aside(aside));
        }
        let mark = self.map.mark(chunk);
        if mark.epoch > snapshot.last {
            // The chunk was changed since the cut. Never take what is in the delta now.
            return Ok(Captured::Gone);
        }
        let content = if self.is_hole(chunk)? {
            Captured::Zeros
        } else {
            Captured::Read(self.copier().read(chunk)?)
        };
        self.map.set_mark(chunk, Mark { captured: true, ..mark });
        Ok(content)
    }

    /// Takes a chunk's content and finds out its identity, if all of its bytes are here. Blocks.
    fn read_captured(&self, snapshot: &Pending, chunk: u64) -> Result<Got, DiskError> {
        let captured = self.capture(snapshot, chunk)?;
        // A writer that has no room for a copy may not need one any more.
        self.common.budgets().freed().notify_waiters();
        let content = match &captured {
            Captured::Zeros => return Ok(Got::Whole(None)),
            Captured::Gone => return Ok(Got::Gone),
            Captured::Read(content) => content,
            Captured::Aside(aside) => aside.content(),
        };
        let size = self.shape.chunk_size.len();
        if let Some(whole) = content.whole(size) {
            return Ok(Got::Whole(Identified::of(whole)));
        }
        let mut bytes = vec![0; size];
        content.unpack(&mut bytes)?;
        let absent = content.absent(self.shape.chunk_sectors(chunk));
        if absent.is_empty() {
            return Ok(Got::Whole(Identified::of(bytes.into())));
        }
        Ok(Got::Part(bytes, absent))
    }

    /// The copy of a chunk as of `snapshot`, the oldest pending one, if there is one.
    fn take_aside(
        &self,
        stripe: &mut Stripe,
        snapshot: &Pending,
        chunk: u64,
    ) -> Option<Arc<Aside>> {
        let versions = stripe.asides.get_mut(&chunk)?;
        let index = versions.iter().position(|aside| aside.is_of(snapshot))?;
        let aside = Arc::clone(&versions[index]);
        // A snapshot behind this one needs it too, should this one fail.
        if !self.epochs.pending().iter().skip(1).any(|later| aside.is_of(later)) {
            versions.remove(index);
            if versions.is_empty() {
                stripe.asides.remove(&chunk);
            }
        }
        Some(aside)
    }

    /// Whether the delta holds the whole chunk, as one hole.
    fn is_hole(&self, chunk: u64) -> Result<bool, DiskError> {
        let sectors = Sectors { first: 0, end: self.shape.chunk_sectors(chunk) };
        if self.map.run(chunk, sectors) != (true, sectors.end) {
            return Ok(false);
        }
        let start = self.at(chunk, 0);
        let data = self.delta.seek_data(start)?;
        Ok(data.is_none_or(|data| data >= start + sectors.bytes() as u64))
    }

    /// Makes chunks of a failed snapshot like any that no snapshot has read.
    pub(super) fn uncapture(&self, snapshot: &Pending, chunks: &[u64]) {
        for chunk in chunks {
            let _stripe = self.stripes.lock(*chunk);
            let mark = self.map.mark(*chunk);
            if mark.captured && snapshot.covers(mark.epoch) {
                self.map.set_mark(*chunk, Mark { captured: false, ..mark });
            }
        }
    }
}

#[async_trait]
impl SnapshotChunks for Captures {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, String> {
        let generation = Arc::clone(&self.generation);
        let snapshot = self.snapshot.clone();
        let common = &self.generation.common;
        let read = move || generation.read_captured(&snapshot, index);
        let got = common.blocking(read).await.map_err(|error| error.to_string())?;
        match got {
            Got::Gone => Err(format!(
                "chunk {index} was overwritten after its snapshot was taken and before it could \
                 be kept, because the snapshot before it failed"
            )),
            Got::Whole(chunk) => Ok(chunk),
            Got::Part(mut chunk, absent) => {
                self.fill(index, &absent, &mut chunk).await?;
                let identify = move || Ok(Identified::of(chunk.into()));
                common.blocking(identify).await.map_err(|error| error.to_string())
            }
        }
    }
}

impl Captures {
    /// Fills what the guest never wrote from the base. No lock is held: the base never changes.
    async fn fill(&self, index: u64, absent: &[Sectors], out: &mut [u8]) -> Result<(), String> {
        let base = &self.generation.base;
        let mut fetched = None;
        for run in absent {
            let range = run.start_byte()..run.start_byte() + run.bytes();
            if fetched.is_none() {
                let to = &mut out[range.clone()];
                let local = base.read_local(index, range.start as u64, to);
                if local.map_err(|error| error.to_string())? {
                    continue;
                }
                fetched = Some(self.fetch(index).await?);
            }
            match fetched.as_ref().and_then(Option::as_ref) {
                Some(whole) => out[range.clone()].copy_from_slice(&whole[range]),
                None => out[range].fill(0),
            }
        }
        Ok(())
    }

    /// Waits for the repository as long as it takes: the guest's bytes were read already.
    async fn fetch(&self, index: u64) -> Result<Option<Bytes>, String> {
        let base = &self.generation.base;
        loop {
            match base.fetch_unawaited(index).await {
                Ok(whole) => {
                    (self.stalled)(None);
                    if let Some(whole) = &whole {
                        self.generation
                            .check_fetched(index, whole)
                            .map_err(|error| error.to_string())?;
                    }
                    return Ok(whole);
                }
                Err(error) if error.is_transient() => {
                    (self.stalled)(Some(error.to_string()));
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}
