//! The spill file: room on disk for old versions of chunks, once the memory for them is full.
//!
//! It is written with `O_DIRECT` into preallocated blocks: through the page cache the copies would
//! compete with the guest's own writes. It holds nothing that outlives the process and is emptied
//! whenever nothing is in it.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;
use rustix::fs::OFlags;

use super::DiskError;
use super::budget::{Budgets, Share};
use super::files::Files;
use super::io::Which;

/// Slots that are allocated at a time.
const SLOTS_AT_ONCE: u64 = 16;

/// The spill file of one disk. Made when it is first needed.
#[derive(Debug)]
pub(super) struct Spill {
    files: Arc<Files>,
    path: PathBuf,
    slot_bytes: u64,
    budgets: Arc<Budgets>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    file: Option<Arc<File>>,
    free: Vec<u64>,
    /// Slots that the file has room for.
    slots: u64,
    used: u64,
}

/// Bytes in the spill file.
#[derive(Debug)]
pub(super) struct Slot {
    spill: Arc<Spill>,
    file: Arc<File>,
    index: u64,
    len: usize,
    /// Given back after the slot is free again.
    _share: Share,
}

impl Spill {
    pub(super) fn new(
        files: &Arc<Files>,
        path: PathBuf,
        slot_bytes: u64,
        budgets: &Arc<Budgets>,
    ) -> Result<Arc<Self>, DiskError> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(files.error(Which::Spill, "remove", error));
            }
            _ => {}
        }
        let budgets = Arc::clone(budgets);
        let files = Arc::clone(files);
        Ok(Arc::new(Self { files, path, slot_bytes, budgets, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use.
    pub(super) fn used_bytes(&self) -> u64 {
        self.lock().used * self.slot_bytes
    }

    /// A page-aligned buffer for [`Self::store`].
    pub(super) fn buffer(&self, len: usize) -> Result<MmapMut, DiskError> {
        MmapMut::map_anon(len).map_err(|error| self.files.error(Which::Spill, "buffer", error))
    }

    /// Puts `bytes` (whole sectors, page-aligned, at most a chunk) aside. `None`: no room.
    pub(super) fn store(self: &Arc<Self>, bytes: &MmapMut) -> Result<Option<Slot>, DiskError> {
        let Some(share) = self.budgets.take_spill(self.slot_bytes) else { return Ok(None) };
        let Some((file, index)) = self.take_slot()? else { return Ok(None) };
        let (spill, len) = (Arc::clone(self), bytes.len());
        let slot = Slot { spill, file, index, len, _share: share };
        let offset = index * self.slot_bytes;
        self.files.write_all_at(Which::Spill, &slot.file, bytes, offset)?;
        Ok(Some(slot))
    }

    fn take_slot(&self) -> Result<Option<(Arc<File>, u64)>, DiskError> {
        let mut state = self.lock();
        let file = match &state.file {
            Some(file) => Arc::clone(file),
            None => Arc::clone(state.file.insert(Arc::new(self.make()?))),
        };
        if state.free.is_empty() {
            let (offset, more) = (state.slots * self.slot_bytes, SLOTS_AT_ONCE * self.slot_bytes);
            let sized = self.files.allocate(Which::Spill, &file, offset, more);
            match sized.and_then(|()| self.files.set_len(Which::Spill, &file, offset + more)) {
                // A full host is like a full budget: the writer waits for the persister.
                Err(DiskError::NoSpace { .. }) => return Ok(None),
                Err(error) => return Err(error),
                Ok(()) => {}
            }
            let slots = state.slots..state.slots + SLOTS_AT_ONCE;
            state.slots = slots.end;
            state.free.extend(slots.rev());
        }
        let index = state.free.pop().expect("there were free slots, or some were just made");
        state.used += 1;
        Ok(Some((file, index)))
    }

    fn make(&self) -> Result<File, DiskError> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        let direct =
            options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(&self.path);
        // Some file systems know no O_DIRECT.
        direct
            .or_else(|_| options.open(&self.path))
            .map_err(|error| self.files.error(Which::Spill, "create", error))
    }

    fn free(&self, index: u64) {
        let mut state = self.lock();
        state.free.push(index);
        state.used -= 1;
        if state.used > 0 {
            return;
        }
        if let Some(file) = &state.file
            && file.set_len(0).is_ok()
        {
            state.free.clear();
            state.slots = 0;
        }
    }
}

impl Slot {
    /// The bytes.
    pub(super) fn load(&self) -> Result<MmapMut, DiskError> {
        let mut bytes = self.spill.buffer(self.len)?;
        let offset = self.index * self.spill.slot_bytes;
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|error| self.spill.files.error(Which::Spill, "read", error))?;
        Ok(bytes)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.spill.free(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::HostFiles;

    fn make(spill_bytes: u64) -> (tempfile::TempDir, Arc<Budgets>, Arc<Spill>) {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new("d".into(), Arc::new(HostFiles));
        let budgets = Budgets::new(0, spill_bytes);
        let spill = Spill::new(&files, dir.path().join("spill"), 65536, &budgets).unwrap();
        (dir, budgets, spill)
    }

    fn filled(spill: &Spill, len: usize, byte: u8) -> MmapMut {
        let mut buffer = spill.buffer(len).unwrap();
        buffer.fill(byte);
        buffer
    }

    #[test]
    fn slots_keep_their_bytes_and_are_used_again() {
        let (dir, budgets, spill) = make(40 * 65536);
        let mut slots: Vec<_> = (0..40u8)
            .map(|n| spill.store(&filled(&spill, 4096 * (1 + usize::from(n) % 16), n)).unwrap())
            .map(Option::unwrap)
            .collect();
        assert!(spill.store(&filled(&spill, 4096, 1)).unwrap().is_none(), "the budget is full");
        slots.remove(7);
        slots.insert(7, spill.store(&filled(&spill, 8192, 77)).unwrap().unwrap());
        for (n, slot) in slots.iter().enumerate() {
            let expected = if n == 7 { 77 } else { n as u8 };
            assert!(slot.load().unwrap().iter().all(|byte| *byte == expected));
        }
        assert_eq!((spill.used_bytes(), budgets.spill().used()), (40 * 65536, 40 * 65536));
        drop(slots);
        assert_eq!((spill.used_bytes(), budgets.spill().used()), (0, 0));
        let left = std::fs::metadata(dir.path().join("spill")).unwrap().len();
        assert_eq!(left, 0, "an empty spill file takes no space");
        let again = spill.store(&filled(&spill, 4096, 5)).unwrap().unwrap();
        assert_eq!(again.load().unwrap()[..], [5; 4096]);
    }
}
