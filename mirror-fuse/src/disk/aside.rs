//! Old versions of chunks: selective copy-on-write (algorithm 4 of the paper).
//!
//! When a write hits a chunk that a pending snapshot still needs, the chunk's sectors are copied
//! aside first, and the persister reads the copy instead. The delta stays in place and whole.

use std::sync::Arc;

use bytes::Bytes;

use super::DiskError;
use super::budget::{Budgets, Share};
use super::delta::Delta;
use super::facts::Pending;
use super::map::Map;
use super::shape::{SECTOR, Sectors, Shape};
use super::spill::{Slot, Spill};

/// The content of a chunk as it was from one epoch until another.
#[derive(Debug)]
pub(super) struct Aside {
    /// The epoch of the change that made this content.
    from: u64,
    /// The epoch of the change that ended it.
    until: u64,
    content: Content,
}

/// The sectors of a chunk that were in the delta, packed.
#[derive(Debug)]
pub(super) struct Content {
    present: Vec<Sectors>,
    packed: Packed,
}

#[derive(Debug)]
enum Packed {
    Memory {
        bytes: Bytes,
        _share: Share,
    },
    Spilled(Slot),
    /// For a reader that keeps it for a moment only.
    Borrowed(Bytes),
}

/// Where a copy may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// Into memory only: the caller must not wait for a disk.
    Memory,
    /// Into the spill file when the memory is full.
    MemoryOrSpill,
    /// Into the spill file only, whatever is free: as alternatives to selective copy-on-write do.
    Spill,
}

/// The runs of sectors of a chunk that are in the delta.
pub(super) fn present_runs(map: &Map, shape: Shape, chunk: u64) -> Vec<Sectors> {
    let end = shape.chunk_sectors(chunk);
    let mut runs = Vec::new();
    let mut first = 0;
    while first < end {
        let (present, next) = map.run(chunk, Sectors { first, end });
        if present {
            runs.push(Sectors { first, end: next });
        }
        first = next;
    }
    runs
}

/// The runs' bytes, together `len`.
fn packed(delta: &Delta, start: u64, present: &[Sectors], len: usize) -> Result<Bytes, DiskError> {
    if let [run] = present {
        return Ok(delta.read_new(start + run.start_byte() as u64, len)?.into());
    }
    let mut bytes = vec![0; len];
    pack(delta, start, present, &mut bytes)?;
    Ok(bytes.into())
}

fn pack(delta: &Delta, start: u64, present: &[Sectors], out: &mut [u8]) -> Result<(), DiskError> {
    let mut at = 0;
    for run in present {
        let to = &mut out[at..at + run.bytes()];
        delta.read(start + run.start_byte() as u64, to)?;
        at += run.bytes();
    }
    Ok(())
}

/// Where copies come from and go to.
pub(super) struct Copier<'a> {
    pub(super) map: &'a Map,
    pub(super) delta: &'a Delta,
    pub(super) shape: Shape,
    pub(super) budgets: &'a Arc<Budgets>,
    pub(super) spill: &'a Arc<Spill>,
}

impl Copier<'_> {
    /// Copies a chunk's sectors aside; its lock must be held. `None`: no room.
    pub(super) fn copy(&self, chunk: u64, room: Room) -> Result<Option<Content>, DiskError> {
        let present = present_runs(self.map, self.shape, chunk);
        let len: usize = present.iter().map(|run| run.bytes()).sum();
        let start = self.shape.chunk_start(chunk);
        if room != Room::Spill
            && let Some(share) = self.budgets.take_memory(len as u64)
        {
            let mut buffer = self.budgets.buffers().take(len);
            pack(self.delta, start, &present, buffer.as_mut())?;
            let packed = Packed::Memory { bytes: Bytes::from_owner(buffer), _share: share };
            return Ok(Some(Content { present, packed }));
        }
        if room == Room::Memory {
            return Ok(None);
        }
        let mut buffer = self.spill.buffer(len)?;
        pack(self.delta, start, &present, &mut buffer)?;
        let slot = self.spill.store(&buffer)?;
        Ok(slot.map(|slot| Content { present, packed: Packed::Spilled(slot) }))
    }

    /// Reads those sectors of a chunk for a reader that is bounded by itself.
    pub(super) fn read(&self, chunk: u64, present: Vec<Sectors>) -> Result<Content, DiskError> {
        let len = present.iter().map(|run| run.bytes()).sum();
        let bytes = packed(self.delta, self.shape.chunk_start(chunk), &present, len)?;
        Ok(Content { present, packed: Packed::Borrowed(bytes) })
    }
}

