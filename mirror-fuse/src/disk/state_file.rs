//! The `state` file: the few durable facts of a disk that change.
//!
//! Two slots of one page each are written by turns and synced each time, so one of them is always
//! whole and holds the latest facts that any caller was told of. What changes with every COMMIT is
//! not here but in the head of the map (see [`super::facts`]): a COMMIT syncs nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blobcr_proto::Hash;
use blobcr_proto::name::NAME_BYTES_MAX;

use super::files::Files;
use super::frame::{self, COUNTER_MAX, Kind};
use super::io::Which;
use super::record::StoredSource;
use super::upstreams::Source;
use super::{CheckpointImage, DiskError};

/// Versions: 1, the first.
const KIND: Kind = Kind { magic: *b"BCDS", version: 1 };
/// A page: what a disk writes whole.
const SLOT_BYTES: usize = 4096;
const SLOTS: u64 = 2;

#[derive(Clone, PartialEq, prost::Message)]
struct StoredImage {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    id: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(uint64, tag = "1")]
    seq: u64,
    #[prost(uint64, tag = "2")]
    generation: u64,
    #[prost(message, optional, tag = "3")]
    source: Option<StoredSource>,
    #[prost(message, optional, tag = "4")]
    checkpoint: Option<StoredImage>,
    #[prost(uint64, tag = "5")]
    reserved_until: u64,
    #[prost(uint64, tag = "6")]
    last_stable: u64,
    #[prost(bool, tag = "7")]
    clean: bool,
}

/// The durable facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Durable {
    /// Which `gen-N` directory holds the guest's bytes; a rollback makes the next.
    pub(super) generation: u64,
    /// The snapshot below them.
    pub(super) source: Source,
    /// Where COMMITs go.
    pub(super) checkpoint: Option<CheckpointImage>,
    /// Snapshot numbers below this may have been handed out.
    pub(super) reserved_until: u64,
    /// The newest stable snapshot known; 0 before the first.
    pub(super) last_stable: u64,
    /// Whether the disk was stopped in order: the map can then be trusted whatever came after.
    pub(super) clean: bool,
}

/// The open state file.
#[derive(Debug)]
pub(super) struct StateFile {
    files: Arc<Files>,
    file: File,
    /// The facts, and the sequence number that they were written with.
    current: Mutex<(u64, Durable)>,
}

impl StateFile {
    /// Makes the file with its first facts, durable after [`Self::sync`] but for its name.
    pub(super) fn create(
        files: &Arc<Files>,
        path: &Path,
        facts: Durable,
    ) -> Result<Self, DiskError> {
        let file = files.create(Which::State, path)?;
        files.allocate(Which::State, &file, 0, SLOTS * SLOT_BYTES as u64)?;
        files.set_len(Which::State, &file, SLOTS * SLOT_BYTES as u64)?;
        let (files, seq) = (Arc::clone(files), 1);
        let state = Self { files, file, current: Mutex::new((seq, facts.clone())) };
        state.write(seq, &facts)?;
        Ok(state)
    }

    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.files.sync_data(Which::State, &self.file)
    }

    pub(super) fn open(files: &Arc<Files>, path: &Path) -> Result<Self, DiskError> {
        let file = files.open(Which::State, path)?;
        let mut found: Option<(u64, Durable)> = None;
        let mut wrong = String::new();
        for slot in 0..SLOTS {
            let mut bytes = vec![0; SLOT_BYTES];
            let read = file.read_exact_at(&mut bytes, slot * SLOT_BYTES as u64);
            read.map_err(|error| files.error(Which::State, "read", error))?;
            match decode(&bytes) {
                Ok(facts) if found.as_ref().is_none_or(|(seq, _)| facts.0 > *seq) => {
                    found = Some(facts);
                }
                Ok(_) => {}
                Err(detail) => wrong = detail,
            }
        }
        let current = found.ok_or_else(|| files.damaged(Which::State, wrong))?;
        Ok(Self { files: Arc::clone(files), file, current: Mutex::new(current) })
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Durable)> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self) -> Durable {
        self.lock().1.clone()
    }

    /// Changes the facts, durably: on an error the old ones still hold.
    pub(super) fn update(&self, change: impl FnOnce(&mut Durable)) -> Result<(), DiskError> {
        let mut current = self.lock();
        let seq = current.0 + 1;
        let mut facts = current.1.clone();
        change(&mut facts);
        self.write(seq, &facts)?;
        self.sync()?;
        *current = (seq, facts);
        Ok(())
    }

    fn write(&self, seq: u64, facts: &Durable) -> Result<(), DiskError> {
        let mut bytes = encode(seq, facts);
        assert!(bytes.len() <= SLOT_BYTES, "names and roots are bounded: the facts fit a page");
        bytes.resize(SLOT_BYTES, 0);
        let offset = seq % SLOTS * SLOT_BYTES as u64;
        self.files.write_all_at(Which::State, &self.file, &bytes, offset)
    }
}

