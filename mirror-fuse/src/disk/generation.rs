//! One generation of a disk: the guest's bytes since the attach or the last rollback. A rollback
//! starts the next one, and this one is deleted.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;

use super::aside::Copier;
use super::base_view::BaseView;
use super::budget::Budgets;
use super::delta::Delta;
use super::epochs::{Epochs, List};
use super::facts::Facts;
use super::files::Files;
use super::flush::Flusher;
use super::io::Which;
use super::journal::Journal;
use super::map::{Identity, Map};
use super::shape::Shape;
use super::spill::Spill;
use super::stripes::Stripes;
use super::upstreams::Source;
use super::{DiskDeps, DiskError, DiskSpec};

/// What all generations of a disk share.
#[derive(Debug, Clone)]
pub(super) struct Common {
    pub(super) dir: PathBuf,
    pub(super) uid: u128,
    pub(super) shape: Shape,
    pub(super) files: Arc<Files>,
    pub(super) deps: DiskDeps,
    pub(super) spill: Arc<Spill>,
    /// Set once the disk is stopped: nothing changes after that.
    pub(super) stopped: Arc<AtomicBool>,
    /// Held by blocking calls that change files and that nobody may wait for any more.
    busy: Arc<Mutex<()>>,
}

/// An open generation.
#[derive(Debug)]
pub(super) struct Generation {
    pub(super) number: u64,
    pub(super) common: Common,
    pub(super) shape: Shape,
    /// The snapshot below.
    pub(super) source: Source,
    pub(super) base: BaseView,
    pub(super) delta: Delta,
    pub(super) map: Map,
    pub(super) stripes: Stripes,
    pub(super) epochs: Epochs,
    pub(super) flusher: Flusher,
    /// Sectors in the delta.
    pub(super) local_sectors: AtomicU64,
}

/// The files of a generation, before anything is known of their content.
pub(super) struct Parts {
    pub(super) delta: Delta,
    pub(super) map: Map,
    pub(super) journal: Journal,
}

/// What the chunks of a map belong to.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) dirty: List,
    /// For each pending snapshot.
    pub(super) lists: Vec<List>,
    pub(super) sectors: u64,
}

pub(super) fn generation_dir(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("gen-{number}"))
}

/// Makes a directory that nobody else may look into: a guest's bytes are its own.
pub(super) fn private_directory(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

pub(super) const DELTA: &str = "delta";
pub(super) const MAP: &str = "map";
pub(super) const JOURNAL: &str = "journal";

impl Common {
    /// Only for who has the disk's lock.
    pub(super) fn new(
        dir: &Path,
        spec: &DiskSpec,
        files: Arc<Files>,
        deps: DiskDeps,
    ) -> Result<Self, DiskError> {
        let shape = Shape::of(spec)?;
        let spill = dir.join("spill");
        let spill = Spill::new(&files, spill, shape.chunk_size.bytes(), &deps.budgets)?;
        Ok(Self {
            dir: dir.to_owned(),
            uid: spec.uid,
            shape,
            files,
            deps,
            spill,
            stopped: Arc::default(),
            busy: Arc::default(),
        })
    }

    pub(super) fn identity(&self, generation: u64) -> Identity {
        Identity {
            uid: self.uid.to_be_bytes().to_vec(),
            generation,
            size_bytes: self.shape.size_bytes,
            chunk_size: self.shape.chunk_size.bytes(),
        }
    }

    pub(super) fn open_base(&self, source: &Source) -> Result<BaseView, DiskError> {
        let base = self
            .deps
            .bases
            .open(source)
            .map_err(|source| DiskError::Base { disk: self.files.disk().to_owned(), source })?;
        Ok(BaseView::new(base, self.shape))
    }

    /// Makes the empty files of a generation, durably.
    pub(super) fn create_files(&self, number: u64, facts: &Facts) -> Result<Parts, DiskError> {
        let parts = self.write_files(number, facts)?;
        self.sync_files(number, &parts)?;
        Ok(parts)
    }

    /// Makes the empty files of a generation; see [`Self::sync_files`].
    pub(super) fn write_files(&self, number: u64, facts: &Facts) -> Result<Parts, DiskError> {
        let dir = generation_dir(&self.dir, number);
        let failed = |action| move |error| self.files.error(Which::Directory, action, error);
        if dir.exists() {
            // Left by a rollback that was interrupted before it counted.
            std::fs::remove_dir_all(&dir).map_err(failed("remove"))?;
        }
        private_directory(&dir).map_err(failed("create"))?;
        let identity = self.identity(number);
        let delta = Delta::create(&self.files, &dir.join(DELTA), self.shape)?;
        let map = Map::create(&self.files, &dir.join(MAP), self.shape, &identity)?;
        map.write_facts(facts);
        let words = map.presence_words();
        let journal = Journal::create(&self.files, &dir.join(JOURNAL), words, &identity)?;
        Ok(Parts { delta, map, journal })
    }

    /// Makes the files of a generation durable. Not what the map holds: after a host crash it is made
    /// anew from the journal, whatever it holds.
    pub(super) fn sync_files(&self, number: u64, parts: &Parts) -> Result<(), DiskError> {
        parts.journal.sync()?;
        parts.delta.sync()?;
        self.files.sync_directory(&generation_dir(&self.dir, number))?;
        self.files.sync_directory(&self.dir)
    }

    /// Deletes the directories of all generations but one: left by a rollback.
    pub(super) fn remove_other_generations(&self, keep: u64) -> std::io::Result<()> {
        let keep = generation_dir(&self.dir, keep);
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with("gen-") && path != keep {
                std::fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }

    /// For a blocking call that changes files while its caller may be gone. It must look whether
    /// the disk is stopped after that.
    pub(super) fn busy(&self) -> MutexGuard<'_, ()> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what blocks on the disk where it holds up nobody.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        self.blocking_on(&self.deps.runtime, call).await
    }

    /// The same for what no guest waits for.
    pub(super) async fn in_background<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        self.blocking_on(&self.deps.background, call).await
    }

    async fn blocking_on<T: Send + 'static>(
        &self,
        runtime: &Handle,
        call: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        match runtime.spawn_blocking(call).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => Err(DiskError::Stopped(self.files.disk().to_owned())),
            },
        }
    }

    pub(super) const fn budgets(&self) -> &Arc<Budgets> {
        &self.deps.budgets
    }
}

