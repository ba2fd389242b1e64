//! The simulated disk as the store sees it.

use std::io::{self, IoSlice};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::disk::{Change, Fault, Inode, NameChange, SimDisk, apply, apply_name, gone};
use crate::disk::{Disk, DiskFile, Space};

#[derive(Debug)]
pub(super) struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl Disk for SimDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.lock();
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = state.inodes.len();
        let change = NameChange::Create(name.to_owned(), inode);
        let cut = state.step()?.is_some() && state.dead;
        state.inodes.push(Inode::default());
        apply_name(&mut state.names, &change);
        state.pending_names.push(change);
        if cut { Err(gone()) } else { Ok(Arc::new(SimFile { disk: self.clone(), inode })) }
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.lock();
        let inode = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files())
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        let mut state = self.lock();
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.step()?;
        let change = NameChange::Unlink(name.to_owned());
        apply_name(&mut state.names, &change);
        state.pending_names.push(change);
        if state.dead { Err(gone()) } else { Ok(()) }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.step()?;
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        apply_name(&mut state.names, &change);
        state.pending_names.push(change);
        if state.dead { Err(gone()) } else { Ok(()) }
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.lock();
        if state.step()? == Some(Fault::SyncFails) {
            state.fault = None;
            return Err(io::Error::other("the sync failed"));
        }
        if state.dead {
            return Err(gone());
        }
        state.durable_names = state.names.clone();
        state.pending_names.clear();
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let state = self.lock();
        let free = state.capacity.saturating_sub(state.used());
        let free = if state.boasts { usize::MAX >> 1 } else { free };
        Ok(Space { capacity: state.capacity as u64, free: free as u64 })
    }
}

impl DiskFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.lock().inodes[self.inode].seen.len() as u64)
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let state = self.disk.lock();
        let seen = &state.inodes[self.inode].seen;
        let start = (offset as usize).min(seen.len());
        Ok(seen[start..(start + len).min(seen.len())].to_vec())
    }

    fn write_at(&self, offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut state = self.disk.lock();
        let fails = state.step()? == Some(Fault::WriteFails);
        if fails {
            state.fault = None;
        }
        let mut bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        let end = offset as usize + bytes.len();
        let room = state.inodes[self.inode].room();
        let free = state.capacity.saturating_sub(state.used());
        // As a real disk, it writes what there is room for before it complains.
        let cut = end.saturating_sub(room + free);
        bytes.truncate(bytes.len().saturating_sub(cut));
        if state.dead || fails {
            let some = state.dice.random_range(0..=bytes.len());
            bytes.truncate(some);
        }
        let change = Change::Write { offset: offset as usize, bytes };
        let inode = &mut state.inodes[self.inode];
        apply(&mut inode.seen, &change);
        inode.pending.push(change);
        match () {
            () if state.dead => Err(gone()),
            () if fails => Err(io::Error::other("the write failed")),
            () if cut > 0 => Err(io::ErrorKind::StorageFull.into()),
            () => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.lock();
        let fault = state.step()?;
        state.syncs += 1;
        let mut dice = StdRng::seed_from_u64(state.dice.random());
        let dead = state.dead;
        if fault == Some(Fault::SyncFails) {
            state.fault = None;
        }
        let inode = &mut state.inodes[self.inode];
        match fault {
            None | Some(Fault::WriteFails) => {
                // Not what is seen: pages that an earlier sync failed to write count as clean.
                for change in std::mem::take(&mut inode.pending) {
                    apply(&mut inode.durable, &change);
                }
                Ok(())
            }
            Some(_) if dead => Err(gone()),
            Some(_) => {
                // The pages are clean now, and some never reached the medium: readers still see
                // them, until they do not.
                inode.durable = inode.after_power_cut(&mut dice);
                inode.pending.clear();
                Err(io::Error::other("the sync failed"))
            }
        }
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.step()?;
        let inode = &mut state.inodes[self.inode];
        let change = Change::Truncate(len as usize);
        apply(&mut inode.seen, &change);
        inode.allocated = inode.allocated.min(len as usize);
        inode.pending.push(change);
        if state.dead { Err(gone()) } else { Ok(()) }
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.step()?;
        let free = state.capacity.saturating_sub(state.used());
        let inode = &mut state.inodes[self.inode];
        let more = (len as usize).saturating_sub(inode.room());
        if more > free {
            return Err(io::ErrorKind::StorageFull.into());
        }
        inode.allocated = inode.allocated.max(len as usize);
        if state.dead { Err(gone()) } else { Ok(()) }
    }
}
