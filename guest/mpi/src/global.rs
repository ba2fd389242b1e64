//! A global checkpoint: all machines' parts in one set, or none that counts.
//!
//! Every step that can fail on one rank is followed by an agreement of all of them, and every step
//! that waits for something else than MPI has a deadline. So no rank waits for one that gave up, and
//! all return the same. The set counts only when each machine has joined it, which the hosts see to:
//! whatever happens half-way, an incomplete set is left, and restarts take the one before.

use std::panic::{AssertUnwindSafe, catch_unwind};

use blobcr_proto::v1::SetMembership;

use crate::failure::Failure;
use crate::host;
use crate::mpi::Comm;
use crate::settings::Settings;

/// Of a failure's text, that all ranks get.
const TEXT_BYTES: usize = 512;
/// Of a group's name.
const GROUP_BYTES: usize = 256;

/// Takes a global checkpoint; `written` is what the rank's own writing of its state came to.
pub(crate) fn checkpoint(
    comm: &Comm,
    settings: Result<&'static Settings, Failure>,
    written: Result<(), Failure>,
) -> Result<u64, Failure> {
    let ready = written.and(settings).and_then(|s| Ok((s, host::machine(s)?)));
    let (settings, machine) = agree(comm, ready)?;
    let machines = Machines::find(comm, machine)?;
    let leads = |work: &dyn Fn() -> Result<(), Failure>| match machines.leads {
        true => guarded(work),
        false => Ok(()),
    };
    agree(comm, leads(&|| host::flush(settings)))?;
    let begun = match comm.rank {
        0 => guarded(|| host::begin(settings, machines.count)).map(Some),
        _ => Ok(None),
    };
    let set = share(comm, agree(comm, begun)?, machines.count)?;
    agree(comm, leads(&|| host::join(settings, &set)))?;
    Ok(set.sequence)
}

/// Where the ranks run.
struct Machines {
    count: u32,
    /// Whether this rank acts for its machine: the lowest one there does.
    leads: bool,
}

impl Machines {
    fn find(comm: &Comm, mine: u64) -> Result<Self, Failure> {
        Ok(Self::of(&comm.allgather(mine)?, comm.rank as usize))
    }

    fn of(all: &[u64], rank: usize) -> Self {
        let first = |at: &usize| !all[..*at].contains(&all[*at]);
        Self { count: (0..all.len()).filter(first).count() as u32, leads: first(&rank) }
    }
}

/// A panic of one rank must not keep the others waiting.
fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Failure::new(libc::EIO, "libblobcr_mpi has a bug: it panicked".to_owned()))
    })
}

/// When all ranks have succeeded, what each has come to; otherwise the same failure for all: the one
/// of the lowest rank among those with the least errno.
pub(crate) fn agree<T>(comm: &Comm, mine: Result<T, Failure>) -> Result<T, Failure> {
    let errno = mine.as_ref().err().map_or(0, |failure| failure.errno);
    let worst = comm.min(errno)?;
    let value = match mine {
        Ok(value) if worst == 0 => return Ok(value),
        Ok(_) => None,
        Err(failure) => Some(failure),
    };
    let failed = value.filter(|failure| failure.errno == worst);
    let teller = comm.min(if failed.is_some() { comm.rank } else { i32::MAX })?;
    let mut text = [0; TEXT_BYTES];
    if let Some(failure) = failed {
        let told = format!("rank {}: {}", comm.rank, failure.text);
        put(&mut text, &told);
    }
    comm.bcast(&mut text, teller)?;
    Err(Failure { errno: worst, text: take(&text) })
}

/// Rank 0's set becomes everybody's.
fn share(
    comm: &Comm,
    begun: Option<SetMembership>,
    expected_vms: u32,
) -> Result<SetMembership, Failure> {
    let mut bytes = [0; 8 + GROUP_BYTES];
    if let Some(set) = begun {
        bytes[..8].copy_from_slice(&set.sequence.to_le_bytes());
        put(&mut bytes[8..], &set.group);
    }
    comm.bcast(&mut bytes, 0)?;
    let mut sequence = [0; 8];
    sequence.copy_from_slice(&bytes[..8]);
    let sequence = u64::from_le_bytes(sequence);
    Ok(SetMembership { group: take(&bytes[8..]), sequence, expected_vms })
}

/// As much of the text as there is room for.
fn put(into: &mut [u8], text: &str) {
    let len = text.len().min(into.len());
    into[..len].copy_from_slice(&text.as_bytes()[..len]);
}

fn take(from: &[u8]) -> String {
    let end = from.iter().position(|byte| *byte == 0).unwrap_or(from.len());
    String::from_utf8_lossy(&from[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_rank_of_each_machine_leads_it() {
        let all = [7, 9, 7, 9, 4];
        let leads: Vec<bool> = (0..all.len()).map(|r| Machines::of(&all, r).leads).collect();
        assert_eq!(leads, [true, true, false, false, true]);
        assert_eq!(Machines::of(&all, 2).count, 3);
    }

    #[test]
    fn a_panic_is_a_failure() {
        let failure = guarded::<()>(|| panic!("on purpose")).unwrap_err();
        assert_eq!(failure.errno, -libc::EIO);
    }

    #[test]
    fn texts_are_cut_to_their_room() {
        let mut room = [0; 4];
        put(&mut room, "abcdef");
        assert_eq!(take(&room), "abcd");
        put(&mut room, "x\0");
        assert_eq!(take(&room), "x");
    }
}
