//! What the persister reads: a chunk as of a snapshot's cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_repository::Identified;
use bytes::Bytes;

use super::DiskError;
use super::aside::Old;
use super::content::Content;
use super::facts::Pending;
use super::generation::Generation;
use super::map::Mark;
use super::parts::Parts;
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
    Here(Arc<Content>),
    /// The whole chunk was discarded.
    Zeros,
    /// Its content as of the snapshot is gone.
    Gone,
}

/// Where a chunk's content as of a snapshot is.
enum Found {
    /// In the delta: nothing has changed since. With the chunk's mark.
    InDelta(Mark),
    /// Aside, in part or as a whole.
    Aside(Old),
    Gone,
}

/// What the delta holds of a chunk, at some moment.
enum Read {
    /// The whole chunk, as one hole.
    Hole,
    /// The sectors that are present, packed.
    Packed(Vec<u8>),
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
    /// Takes a chunk's content as of `snapshot`, the oldest pending one: copies or delta, whichever
    /// has it. The chunk is `Idle` for that snapshot afterwards: the next write copies nothing.
    ///
    /// The delta is read without the chunk's lock, so that no write waits for a thread that gives way
    /// to others. *Invariant:* of what was read, a sector counts only if nobody has changed it before the
    /// chunk's lock is taken again. A write in between has copied it aside under the lock before it
    /// changed a byte, and that copy is taken instead. Writes of before the cut have ended: they held
    /// the lock.
    fn capture(&self, wanted: &Wanted, chunk: u64) -> Result<Captured, DiskError> {
        match self.look(wanted, chunk) {
            Ok(present) => {
                let read = self.read_present(chunk, &present);
                self.keep(wanted, chunk, present, read)
            }
            Err(captured) => Ok(captured),
        }
    }

    /// Which sectors of a chunk the delta holds for `snapshot`, some of them perhaps changed since; or
    /// what is to be taken instead.
    fn look(&self, wanted: &Wanted, chunk: u64) -> Result<Vec<Sectors>, Captured> {
        let mut stripe = self.stripes.lock(chunk);
        // Not taken yet: what is copied while the delta is read counts, too.
        if let Some(parts) = parts_of(&stripe, &wanted.snapshot, chunk)
            && !parts.are_all()
        {
            return Ok(parts.present().to_vec());
        }
        let old = match self.find(&mut stripe, wanted, chunk) {
            Found::InDelta(_) => return Ok(self.map.present_runs(chunk)),
            Found::Aside(old) => old,
            Found::Gone => return Err(Captured::Gone),
        };
        drop(stripe);
        Err(Captured::Here(match old {
            Old::Whole(content) => content,
            Old::Parts(parts) => Arc::new(parts.whole()),
        }))
    }

    /// Keeps what was read of the delta as far as it is the snapshot's.
    fn keep(
        &self,
        wanted: &Wanted,
        chunk: u64,
        present: Vec<Sectors>,
        read: Result<Read, DiskError>,
    ) -> Result<Captured, DiskError> {
        let mut stripe = self.stripes.lock(chunk);
        let found = self.find(&mut stripe, wanted, chunk);
        if let (Found::InDelta(mark), Ok(_)) = (&found, &read) {
            self.map.set_mark(chunk, Mark { captured: true, ..*mark });
        }
        drop(stripe);
        let content = match (found, read) {
            (Found::Gone, _) => return Ok(Captured::Gone),
            (Found::Aside(Old::Whole(content)), _) => return Ok(Captured::Here(content)),
            (Found::InDelta(_), read) => match read? {
                Read::Hole => return Ok(Captured::Zeros),
                Read::Packed(bytes) => Content::of(present, bytes.into()),
            },
            (Found::Aside(Old::Parts(parts)), read) => match read? {
                Read::Hole => parts.over_zeros(),
                Read::Packed(bytes) => parts.over(bytes),
            },
        };
        Ok(Captured::Here(Arc::new(content)))
    }

    /// Where a chunk's content as of `snapshot` is; what is aside is taken.
    fn find(&self, stripe: &mut Stripe, wanted: &Wanted, chunk: u64) -> Found {
        let snapshot = &wanted.snapshot;
        // Who gives its chunks back takes their locks after that is set.
        if wanted.over.load(Ordering::Acquire) {
            return Found::Gone;
        }
        if let Some(old) = self.take_aside(stripe, snapshot, chunk) {
            return Found::Aside(old);
        }
        let mark = self.map.mark(chunk);
        // Changed since the cut: never take what is in the delta now.
        if mark.epoch > snapshot.last { Found::Gone } else { Found::InDelta(mark) }
    }

    /// What the delta holds in those sectors, at this moment.
    fn read_present(&self, chunk: u64, present: &[Sectors]) -> Result<Read, DiskError> {
        if self.is_hole(chunk, present)? {
            return Ok(Read::Hole);
        }
        Ok(Read::Packed(self.copier().read(chunk, present)?))
    }

