//! Process images: CRIU saves all processes of the job from outside of it, as `blobcr-criu` does on
//! each machine, and the call in which they were saved returns once more after a restart.
//!
//! Nobody who is saved may hold anything open to whoever saves it, so both meet in files below
//! BLOBCR_MPI_DIR alone. Rank 0 asks; all ranks wait for their machine's answer, which comes when
//! the disks are in their set, or when the processes were restored from them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use blobcr_guest::Deadline;

use crate::failure::Failure;
use crate::global::agree;
use crate::host;
use crate::mpi::{Comm, Mpi};
use crate::probes::Stopped;
use crate::settings::Settings;

/// Between two looks for the answer.
const PAUSE: Duration = Duration::from_millis(20);
/// What `blobcr-criu` does, each step in the time that a host has; and one more, for the way.
const STEPS: u32 = 5;
/// What stands for a set when it is only found out whether the job can be saved.
const TRY: &str = "try";

pub(crate) struct Images {
    /// Where `blobcr-criu` is met.
    dir: PathBuf,
    wait: Duration,
    /// How often it was asked.
    asked: u32,
}

/// A set of process images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Its number.
    pub(crate) set: u64,
    /// Whether the processes were restored from it since.
    pub(crate) restarted: bool,
}

impl Images {
    /// Refuses what could be saved but not restored, or not even saved.
    pub(crate) fn find(settings: &Settings, dir: &Path) -> Result<Self, Failure> {
        if !Mpi::get()?.is_mpich_over_ucx() {
            return Err(Failure::usage(
                "BLOBCR_MPI_SAVE=criu works with MPICH over UCX, as Debian has it, and this MPI is \
                 another one: take its checkpoints by BLOBCR_MPI_HOOK or a command",
            ));
        }
        check_transports(settings.transports.as_deref())?;
        let dir = dir.join("criu");
        match fs::read_to_string(dir.join("agent")) {
            Ok(boot) if boot.trim() == host::boot_id()? => {}
            _ => {
                return Err(Failure::usage(
                    "BLOBCR_MPI_SAVE=criu wants the job to be started by \"blobcr-criu run\", with \
                     the same BLOBCR_MPI_DIR",
                ));
            }
        }
        Ok(Self { dir, wait: settings.timeout * STEPS, asked: 0 })
    }

    /// Finds out whether the job can be saved at all.
    pub(crate) fn try_out(&mut self, comm: &Comm) -> Result<(), Failure> {
        self.ask(comm, TRY).map(|_| ())
    }

    /// Has all processes saved, and the disks with them as one set.
    pub(crate) fn take(&mut self, comm: &Comm) -> Result<Taken, Failure> {
        self.ask(comm, "set")
    }

    fn ask(&mut self, comm: &Comm, what: &str) -> Result<Taken, Failure> {
        self.asked += 1;
        let (new, request) = (self.dir.join("request.new"), self.dir.join("request"));
        let written = match comm.rank {
            0 => fs::write(&new, format!("{} {what}\n", self.asked)),
            _ => Ok(()),
        };
        // From here on no rank sends anything until it has its answer.
        agree(comm, written.map_err(|e| Failure::io("cannot ask blobcr-criu", &e)))?;
        let stopped = Stopped::all();
        let asked = match comm.rank {
            0 => fs::rename(&new, &request),
            _ => Ok(()),
        };
        let answer = asked
            .map_err(|e| Failure::io("cannot ask blobcr-criu", &e))
            .and_then(|()| self.answer(Deadline::after(self.wait)));
        drop(stopped);
        agree(comm, answer)
    }

    fn answer(&self, deadline: Deadline) -> Result<Taken, Failure> {
        let path = self.dir.join(format!("answer.{}", self.asked));
        loop {
            match fs::read_to_string(&path) {
                Ok(text) => return parse(&text),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::io("cannot read blobcr-criu's answer", &error)),
            }
            if deadline.is_over() {
                let text = format!("blobcr-criu gave no answer within {} s", self.wait.as_secs());
                return Err(Failure::new(libc::ETIMEDOUT, text));
            }
            sleep(PAUSE);
        }
    }
}

/// `0 GROUP:SET:VMS`: saved; `1 GROUP:SET:VMS`: restored; a negative errno and why: neither.
fn parse(answer: &str) -> Result<Taken, Failure> {
    let (code, text) = answer.trim().split_once(' ').unwrap_or(("", answer));
    let restarted = match code.parse() {
        Ok(0) => false,
        Ok(1) => true,
        Ok(errno) => return Err(Failure::new(errno, text.to_owned())),
        Err(_) => {
            let text = format!("blobcr-criu gave an answer that is none: {answer:?}");
            return Err(Failure::new(libc::EPROTO, text));
        }
    };
    // There is none of what was only tried.
    let set = text.split(':').nth(1).and_then(|set| set.parse().ok()).unwrap_or(0);
    Ok(Taken { set, restarted })
}

/// What UCX may use must be restored as it was on a machine that was booted anew.
fn check_transports(list: Option<&str>) -> Result<(), Failure> {
    let fits = |name: &str| matches!(name, "tcp" | "self");
    if list.is_some_and(|list| list.split(',').all(fits)) {
        return Ok(());
    }
    let now = list.map_or_else(|| "is not set".to_owned(), |list| format!("is {list}"));
    Err(Failure::usage(format!(
        "BLOBCR_MPI_SAVE=criu saves messages that travel by TCP alone, shared memory and InfiniBand \
         cannot be restored: UCX_TLS {now}, set it to tcp,self"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tcp_is_saved() {
        check_transports(Some("tcp,self")).unwrap();
        for list in [None, Some("all"), Some("tcp,posix,self"), Some("^sysv"), Some("")] {
            let error = check_transports(list).unwrap_err();
            assert!(error.text.contains("set it to tcp,self"), "{}", error.text);
        }
    }

    #[test]
    fn answers_are_read() {
        assert_eq!(parse("0 heat:7:2\n"), Ok(Taken { set: 7, restarted: false }));
        assert_eq!(parse("1 heat:7:2\n"), Ok(Taken { set: 7, restarted: true }));
        assert_eq!(parse("0 try \n"), Ok(Taken { set: 0, restarted: false }));
        let failure = parse("-5 10.9.0.2: CRIU cannot save\n").unwrap_err();
        assert_eq!((failure.errno, failure.text.as_str()), (-5, "10.9.0.2: CRIU cannot save"));
        assert_eq!(parse("").unwrap_err().errno, -libc::EPROTO);
    }
}
