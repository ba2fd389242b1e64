//! Opening a disk: after a clean stop, after the daemon was killed, after a host crash.
//!
//! | what happened | how it is known | what is believed |
//! |---|---|---|
//! | clean stop | `clean` in the state file | the map and its facts |
//! | the daemon was killed | the facts name this boot | the map and its facts |
//! | host crash | neither | the journal: what was flushed, and its bytes or newer ones in the delta |
//!
//! After a host crash nothing is known of what the last snapshots held, so every chunk in the delta
//! counts as changed since the attached snapshot, and the next snapshot's tree is a change of that
//! one's: right whatever was published before, and cheap, for the repository has most of it.
//! Pending snapshots have failed, and numbers that may have been handed out are skipped.
//!
//! After the daemon was killed, pending snapshots go on if the delta still has all their bytes. One
//! whose chunks were overwritten since (their old versions were in memory) has failed unless it was
//! published already, and its changes count for the next one.

use std::path::Path;
use std::sync::Arc;

use super::delta::Delta;
use super::epochs::List;
use super::facts::Facts;
use super::files::Files;
use super::generation::{Common, Contents, DELTA, Generation, JOURNAL, MAP, Parts, generation_dir};
use super::io::Which;
use super::journal::Journal;
use super::map::{Map, Mark};
use super::record;
use super::shared::{NUMBERS_RESERVED, Start};
use super::state_file::{Durable, StateFile};
use super::{DiskDeps, DiskError};

pub(super) const RECORD: &str = "record";
pub(super) const STATE: &str = "state";
/// A generation number to begin with.
pub(super) const FIRST_GENERATION: u64 = 1;
/// The first epoch: a chunk that was never changed has the mark 0.
const FIRST_EPOCH: u64 = 1;

/// Facts of a generation in which nothing has happened yet.
pub(super) fn fresh_facts(boot_id: &str) -> Facts {
    Facts {
        seq: 1,
        boot_id: boot_id.to_owned(),
        epoch: FIRST_EPOCH,
        first: FIRST_EPOCH,
        ..Facts::default()
    }
}

/// Opens a disk.
pub(super) fn open(dir: &Path, deps: DiskDeps) -> Result<Start, DiskError> {
    let path = dir.join(RECORD);
    let shown = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let unnamed = Files::new(shown, Arc::clone(&deps.io));
    let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => DiskError::Absent(dir.display().to_string()),
        _ => unnamed.error(Which::Record, "read", error),
    })?;
    let spec = record::decode(&bytes).map_err(|detail| unnamed.damaged(Which::Record, detail))?;
    let files = Files::new(spec.name.to_string(), Arc::clone(&deps.io));
    let lock_file = record::lock(&files, &path)?;
    let common = Common::new(dir, &spec, Arc::clone(&files), deps)?;
    let state = StateFile::open(&files, &dir.join(STATE))?;
    let durable = state.get();
    // Before anything is removed for what it says.
    common
        .shape
        .check_root(&durable.source.root)
        .map_err(|detail| files.damaged(Which::State, detail))?;
    common
        .remove_other_generations(durable.generation)
        .map_err(|error| files.error(Which::Directory, "clean up", error))?;
    let generation = open_generation(&common, &durable)?;
    // Before the first change: whatever happens from now on, the map alone proves nothing.
    let next = generation.epochs.facts().next_number;
    state.update(|facts| {
        facts.clean = false;
        if facts.checkpoint.is_some() && facts.reserved_until <= next {
            facts.reserved_until = next + NUMBERS_RESERVED;
        }
    })?;
    Ok(Start { spec, common, state, generation, lock_file })
}

fn open_generation(common: &Common, durable: &Durable) -> Result<Generation, DiskError> {
    let dir = generation_dir(&common.dir, durable.generation);
    let identity = common.identity(durable.generation);
    let delta = Delta::open(&common.files, &dir.join(DELTA), common.shape)?;
    let boot_id = &common.deps.boot_id;
    let map = match Map::open(&common.files, &dir.join(MAP), common.shape, &identity) {
        Ok(map) => Some(map),
        Err(error @ DiskError::Damaged { .. }) => {
            tracing::warn!(disk = common.files.disk(), %error, "using the journal instead");
            None
        }
        // IMPORTANT: an error that may pass (too many open files, say) must not count as damage. The
        // journal lacks what was acknowledged and not flushed, and the map is replaced for good.
        Err(error) => return Err(error),
    };
    let believed = map.and_then(|map| {
        let facts = map.facts()?;
        let known = facts.stable_root.as_ref();
        let fits = known.is_none_or(|root| common.shape.check_root(root).is_ok());
        (fits && (durable.clean || facts.boot_id == *boot_id)).then_some((map, facts))
    });
    let source = durable.source.clone();
    let Some((map, mut facts)) = believed else {
        let (parts, facts, contents) = rebuild(common, durable, &dir, delta)?;
        return Generation::new(common.clone(), durable.generation, source, parts, facts, contents);
    };
    if durable.checkpoint.is_some() && facts.next_number == 0 {
        // The daemon died while it made the checkpoint image.
        facts.next_number = durable.reserved_until;
    }
    facts.boot_id.clone_from(boot_id);
    facts.seq += 1;
    map.write_facts(&facts);
    let contents = contents(&map, &facts)?;
    let words = map.presence_words();
    let journal =
        Journal::open(&common.files, &dir.join(JOURNAL), words, &identity, |_, _| Ok(()))?;
    let parts = Parts { delta, map, journal };
    let generation =
        Generation::new(common.clone(), durable.generation, source, parts, facts, contents)?;
    if !durable.clean {
        generation.flusher.set_incomplete();
    }
    Ok(generation)
}