    /// Takes a chunk's content and finds out its identity, if all of its bytes are here. Blocks.
    fn read_captured(&self, wanted: &Wanted, chunk: u64) -> Result<Got, DiskError> {
        let captured = self.capture(wanted, chunk)?;
        // A writer that has no room for a copy may not need one any more.
        self.common.budgets().freed().notify_waiters();
        let content = match captured {
            Captured::Zeros => return Ok(Got::Whole(None)),
            Captured::Gone => return Ok(Got::Gone),
            Captured::Here(content) => content,
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

    /// The old bytes of a chunk as of `snapshot`, the oldest pending one, if something has changed since.
    fn take_aside(&self, stripe: &mut Stripe, snapshot: &Pending, chunk: u64) -> Option<Old> {
        let versions = stripe.asides.get_mut(&chunk)?;
        let index = versions.iter().position(|aside| aside.is_of(snapshot))?;
        // A snapshot behind this one needs it too, should this one fail.
        if self.epochs.pending().iter().skip(1).any(|later| versions[index].is_of(later)) {
            return Some(versions[index].old().clone());
        }
        let aside = versions.remove(index);
        if versions.is_empty() {
            stripe.asides.remove(&chunk);
        }
        Some(aside.into_old())
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

/// What was copied of a chunk since `snapshot` was cut, where that is not all of it at once.
fn parts_of<'a>(stripe: &'a Stripe, snapshot: &Pending, chunk: u64) -> Option<&'a Parts> {
    let aside = stripe.asides.get(&chunk)?.iter().find(|aside| aside.is_of(snapshot))?;
    match aside.old() {
        Old::Parts(parts) => Some(parts),
        Old::Whole(_) => None,
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
    use crate::disk::{Attempt, Budgets, Disk, DiskDeps, Zero};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

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
            Captured::Here(content) => content.whole(CHUNK).unwrap().to_vec(),
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
            let read = generation.read_present(chunk, &present);
            if !before_the_read {
                assert_eq!(write(), Attempt::Done);
            }
            let captured = generation.keep(wanted, chunk, present, read).unwrap();
            let at = offset as usize;
            assert!(bytes(captured) == pattern(1, SIZE)[at..at + CHUNK]);
            assert!(!generation.map.mark(chunk).captured, "that is of another snapshot now");
        }
    }

    /// What a guest does to a chunk: writes and discards, of parts and of all of it.
    async fn change(disk: &Arc<Disk>, rng: &mut StdRng) {
        for _ in 0..rng.random_range(0..4) {
            let from = rng.random_range(0..CHUNK);
            let len = rng.random_range(1..=CHUNK - from).min(rng.random_range(1..=CHUNK));
            match rng.random_range(0..6) {
                0 => disk.wipe(0, CHUNK as u64, Zero::Discard).await,
                1 => disk.wipe(from as u64, len as u64, Zero::WriteZeroes).await,
                _ => disk.put(from as u64, &pattern(rng.random(), len)).await,
            }
        }
    }

    #[tokio::test]
    async fn whatever_changes_at_whatever_moment_what_was_there_at_the_cut_is_captured() {
        for seed in 0..300 {
            let dir = tempfile::tempdir().unwrap();
            let world = World::new();
            let source = world.image("base", &pattern(9, SIZE));
            let mut rng = StdRng::seed_from_u64(seed);
            // Memory for some sectors only: then the chunk goes to the spill file half-way.
            let sectors = [1 << 20, 7, 1, 0][rng.random_range(0..4)];
            let budgets = Budgets::new(sectors * 4096, 1 << 20);
            let deps = DiskDeps { budgets, ..deps(&world, (0, 0), "boot") };
            let spec = spec_of("disk", source, SIZE as u64);
            let disk = Disk::create(&dir.path().join("disk"), spec, deps).unwrap();
            disk.take_persister().unwrap().abort();
            disk.ensure_clone().await.unwrap();
            change(&disk, &mut rng).await;
            disk.put(0, &pattern(1, 10)).await;
            let cut = disk.all().await;
            let made = disk.try_commit().unwrap().unwrap();
            change(&disk, &mut rng).await;
            // Another one behind it sees other bytes.
            if rng.random() {
                disk.try_commit().unwrap().unwrap();
                change(&disk, &mut rng).await;
            }
            let generation = disk.shared.generation.load_full();
            let snapshot = generation.epochs.oldest().unwrap();
            assert_eq!(snapshot.number, made.number);
            let captures = Captures::new(Arc::clone(&generation), snapshot, Arc::new(|_| {}));
            let captured = match generation.look(&captures.wanted, 0) {
                Err(captured) => captured,
                Ok(present) => {
                    change(&disk, &mut rng).await;
                    let read = generation.read_present(0, &present);
                    change(&disk, &mut rng).await;
                    generation.keep(&captures.wanted, 0, present, read).unwrap()
                }
            };
            change(&disk, &mut rng).await;
            let mut found = pattern(9, CHUNK);
            match captured {
                Captured::Here(content) => content.unpack(&mut found).unwrap(),
                Captured::Zeros => found.fill(0),
                Captured::Gone => panic!("seed {seed}: nothing failed"),
            }
            assert!(found == cut[..CHUNK], "seed {seed}");
        }
    }

    #[tokio::test]
    async fn what_nobody_changed_is_read_once_and_copied_never() {
        let dir = tempfile::tempdir().unwrap();
        let (_world, disk, captures) = committed(dir.path()).await;
        let Captures { generation, wanted, .. } = &captures;
        let captured = generation.capture(wanted, 0).unwrap();
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
        let read = generation.read_present(0, &present);
        drop(captures);
        // The chunk belongs to the next snapshot now, which must find it as not yet captured.
        assert!(matches!(generation.keep(&wanted, 0, present, read).unwrap(), Captured::Gone));
        assert!(!generation.map.mark(0).captured);
    }
}
