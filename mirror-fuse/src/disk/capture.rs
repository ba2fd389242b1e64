//! What the persister reads: a chunk as of a snapshot's cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_repository::Identified;
use bytes::Bytes;

use super::DiskError;
use super::aside::{Aside, Content, present_runs};
use super::facts::Pending;
use super::generation::Generation;
use super::map::Mark;
use super::shape::Sectors;
use super::stripes::Stripe;
use super::upstreams::SnapshotChunks;

/// Between two tries to fetch a chunk of the base that a snapshot needs: each try waits for the
/// repository by itself already.
const RETRY: Duration = Duration::from_secs(1);

/// The chunks of the oldest pending snapshot. Nothing is captured for it once this is dropped, not
/// even by a read that is still under way.
pub(super) struct Captures {
    generation: Arc<Generation>,
    wanted: Arc<Wanted>,
    stalled: Arc<dyn Fn(Option<String>) + Send + Sync>,
}

/// A snapshot for which chunks are captured.
struct Wanted {
    snapshot: Pending,
    over: AtomicBool,
}

impl Drop for Captures {
    fn drop(&mut self) {
        self.wanted.over.store(true, Ordering::Release);
    }
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
    ///
    /// The delta is read without the chunk's lock, so that no write waits for a thread that gives way
    /// to others. *Invariant:* what was read counts only if the chunk is then as it was before. A
    /// write in between has changed its mark under the lock before it changed a byte, and has made the
    /// copy that is taken instead. Writes of before the cut have ended: they held the lock.
    fn capture(&self, wanted: &Wanted, chunk: u64) -> Result<Captured, DiskError> {
        match self.look(wanted, chunk) {
            Ok(present) => self.keep(wanted, chunk, self.read_present(chunk, present)),
            Err(captured) => Ok(captured),
        }
    }

    /// Keeps what was read of the delta, if it is the snapshot's.
    fn keep(
        &self,
        wanted: &Wanted,
        chunk: u64,
        read: Result<Captured, DiskError>,
    ) -> Result<Captured, DiskError> {
        let mut stripe = self.stripes.lock(chunk);
        match self.elsewhere(&mut stripe, wanted, chunk) {
            Ok(mark) => {
                let content = read?;
                self.map.set_mark(chunk, Mark { captured: true, ..mark });
                Ok(content)
            }
            Err(captured) => Ok(captured),
        }
    }

    /// Which sectors of a chunk the delta holds for `snapshot`; or what is to be taken instead.
    fn look(&self, wanted: &Wanted, chunk: u64) -> Result<Vec<Sectors>, Captured> {
        let mut stripe = self.stripes.lock(chunk);
        self.elsewhere(&mut stripe, wanted, chunk)?;
        Ok(present_runs(&self.map, self.shape, chunk))
    }

    /// A chunk's content as of `snapshot` where it is not the delta's; the chunk's mark where it is.
    fn elsewhere(
        &self,
        stripe: &mut Stripe,
        wanted: &Wanted,
        chunk: u64,
    ) -> Result<Mark, Captured> {
        let snapshot = &wanted.snapshot;
        // Who gives its chunks back takes their locks after that is set.
        if wanted.over.load(Ordering::Acquire) {
            return Err(Captured::Gone);
        }
        if let Some(aside) = self.take_aside(stripe, snapshot, chunk) {
            return Err(Captured::Aside(aside));
        }
        let mark = self.map.mark(chunk);
        // Changed since the cut: never take what is in the delta now.
        if mark.epoch > snapshot.last { Err(Captured::Gone) } else { Ok(mark) }
    }

    /// What the delta holds in those sectors, at this moment.
    fn read_present(&self, chunk: u64, present: Vec<Sectors>) -> Result<Captured, DiskError> {
        if self.is_hole(chunk, &present)? {
            return Ok(Captured::Zeros);
        }
        Ok(Captured::Read(self.copier().read(chunk, present)?))
    }

