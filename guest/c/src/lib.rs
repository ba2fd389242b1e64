//! libblobcr: `blobcr-guest.h` over the crate `blobcr-guest`.
//!
//! Nothing unwinds into C, and what C hands in is checked before it is used: pointers for null,
//! structures for their version and size.

mod abi;

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use blobcr_guest::{Ask, Client, Deadline, GuestError, flush};
use blobcr_proto::v1::{DiskSnapshot, SetMembership, SnapshotState, VmSet, VmStatusReply};

use crate::abi::{Asked, DISKS_MAX, Options, Set, Taken, Versioned, Vm, check, fill, read};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Does the work on checked arguments, and turns what comes of it into what C expects.
///
/// # Safety
/// The pointers are null or valid for the call, as the header says.
unsafe fn call<T: Versioned>(
    options: *const Options,
    out: *mut T,
    work: impl FnOnce(&Asked, &Client, &mut T) -> Result<(), GuestError>,
) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as the caller promises; the version and the size are looked at before the rest.
        let (asked, out) = unsafe { (Asked::from(options.as_ref())?, out.as_mut()) };
        let out = out.ok_or_else(|| GuestError::Usage(format!("{} is NULL", T::NAME)))?;
        check(out)?;
        let client = Client::new(asked.place.target()?);
        work(&asked, &client, out)
    }));
    let (text, errno) = match outcome {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => (error.to_string(), error.errno()),
        Err(_) => ("libblobcr has a bug: it panicked; please report it".to_owned(), 5),
    };
    LAST_ERROR.set(CString::new(text.replace('\0', "?")).unwrap_or_default());
    -errno
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_checkpoint(
    options: *const Options,
    taken: *mut Taken,
) -> c_int {
    // SAFETY: the caller keeps to the header.
    unsafe { call(options, taken, checkpoint) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_wait(options: *const Options, taken: *mut Taken) -> c_int {
    // SAFETY: the caller keeps to the header.
    unsafe { call(options, taken, wait) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_status(options: *const Options, vm: *mut Vm) -> c_int {
    let work = |asked: &Asked, client: &Client, vm: &mut Vm| {
        fill_vm(vm, &client.status(Deadline::after(asked.timeout))?);
        Ok(())
    };
    // SAFETY: the caller keeps to the header.
    unsafe { call(options, vm, work) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_begin_set(options: *const Options, set: *mut Set) -> c_int {
    let work = |asked: &Asked, client: &Client, set: &mut Set| {
        let deadline = Deadline::after(asked.timeout);
        fill_set(set, &client.begin_set(&asked.group, asked.expected_vms, deadline)?);
        Ok(())
    };
    // SAFETY: the caller keeps to the header.
    unsafe { call(options, set, work) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_set_status(options: *const Options, set: *mut Set) -> c_int {
    let work = |asked: &Asked, client: &Client, set: &mut Set| {
        let deadline = Deadline::after(asked.timeout);
        fill_set(set, &client.set_status(&asked.group, asked.sequence, deadline)?);
        Ok(())
    };
    // SAFETY: the caller keeps to the header.
    unsafe { call(options, set, work) }
}

fn checkpoint(asked: &Asked, client: &Client, taken: &mut Taken) -> Result<(), GuestError> {
    let deadline = Deadline::after(asked.timeout);
    let mut ask = Ask::new();
    if let Some(key) = &asked.key {
        ask.key.clone_from(key);
    }
    if asked.sequence != 0 {
        ask.set = Some(SetMembership {
            group: asked.group.clone(),
            sequence: asked.sequence,
            expected_vms: asked.expected_vms,
        });
    }
    let began = Instant::now();
    if !asked.no_flush {
        flush::everything()?;
    }
    let flushed = began.elapsed();
    let reply = client.checkpoint(&ask, deadline)?;
    taken.flush_ns = ns(flushed);
    taken.call_ns = ns(began.elapsed() - flushed);
    fill(&mut taken.vm, &reply.vm);
    taken.count = count(reply.snapshots.len());
    for (into, from) in taken.snapshots.iter_mut().zip(&reply.snapshots) {
        fill(&mut into.disk, &from.disk);
        fill(&mut into.image, &from.image);
        into.image_id = from.image_id;
        into.number = from.number;
        into.dirty_bytes = from.dirty_bytes;
        into.downtime_ns = from.downtime_ns;
        into.state = SnapshotState::Pending as u32;
        into.reserved = 0;
    }
    Ok(())
}

fn wait(asked: &Asked, client: &Client, taken: &mut Taken) -> Result<(), GuestError> {
    let known = taken.count as usize;
    let mut wanted = Vec::new();
    // Of one that has more disks than there is room for, all is waited for as the newest.
    if known <= DISKS_MAX {
        for snapshot in &taken.snapshots[..known] {
            wanted.push(DiskSnapshot {
                disk: read(&snapshot.disk)?,
                image: read(&snapshot.image)?,
                image_id: snapshot.image_id,
                number: snapshot.number,
                ..DiskSnapshot::default()
            });
        }
    }
    let stable = client.wait_stable(&wanted, Deadline::after(asked.timeout))?;
    if known == 0 {
        taken.count = count(stable.len());
        for (into, from) in taken.snapshots.iter_mut().zip(&stable) {
            fill(&mut into.image, &from.image);
            into.number = from.number;
        }
    }
    let room = DISKS_MAX.min(taken.count as usize);
    for snapshot in &mut taken.snapshots[..room] {
        snapshot.state = SnapshotState::Stable as u32;
    }
    Ok(())
}

fn fill_vm(vm: &mut Vm, status: &VmStatusReply) {
    fill(&mut vm.vm, &status.vm);
    vm.count = count(status.disks.len());
    vm.group_count = count(status.groups.len());
    fill(&mut vm.group, status.groups.first().map_or("", String::as_str));
    for (into, from) in vm.disks.iter_mut().zip(&status.disks) {
        fill(&mut into.disk, &from.name);
        fill(&mut into.checkpoint_image, &from.checkpoint_image);
        into.size_bytes = from.size_bytes;
        into.dirty_bytes = from.dirty_bytes;
        into.last_stable = from.last_stable;
        into.pending = from.pending.len() as u64;
        fill(&mut into.stalled, &from.stalled);
    }
}

fn fill_set(set: &mut Set, from: &VmSet) {
    set.sequence = from.sequence;
    set.expected_vms = from.expected_vms;
    set.joined_vms = from.joined_vms;
    set.state = from.state() as u32;
    fill(&mut set.group, &from.group);
}

fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod layout;
