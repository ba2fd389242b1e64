//! Old versions of chunks: selective copy-on-write (algorithm 4 of the paper).
//!
//! When a write hits a chunk that a pending snapshot still needs, the sectors that it is about to
//! change are copied aside first, and the persister takes the copies instead. The delta stays in place
//! and whole. The paper copies the whole chunk; a write that waits for its own sectors waits for less.

use std::sync::Arc;

use super::DiskError;
use super::budget::Budgets;
use super::content::Content;
use super::delta::Delta;
use super::facts::Pending;
use super::map::Map;
use super::parts::Parts;
use super::shape::{SECTOR, Sectors, Shape};
use super::spill::Spill;

/// The content of a chunk as it was from one epoch until another.
#[derive(Debug)]
pub(super) struct Aside {
    /// The epoch of the change that made this content.
    from: u64,
    /// The epoch of the change that ended it.
    until: u64,
    old: Old,
}

/// Old bytes of a chunk.
#[derive(Debug, Clone)]
pub(super) enum Old {
    /// All that the delta held.
    Whole(Arc<Content>),
    /// What has changed since; the rest is still in the delta.
    Parts(Parts),
}

/// Where a copy may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// Into memory only: the caller must not wait for a disk.
    Memory,
    /// Into the spill file when the memory is full: the whole chunk then.
    MemoryOrSpill,
    /// Into the spill file only, whatever is free: as alternatives to selective copy-on-write do.
    Spill,
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
    /// Copies what a change of the sectors `touched` would end of a chunk that has not changed yet; its
    /// lock must be held. `None`: no room.
    pub(super) fn copy(
        &self,
        chunk: u64,
        touched: Sectors,
        room: Room,
    ) -> Result<Option<Old>, DiskError> {
        let mut old = Old::Parts(Parts::of(self.map, chunk));
        Ok(self.save(&mut old, chunk, touched, room)?.then_some(old))
    }

    /// Copies all of a chunk that has not changed yet; its lock must be held. `None`: no room.
    pub(super) fn copy_whole(&self, chunk: u64) -> Result<Option<Old>, DiskError> {
        self.copy(chunk, Sectors { first: 0, end: self.shape.chunk_sectors(chunk) }, Room::Spill)
    }

    /// Copies what of the sectors `touched` is old and in the delta only; the chunk's lock must be held
    /// until they have changed. `false`: no room.
    fn save(
        &self,
        old: &mut Old,
        chunk: u64,
        touched: Sectors,
        room: Room,
    ) -> Result<bool, DiskError> {
        let Old::Parts(parts) = old else { return Ok(true) };
        if room != Room::Spill && self.save_in_memory(parts, chunk, touched)? {
            return Ok(true);
        }
        if room == Room::Memory {
            return Ok(false);
        }
        let Some(whole) = self.save_in_spill(parts, chunk)? else { return Ok(false) };
        *old = Old::Whole(Arc::new(whole));
        Ok(true)
    }

    fn save_in_memory(
        &self,
        parts: &mut Parts,
        chunk: u64,
        touched: Sectors,
    ) -> Result<bool, DiskError> {
        let start = self.shape.chunk_start(chunk);
        while let Some(run) = parts.missing(touched) {
            let Some(share) = self.budgets.take_memory(run.bytes() as u64) else {
                return Ok(false);
            };
            let (at, buffers) = (start + run.start_byte() as u64, self.budgets.buffers());
            let bytes = if let Some(mut kept) = buffers.kept(run.bytes()) {
                self.delta.read(at, kept.as_mut())?;
                kept
            } else {
                buffers.add(self.delta.read_new(at, run.bytes())?)
            };
            parts.add(run, bytes, share);
        }
        Ok(true)
    }

    /// All of a chunk's old bytes, of which `parts` are in memory already.
    fn save_in_spill(&self, parts: &Parts, chunk: u64) -> Result<Option<Content>, DiskError> {
        let mut buffer = self.spill.buffer(parts.bytes())?;
        self.pack(chunk, parts.present(), &mut buffer)?;
        parts.put_over(&mut buffer);
        let slot = self.spill.store(&buffer)?;
        Ok(slot.map(|slot| Content::spilled(parts.present().to_vec(), slot)))
    }

    fn pack(&self, chunk: u64, present: &[Sectors], out: &mut [u8]) -> Result<(), DiskError> {
        let start = self.shape.chunk_start(chunk);
        let mut at = 0;
        for run in present {
            self.delta.read(start + run.start_byte() as u64, &mut out[at..at + run.bytes()])?;
            at += run.bytes();
        }
        Ok(())
    }

    /// What the delta holds of those sectors of a chunk, packed.
    pub(super) fn read(&self, chunk: u64, present: &[Sectors]) -> Result<Vec<u8>, DiskError> {
        if let [run] = present {
            let start = self.shape.chunk_start(chunk) + run.start_byte() as u64;
            return self.delta.read_new(start, run.bytes());
        }
        let mut bytes = vec![0; present.iter().map(|run| run.bytes()).sum()];
        self.pack(chunk, present, &mut bytes)?;
        Ok(bytes)
    }
}

impl Aside {
    pub(super) const fn new(from: u64, until: u64, old: Old) -> Self {
        Self { from, until, old }
    }

    /// Copies what a change of the sectors `touched` would end of this content; the chunk's lock must be
    /// held until they have changed. `false`: no room.
    pub(super) fn save(
        &mut self,
        copier: &Copier<'_>,
        chunk: u64,
        touched: Sectors,
        room: Room,
    ) -> Result<bool, DiskError> {
        copier.save(&mut self.old, chunk, touched, room)
    }

    pub(super) const fn old(&self) -> &Old {
        &self.old
    }

    pub(super) fn into_old(self) -> Old {
        self.old
    }

    /// Bytes of memory in use.
    pub(super) fn memory_bytes(&self) -> u64 {
        match &self.old {
            Old::Whole(_) => 0,
            Old::Parts(parts) => parts.memory_bytes(),
        }
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
        let content = Content::of(Vec::new(), bytes::Bytes::new());
        Aside::new(from, until, Old::Whole(Arc::new(content)))
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
}
