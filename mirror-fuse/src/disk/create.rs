//! Making disks, one or many at once.
//!
//! The record of a disk gets its name last, when all else is durable: a directory without a record
//! holds no disk, whatever is left in it. Of several disks, first all files are written, then all are
//! synced, then all records get their names. A sync makes durable what the file system's journal
//! holds of the other files, too, so that theirs cost little after it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::files::Files;
use super::generation::{Common, Contents, Generation, Parts, private_directory};
use super::io::Which;
use super::record;
use super::recovery::{FIRST_GENERATION, RECORD, STATE, fresh_facts, remove};
use super::shape::Shape;
use super::shared::Start;
use super::state_file::{Durable, StateFile};
use super::{DiskDeps, DiskError, DiskSpec};

/// Disks that are worked on at a time: mostly they wait for the host's file system.
const AT_ONCE: usize = 8;

/// A record that has no name yet.
const UNNAMED_RECORD: &str = "record.tmp";

/// A disk to be made.
#[derive(Debug)]
pub struct Plan {
    /// Its directory, which is made too.
    pub dir: PathBuf,
    /// What it is.
    pub spec: DiskSpec,
    /// What it works with.
    pub deps: DiskDeps,
}

/// A disk whose files are written, but perhaps not durable.
struct Draft {
    spec: DiskSpec,
    common: Common,
    state: StateFile,
    parts: Parts,
    record: File,
}

/// Makes all of them, or none.
pub(super) fn create(plans: &[Plan]) -> Result<Vec<Start>, DiskError> {
    let mut drafts = Vec::with_capacity(plans.len());
    let mut made = Ok(());
    for written in in_parallel(plans, Draft::write) {
        match written {
            Ok(draft) => drafts.push(draft),
            Err(error) => made = Err(error),
        }
    }
    let all = |each: fn(&Draft) -> Result<(), DiskError>| {
        in_parallel(&drafts, each).into_iter().collect::<Result<(), _>>()
    };
    let made = made
        .and_then(|()| all(Draft::sync))
        .and_then(|()| all(Draft::name))
        .and_then(|()| sync_parents(&drafts));
    if let Err(error) = made {
        drafts.iter().for_each(Draft::discard);
        return Err(error);
    }
    drafts.into_iter().map(Draft::finish).collect()
}

/// Calls `each` for all of them, from several threads; the results are in their order.
fn in_parallel<T: Sync, R: Send>(items: &[T], each: fn(&T) -> R) -> Vec<R> {
    if items.len() < 2 {
        return items.iter().map(each).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return done };
            done.push((at, each(item)));
        }
    };
    let mut all = Vec::with_capacity(items.len());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(items.len())).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    all.sort_unstable_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, result)| result).collect()
}

/// The names of the disks' directories; usually all are in the same one.
fn sync_parents(drafts: &[Draft]) -> Result<(), DiskError> {
    let mut synced: Option<&Path> = None;
    for Draft { common, .. } in drafts {
        let parent = common.dir.parent();
        if let Some(parent) = parent
            && synced != Some(parent)
        {
            common.files.sync_directory(parent)?;
        }
        synced = parent;
    }
    Ok(())
}

impl Draft {
    fn write(plan: &Plan) -> Result<Self, DiskError> {
        let Plan { dir, spec, deps } = plan;
        Shape::of(spec)?;
        let files = Files::new(spec.name.to_string(), Arc::clone(&deps.io));
        if dir.join(RECORD).exists() {
            return Err(DiskError::Exists(dir.display().to_string()));
        }
        let failed = |error| files.error(Which::Directory, "create", error);
        if dir.exists() {
            // Left by a making that was interrupted.
            std::fs::remove_dir_all(dir).map_err(failed)?;
        }
        if let Some(parent) = dir.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        private_directory(dir).map_err(failed)?;
        let facts = fresh_facts(&deps.boot_id);
        let common = Common::new(dir, spec, Arc::clone(&files), deps.clone())?;
        let parts = common.write_files(FIRST_GENERATION, &facts)?;
        let durable = Durable {
            generation: FIRST_GENERATION,
            source: spec.source.clone(),
            checkpoint: None,
            reserved_until: 0,
            last_stable: 0,
            clean: false,
        };
        let state = StateFile::create(&files, &dir.join(STATE), durable)?;
        let record = files.create(Which::Record, &dir.join(UNNAMED_RECORD))?;
        files.write_all_at(Which::Record, &record, &record::encode(spec), 0)?;
        Ok(Self { spec: spec.clone(), common, state, parts, record })
    }

    fn sync(&self) -> Result<(), DiskError> {
        let files = &self.common.files;
        files.sync_data(Which::Record, &self.record)?;
        self.state.sync()?;
        // With the directory, where the names of the other files are.
        self.common.sync_files(FIRST_GENERATION, &self.parts)
    }

    /// From here on there is a disk.
    fn name(&self) -> Result<(), DiskError> {
        let Common { dir, files, .. } = &self.common;
        files.rename(Which::Record, &dir.join(UNNAMED_RECORD), &dir.join(RECORD))
    }

    /// As well as that is possible: a directory without a record is removed at the next start.
    fn discard(&self) {
        if remove(&self.common).is_err() {
            let _ = std::fs::remove_dir_all(&self.common.dir);
        }
    }

    fn finish(self) -> Result<Start, DiskError> {
        let Self { spec, common, state, parts, .. } = self;
        let lock_file = record::lock(&common.files, &common.dir.join(RECORD))?;
        let facts = fresh_facts(&common.deps.boot_id);
        let (source, contents) = (spec.source.clone(), Contents::default());
        let generation =
            Generation::new(common.clone(), FIRST_GENERATION, source, parts, facts, contents)?;
        Ok(Start { spec, common, state, generation, lock_file })
    }
}