pub(super) fn encode(seq: u64, facts: &Durable) -> Vec<u8> {
    let stored = Stored {
        seq,
        generation: facts.generation,
        source: Some(StoredSource::from(&facts.source)),
        checkpoint: facts
            .checkpoint
            .as_ref()
            .map(|image| StoredImage { name: image.name.clone(), id: image.id }),
        reserved_until: facts.reserved_until,
        last_stable: facts.last_stable,
        clean: facts.clean,
    };
    frame::encode(KIND, &stored)
}

pub(super) fn decode(bytes: &[u8]) -> Result<(u64, Durable), String> {
    let stored: Stored = frame::decode(KIND, bytes)?;
    let source = stored.source.and_then(StoredSource::into_source).ok_or("it names no source")?;
    let checkpoint =
        stored.checkpoint.map(|image| CheckpointImage { name: image.name, id: image.id });
    let facts = Durable {
        generation: stored.generation,
        source,
        checkpoint,
        reserved_until: stored.reserved_until,
        last_stable: stored.last_stable,
        clean: stored.clean,
    };
    // They are written again, into a page, and counted on.
    let counters = [stored.seq, facts.generation, facts.reserved_until];
    let names = [Some(&facts.source.image), facts.checkpoint.as_ref().map(|image| &image.name)];
    let bounded = counters.iter().all(|counter| *counter <= COUNTER_MAX)
        && names.iter().flatten().all(|name| name.len() <= NAME_BYTES_MAX)
        && facts.source.root.node.len() <= Hash::LEN;
    if !bounded {
        return Err("it holds more than any disk comes to".into());
    }
    Ok((stored.seq, facts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::HostFiles;
    use blobcr_proto::v1::TreeRoot;

    fn sample() -> Durable {
        let root = TreeRoot {
            size_bytes: 1 << 30,
            chunk_size: 64 << 10,
            fan_out: 2,
            node: vec![9; 32].into(),
        };
        Durable {
            generation: 4,
            source: Source { image: "base".into(), image_id: 1, number: 1, pool: 1, root },
            checkpoint: Some(CheckpointImage { name: "d-01".into(), id: 2 }),
            reserved_until: 66,
            last_stable: 3,
            clean: true,
        }
    }

    fn opened(dir: &Path) -> Result<StateFile, DiskError> {
        let files = Files::new("d".into(), Arc::new(HostFiles));
        StateFile::open(&files, &dir.join("state"))
    }

    #[test]
    fn golden_state_of_version_1() {
        let bytes = encode(5, &sample());
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/state-v1.hex").trim());
        assert_eq!(decode(&bytes), Ok((5, sample())));
    }

    #[test]
    fn facts_that_cannot_be_written_again_are_refused() {
        let image = |len| Some(CheckpointImage { name: "n".repeat(len), id: 1 });
        let with_node = |len| {
            let mut facts = sample();
            facts.source.root.node = vec![7; len].into();
            facts
        };
        let longest = Durable { checkpoint: image(NAME_BYTES_MAX), ..sample() };
        assert_eq!(decode(&encode(COUNTER_MAX, &longest)), Ok((COUNTER_MAX, longest)));
        for (seq, bad) in [
            (u64::MAX, sample()),
            (1, Durable { reserved_until: u64::MAX, ..sample() }),
            (1, Durable { generation: u64::MAX, ..sample() }),
            (1, Durable { checkpoint: image(3900), ..sample() }),
            (1, with_node(3900)),
        ] {
            assert!(decode(&encode(seq, &bad)).is_err(), "{seq} {bad:?}");
        }
    }

    #[test]
    fn a_torn_write_leaves_the_facts_before() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new("d".into(), Arc::new(HostFiles));
        let state = StateFile::create(&files, &dir.path().join("state"), sample()).unwrap();
        for number in 4..9 {
            state.update(|facts| facts.last_stable = number).unwrap();
            let path = dir.path().join("state");
            let whole = std::fs::read(&path).unwrap();
            assert_eq!(opened(dir.path()).unwrap().get().last_stable, number);
            // The slot just written is damaged: the one before counts.
            let seq = state.lock().0;
            let mut torn = whole.clone();
            torn[(seq % SLOTS) as usize * SLOT_BYTES + 20] ^= 1;
            std::fs::write(&path, &torn).unwrap();
            assert_eq!(opened(dir.path()).unwrap().get().last_stable, number - 1);
            // Both damaged: refused, not guessed.
            torn[((seq + 1) % SLOTS) as usize * SLOT_BYTES + 20] ^= 1;
            std::fs::write(&path, &torn).unwrap();
            assert!(matches!(opened(dir.path()), Err(DiskError::Damaged { .. })));
            std::fs::write(&path, &whole).unwrap();
        }
    }
}
