//! This machine and its host: what the first rank of each machine does for all that run there.

use std::fs;
use std::path::Path;
use std::time::Instant;

use blobcr_guest::{Ask, Client, Deadline, GuestError, flush};
use blobcr_proto::Hash;
use blobcr_proto::v1::{SetMembership, SetState};

use crate::failure::Failure;
use crate::settings::Settings;

/// A number that every boot of every kernel draws for itself: ranks that see the same one share a
/// machine, whatever its name.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What tells this machine from the others.
pub(crate) fn machine(settings: &Settings) -> Result<u64, Failure> {
    let id = match &settings.vm_id {
        Some(id) => id.clone(),
        None => boot_id()?,
    };
    Ok(Hash::of(id.as_bytes()).prefix())
}

pub(crate) fn boot_id() -> Result<String, Failure> {
    let id = fs::read_to_string(Path::new(BOOT_ID)).map_err(|e| Failure::io(BOOT_ID, &e))?;
    Ok(id.trim().to_owned())
}

/// Brings everything that was written onto this machine's disks.
pub(crate) fn flush(settings: &Settings) -> Result<(), Failure> {
    if !settings.flush {
        return Ok(());
    }
    let began = Instant::now();
    let done = flush::everything()?;
    crate::say(settings, || {
        format!(
            "flushed {} file systems and {} disks in {:.3} s",
            done.file_systems,
            done.disks,
            began.elapsed().as_secs_f64()
        )
    });
    Ok(())
}

/// Begins a set of so many machines.
pub(crate) fn begin(settings: &Settings, machines: u32) -> Result<SetMembership, Failure> {
    let set = client(settings)?.begin_set(&settings.group, machines, deadline(settings))?;
    Ok(SetMembership { group: set.group, sequence: set.sequence, expected_vms: set.expected_vms })
}

/// Asks for this machine's part in a set.
pub(crate) fn join(settings: &Settings, set: &SetMembership) -> Result<(), Failure> {
    let mut ask = Ask::new();
    ask.set = Some(set.clone());
    let began = Instant::now();
    let taken = client(settings)?.checkpoint(&ask, deadline(settings))?;
    crate::say(settings, || {
        let seconds = began.elapsed().as_secs_f64();
        format!("{} joined the set {}:{} in {seconds:.3} s", taken.vm, set.group, set.sequence)
    });
    Ok(())
}

/// Whether the set is stable.
pub(crate) fn is_stable(
    settings: &Settings,
    sequence: u64,
    deadline: Deadline,
) -> Result<bool, Failure> {
    let set = client(settings)?.set_status(&settings.group, sequence, deadline)?;
    match set.state() {
        SetState::Stable => Ok(true),
        SetState::Failed | SetState::Obsolete => Err(Failure::new(
            libc::EIO,
            format!("the set {}:{sequence} is lost: take another one", set.group),
        )),
        _ => Ok(false),
    }
}

fn client(settings: &Settings) -> Result<Client, GuestError> {
    Ok(Client::new(settings.place.target()?))
}

fn deadline(settings: &Settings) -> Deadline {
    Deadline::after(settings.timeout)
}