impl Content {
    /// The bytes as they are, where they are a whole chunk of `size` bytes in memory.
    pub(super) fn whole(&self, size: usize) -> Option<Bytes> {
        match &self.packed {
            Packed::Memory { bytes, .. } | Packed::Borrowed(bytes) if bytes.len() == size => {
                Some(bytes.clone())
            }
            _ => None,
        }
    }

    /// Puts the sectors in their places in `chunk`; others are left alone.
    pub(super) fn unpack(&self, chunk: &mut [u8]) -> Result<(), DiskError> {
        let loaded;
        let packed: &[u8] = match &self.packed {
            Packed::Memory { bytes, .. } | Packed::Borrowed(bytes) => bytes,
            Packed::Spilled(slot) => {
                loaded = slot.load()?;
                &loaded
            }
        };
        let mut at = 0;
        for run in &self.present {
            let from = &packed[at..at + run.bytes()];
            chunk[run.start_byte()..run.start_byte() + run.bytes()].copy_from_slice(from);
            at += run.bytes();
        }
        Ok(())
    }

    /// Runs of sectors that are not here, up to sector `end`.
    pub(super) fn absent(&self, end: usize) -> Vec<Sectors> {
        let mut absent = Vec::new();
        let mut first = 0;
        for run in &self.present {
            absent.push(Sectors { first, end: run.first });
            first = run.end;
        }
        absent.push(Sectors { first, end });
        absent.retain(|run| !run.is_empty());
        absent
    }

    /// Bytes of memory in use.
    fn memory_bytes(&self) -> u64 {
        match &self.packed {
            Packed::Memory { bytes, .. } | Packed::Borrowed(bytes) => bytes.len() as u64,
            Packed::Spilled(_) => 0,
        }
    }

    /// Whole sectors of zeros at the places `present`, for tests.
    #[cfg(test)]
    fn of_zeros(present: Vec<Sectors>) -> Self {
        let bytes = vec![0; present.iter().map(|run| run.bytes()).sum()];
        Self { present, packed: Packed::Borrowed(bytes.into()) }
    }
}

impl Aside {
    pub(super) const fn new(from: u64, until: u64, content: Content) -> Self {
        Self { from, until, content }
    }

    pub(super) const fn content(&self) -> &Content {
        &self.content
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.content.memory_bytes()
    }

    /// Whether this is the chunk's content as of that snapshot.
    pub(super) const fn is_of(&self, snapshot: &Pending) -> bool {
        self.from <= snapshot.last && snapshot.last < self.until
    }

    /// Whether a snapshot may still ask for it: one that has the chunk, now or when an older one
    /// fails and leaves its changes to it.
    pub(super) fn is_needed(&self, pending: &[Pending]) -> bool {
        let oldest = pending.first().map_or(u64::MAX, |oldest| oldest.first);
        self.from >= oldest && pending.iter().any(|snapshot| self.is_of(snapshot))
    }
}

/// A sector of zeros.
pub(super) const ZEROS: [u8; SECTOR] = [0; SECTOR];

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(first: u64, last: u64) -> Pending {
        Pending { number: last, first, last }
    }

    fn aside(from: u64, until: u64) -> Aside {
        Aside::new(from, until, Content::of_zeros(vec![Sectors { first: 2, end: 4 }]))
    }

    #[test]
    fn a_copy_is_kept_as_long_as_a_snapshot_may_ask_for_it() {
        let (old, new) = (pending(3, 4), pending(5, 5));
        let both = [old.clone(), new.clone()];
        assert!(aside(3, 5).is_of(&old) && !aside(3, 5).is_of(&new));
        assert!(aside(3, 6).is_of(&old) && aside(3, 6).is_of(&new));
        assert!(aside(5, 6).is_needed(&both) && aside(5, 6).is_needed(&both[1..]));
        assert!(aside(3, 6).is_needed(&both));
        assert!(!aside(3, 6).is_needed(&both[1..]), "the old one is stable: the new one lacks it");
        assert!(aside(3, 6).is_needed(&[pending(3, 5)]), "the old one failed");
        assert!(!aside(3, 5).is_needed(&[pending(3, 5)]), "changed again before the second cut");
        assert!(!aside(3, 5).is_needed(&[]));
    }

    #[test]
    fn what_is_not_packed_is_absent() {
        let content = aside(1, 2).content;
        let s = |first, end| Sectors { first, end };
        assert_eq!(content.absent(16), [s(0, 2), s(4, 16)]);
        assert_eq!(content.absent(4), [s(0, 2)]);
        let mut chunk = vec![1; 16 * SECTOR];
        content.unpack(&mut chunk).unwrap();
        for (sector, bytes) in chunk.chunks(SECTOR).enumerate() {
            let expected = u8::from(!(2..4).contains(&sector));
            assert!(bytes.iter().all(|byte| *byte == expected));
        }
    }
}