/// Sorts the chunks of a map by what they belong to.
fn contents(map: &Map, facts: &Facts) -> Result<Contents, DiskError> {
    let mut contents = Contents::default();
    contents.lists.resize_with(facts.pending.len(), List::default);
    map.scan(|chunk, mark| {
        // Which snapshot had read it died with the daemon.
        map.set_mark(chunk, Mark { captured: false, ..mark });
        let pending = facts.pending.iter().position(|pending| pending.covers(mark.epoch));
        match pending {
            Some(index) => contents.lists[index].push(chunk),
            None if mark.epoch >= facts.first => contents.dirty.push(chunk),
            None => {}
        }
        let runs = map.present_runs(chunk);
        contents.sectors += runs.iter().map(|run| (run.end - run.first) as u64).sum::<u64>();
    })?;
    Ok(contents)
}

/// After a host crash: makes the map anew from the journal.
fn rebuild(
    common: &Common,
    durable: &Durable,
    dir: &Path,
    delta: Delta,
) -> Result<(Parts, Facts, Contents), DiskError> {
    let identity = common.identity(durable.generation);
    let new = dir.join("map.new");
    let map = Map::create(&common.files, &new, common.shape, &identity)?;
    let words = map.presence_words();
    let visit = |chunk, presence: &[u64]| {
        if chunk >= common.shape.chunks() {
            let detail = format!("it names chunk {chunk}, which the disk does not have");
            return Err(common.files.damaged(Which::Journal, detail));
        }
        map.reserve(chunk)?;
        map.set_mark(chunk, Mark { epoch: FIRST_EPOCH, captured: false });
        map.restore_presence(chunk, presence);
        Ok(())
    };
    let journal = Journal::open(&common.files, &dir.join(JOURNAL), words, &identity, visit)?;
    let facts = Facts {
        next_number: durable.reserved_until,
        last_stable: durable.last_stable,
        ..fresh_facts(&common.deps.boot_id)
    };
    map.write_facts(&facts);
    let contents = contents(&map, &facts)?;
    // The map counts from here on: it is whole, and names this boot.
    common.files.rename(Which::Map, &new, &dir.join(MAP))?;
    Ok((Parts { delta, map, journal }, facts, contents))
}

/// Deletes a disk. Its record goes first: without it there is no disk, whatever is left over.
pub(super) fn remove(common: &Common) -> Result<(), DiskError> {
    let failed = |error| common.files.error(Which::Directory, "remove", error);
    std::fs::remove_file(common.dir.join(RECORD)).map_err(failed)?;
    common.files.sync_directory(&common.dir)?;
    std::fs::remove_dir_all(&common.dir).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::disk::tests::support::{CHUNK, World, deps, pattern, spec_of};
    use crate::disk::{Disk, FileIo, HostFiles};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_state_with_a_tree_that_cannot_be_below_the_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("disk");
        let world = World::new();
        let size = 5 * CHUNK as u64;
        let spec = spec_of("disk", world.image("base", &pattern(1, size as usize)), size);
        let deps = deps(&world, (16, 16), "boot");
        Disk::create(&dir, spec, deps.clone()).unwrap().shutdown().await.unwrap();
        let files = Files::new("disk".into(), Arc::new(HostFiles));
        let state = StateFile::open(&files, &dir.join(STATE)).unwrap();
        // Its chunks are larger than those that a disk of this shape would read.
        state.update(|facts| facts.source.root.chunk_size *= 2).unwrap();
        let refused = Disk::open(&dir, deps.clone()).err().unwrap();
        assert!(matches!(refused, DiskError::Damaged { .. }), "{refused}");
        state.update(|facts| facts.source.root.chunk_size /= 2).unwrap();
        Disk::open(&dir, deps).unwrap();
    }

    /// A process that may not have as many files open as it needs, for a moment.
    #[derive(Default)]
    struct NoMoreFiles(AtomicBool);

    impl FileIo for NoMoreFiles {
        fn allocate(&self, which: Which, file: &File, offset: u64, len: u64) -> io::Result<()> {
            if which == Which::Map && !self.0.swap(true, Ordering::Relaxed) {
                return Err(io::Error::other("too many open files"));
            }
            HostFiles.allocate(which, file, offset, len)
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_error_that_passes_does_not_make_the_map_anew_from_the_journal() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("disk");
        let world = World::new();
        let size = 5 * CHUNK as u64;
        let spec = spec_of("disk", world.image("base", &pattern(1, size as usize)), size);
        let deps = deps(&world, (16, 16), "boot");
        let disk = Disk::create(&dir, spec, deps.clone()).unwrap();
        disk.put(5000, b"acknowledged and not flushed").await;
        disk.crash().await;
        let failing = DiskDeps { io: Arc::new(NoMoreFiles::default()), ..deps.clone() };
        let refused = Disk::open(&dir, failing);
        let disk = match refused {
            Ok(disk) => disk,
            Err(_) => Disk::open(&dir, deps).unwrap(),
        };
        assert_eq!(disk.read(5000, 28).await.unwrap(), &b"acknowledged and not flushed"[..]);
    }
}