    /// Takes a chunk's content and finds out its identity, if all of its bytes are here. Blocks.
    fn read_captured(&self, wanted: &Wanted, chunk: u64) -> Result<Got, DiskError> {
        let captured = self.capture(wanted, chunk)?;
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
    fn is_hole(&self, chunk: u64, present: &[Sectors]) -> Result<bool, DiskError> {
        let sectors = Sectors { first: 0, end: self.shape.chunk_sectors(chunk) };
        if *present != [sectors] {
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
        let wanted = Arc::clone(&self.wanted);
        let common = &self.generation.common;
        let read = move || generation.read_captured(&wanted, index);
        let got = common.in_background(read).await.map_err(|error| error.to_string())?;
        match got {
            Got::Gone => Err(format!(
                "chunk {index} was overwritten after its snapshot was taken and before it could \
                 be kept, because the snapshot before it failed"
            )),
            Got::Whole(chunk) => Ok(chunk),
            Got::Part(mut chunk, absent) => {
                self.fill(index, &absent, &mut chunk).await?;
                let identify = move || Ok(Identified::of(chunk.into()));
                common.in_background(identify).await.map_err(|error| error.to_string())
            }
        }
    }
}

impl Captures {
    /// `stalled` is told why a chunk of the base cannot be had, for as long as that is so.
    pub(super) fn new(
        generation: Arc<Generation>,
        snapshot: Pending,
        stalled: Arc<dyn Fn(Option<String>) + Send + Sync>,
    ) -> Self {
        let wanted = Arc::new(Wanted { snapshot, over: AtomicBool::new(false) });
        Self { generation, wanted, stalled }
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tests::support::{CHUNK, World, deps, pattern, spec_of};
    use crate::disk::{Attempt, Disk};

    const SIZE: usize = 2 * CHUNK;

    /// A disk whose chunks have changed before a COMMIT that nobody persists, and what a persister of
    /// it would capture with.
    async fn committed(dir: &std::path::Path) -> (Arc<World>, Arc<Disk>, Captures) {
        let world = World::new();
        let source = world.image("base", &vec![0; SIZE]);
        let spec = spec_of("disk", source, SIZE as u64);
        let disk = Disk::create(&dir.join("disk"), spec, deps(&world, (16, 16), "boot")).unwrap();
        disk.take_persister().unwrap().abort();
        disk.put(0, &pattern(1, SIZE)).await;
        disk.ensure_clone().await.unwrap();
        disk.try_commit().unwrap().unwrap();
        let generation = disk.shared.generation.load_full();
        let snapshot = generation.epochs.oldest().unwrap();
        (world, disk, Captures::new(generation, snapshot, Arc::new(|_| {})))
    }

    fn bytes(captured: Captured) -> Vec<u8> {
        match captured {
            Captured::Read(content) => content.whole(CHUNK).unwrap().to_vec(),
            Captured::Aside(aside) => aside.content().whole(CHUNK).unwrap().to_vec(),
            Captured::Zeros | Captured::Gone => panic!("there are bytes"),
        }
    }

    #[tokio::test]
    async fn a_write_does_not_wait_for_a_chunk_that_is_being_read() {
        let dir = tempfile::tempdir().unwrap();
        let (_world, disk, captures) = committed(dir.path()).await;
        let Captures { generation, wanted, .. } = &captures;
        for before_the_read in [true, false] {
            // The first time before a byte is read, then after all of them were.
            let chunk = u64::from(!before_the_read);
            let offset = chunk * CHUNK as u64;
            let write = || disk.try_write(offset, &pattern(2, 4096)).unwrap();
            let present = generation.look(wanted, chunk).ok().unwrap();
            if before_the_read {
                assert_eq!(write(), Attempt::Done);
            }
            let read = generation.read_present(chunk, present);
            if !before_the_read {
                assert_eq!(write(), Attempt::Done);
            }
            let captured = generation.keep(wanted, chunk, read).unwrap();
            assert!(matches!(captured, Captured::Aside(_)), "it was changed meanwhile");
            let at = offset as usize;
            assert!(bytes(captured) == pattern(1, SIZE)[at..at + CHUNK]);
            assert!(!generation.map.mark(chunk).captured, "that is of another snapshot now");
        }
    }

    #[tokio::test]
    async fn what_nobody_changed_is_read_once_and_copied_never() {
        let dir = tempfile::tempdir().unwrap();
        let (_world, disk, captures) = committed(dir.path()).await;
        let Captures { generation, wanted, .. } = &captures;
        let captured = generation.capture(wanted, 0).unwrap();
        assert!(matches!(captured, Captured::Read(_)));
        assert!(bytes(captured) == pattern(1, SIZE)[..CHUNK]);
        assert_eq!(disk.try_write(0, &pattern(2, 4096)).unwrap(), Attempt::Done);
        assert_eq!(disk.status().aside_bytes, 0);
    }

    #[tokio::test]
    async fn a_read_that_ends_after_its_persist_keeps_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (_world, _disk, captures) = committed(dir.path()).await;
        let (generation, wanted) = (Arc::clone(&captures.generation), Arc::clone(&captures.wanted));
        let present = generation.look(&wanted, 0).ok().unwrap();
        let read = generation.read_present(0, present);
        drop(captures);
        // The chunk belongs to the next snapshot now, which must find it as not yet captured.
        assert!(matches!(generation.keep(&wanted, 0, read).unwrap(), Captured::Gone));
        assert!(!generation.map.mark(0).captured);
    }
}