impl Generation {
    pub(super) fn new(
        common: Common,
        number: u64,
        source: Source,
        parts: Parts,
        facts: Facts,
        contents: Contents,
    ) -> Result<Self, DiskError> {
        let base = common.open_base(&source)?;
        Ok(Self {
            number,
            shape: common.shape,
            common,
            source,
            base,
            delta: parts.delta,
            map: parts.map,
            stripes: Stripes::default(),
            epochs: Epochs::new(facts, contents.dirty, contents.lists),
            flusher: Flusher::new(parts.journal),
            local_sectors: AtomicU64::new(contents.sectors),
        })
    }

    pub(super) fn files(&self) -> &Files {
        &self.common.files
    }

    pub(super) fn disk(&self) -> &str {
        self.common.files.disk()
    }

    /// Refuses changes to a disk that is stopped or poisoned. Asked under a chunk's lock: once
    /// every lock was taken after the disk was stopped, nothing changes any more.
    pub(super) fn check(&self) -> Result<(), DiskError> {
        self.files().check()?;
        if self.common.stopped.load(Ordering::Acquire) {
            return Err(DiskError::Stopped(self.disk().to_owned()));
        }
        Ok(())
    }

    pub(super) fn base_error(&self, source: super::BaseError) -> DiskError {
        DiskError::Base { disk: self.disk().to_owned(), source }
    }

    pub(super) fn copier(&self) -> Copier<'_> {
        Copier {
            map: &self.map,
            delta: &self.delta,
            shape: self.shape,
            budgets: self.common.budgets(),
            spill: &self.common.spill,
        }
    }

    /// The chunk as an index into the delta, plus `within`.
    pub(super) const fn at(&self, chunk: u64, within: u64) -> u64 {
        self.shape.chunk_start(chunk) + within
    }

    /// Gives up copies that no pending snapshot can ask for any more.
    pub(super) fn drop_asides(&self) {
        self.stripes.each(|stripe| {
            if stripe.asides.is_empty() {
                return;
            }
            // Under the stripe's lock: who adds a copy looks at what is pending under it too.
            let pending = self.epochs.pending();
            stripe.asides.retain(|_, versions| {
                versions.retain(|aside| aside.is_needed(&pending));
                !versions.is_empty()
            });
        });
    }
}
