//! What the environment says. Nothing else in this library reads it.

use std::env::{var, vars_os};
use std::ffi::c_int;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use blobcr_guest::Place;
use blobcr_proto::Hash;

use crate::failure::Failure;

const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// The functions of MPI that may trigger a checkpoint, as [`crate::wrap`] wraps them.
pub(crate) const FUNCTIONS: [&str; 8] = [
    "MPI_Barrier",
    "MPI_Bcast",
    "MPI_Reduce",
    "MPI_Allreduce",
    "MPI_Allgather",
    "MPI_Gather",
    "MPI_Scatter",
    "MPI_Alltoall",
];

/// Of the settings, after `BLOBCR_MPI_`.
const NAMES: [&str; 12] = [
    "DIR",
    "EVERY",
    "EXIT_FILE",
    "EXIT_SIGNAL",
    "FLUSH",
    "HOOK",
    "INTERVAL_S",
    "SAVE",
    "SIGNAL",
    "TIMEOUT_S",
    "VERBOSE",
    "VM_ID",
];
/// The libraries that come before a process's own; a command that saves its state goes without.
pub(crate) const PRELOAD: &str = "LD_PRELOAD";

/// Every n-th call of a function of MPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Every {
    /// Of [`FUNCTIONS`].
    pub(crate) function: usize,
    pub(crate) calls: u64,
}

/// Who saves the state of a process that knows nothing of checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Save {
    /// A library's `blobcr_mpi_save`.
    Library(PathBuf),
    /// A command of the shell.
    Command(String),
}

/// The BLOBCR_MPI_SAVE that is no command.
const IMAGES: &str = "criu";

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) place: Place,
    pub(crate) group: String,
    pub(crate) timeout: Duration,
    pub(crate) vm_id: Option<String>,
    pub(crate) flush: bool,
    pub(crate) dir: Option<PathBuf>,
    pub(crate) verbose: bool,
    pub(crate) every: Option<Every>,
    pub(crate) interval: Option<Duration>,
    pub(crate) signal: Option<c_int>,
    pub(crate) save: Option<Save>,
    /// Whether the processes themselves are saved, from outside.
    pub(crate) images: bool,
    pub(crate) exit_file: Option<PathBuf>,
    pub(crate) exit_signal: Option<c_int>,
    /// Whether the process was started with this library before its own.
    pub(crate) preloaded: bool,
    /// What MPICH's messages may travel by.
    pub(crate) transports: Option<String>,
}

impl Settings {
    /// What the environment said when it was first asked.
    pub(crate) fn get() -> Result<&'static Self, Failure> {
        static READ: OnceLock<Result<Settings, Failure>> = OnceLock::new();
        READ.get_or_init(|| {
            known(vars_os().map(|(name, _)| name.to_string_lossy().into_owned()))?;
            Self::read(|name| var(name).ok().filter(|v| !v.is_empty()))
        })
        .as_ref()
        .map_err(Clone::clone)
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let path = |name| get(name).map(PathBuf::from);
        let place = Place {
            port: get("BLOBCR_PORT"),
            socket: path("BLOBCR_SOCKET"),
            connect: get("BLOBCR_CONNECT"),
            vm: get("BLOBCR_VM"),
            token_file: path("BLOBCR_TOKEN_FILE"),
        };
        let flush = match get("BLOBCR_MPI_FLUSH").as_deref() {
            None | Some("all") => true,
            Some("none") => false,
            Some(other) => return Err(wrong("BLOBCR_MPI_FLUSH", other, "write all or none")),
        };
        let save = match (path("BLOBCR_MPI_HOOK"), get("BLOBCR_MPI_SAVE")) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage(
                    "BLOBCR_MPI_HOOK and BLOBCR_MPI_SAVE are both set; only one can save the state",
                ));
            }
            (Some(library), None) => Some(Save::Library(library)),
            (None, Some(command)) => Some(command).filter(|c| c != IMAGES).map(Save::Command),
            (None, None) => None,
        };
        let setting = |name: &str| get(name).map(|value| (name.to_owned(), value));
        Ok(Self {
            place,
            group: get("BLOBCR_GROUP").unwrap_or_default(),
            timeout: setting("BLOBCR_MPI_TIMEOUT_S")
                .map(seconds)
                .transpose()?
                .unwrap_or(TIMEOUT_DEFAULT),
            vm_id: get("BLOBCR_MPI_VM_ID"),
            flush,
            dir: path("BLOBCR_MPI_DIR"),
            verbose: get("BLOBCR_MPI_VERBOSE").is_some_and(|v| v != "0"),
            every: setting("BLOBCR_MPI_EVERY").map(every).transpose()?,
            interval: setting("BLOBCR_MPI_INTERVAL_S").map(seconds).transpose()?,
            signal: setting("BLOBCR_MPI_SIGNAL").map(signal).transpose()?,
            save,
            images: get("BLOBCR_MPI_SAVE").is_some_and(|how| how == IMAGES),
            exit_file: path("BLOBCR_MPI_EXIT_FILE"),
            exit_signal: setting("BLOBCR_MPI_EXIT_SIGNAL").map(signal).transpose()?,
            preloaded: get(PRELOAD).is_some_and(|list| list.contains("libblobcr_mpi")),
            transports: get("UCX_TLS"),
        })
    }

    /// Whether checkpoints are taken without the program's doing, when it `exports` a function that
    /// saves its state, or not.
    pub(crate) fn triggers(&self, exports: bool) -> Result<bool, Failure> {
        let saved = exports || self.save.is_some() || self.images;
        // A program that asks by itself may have an interval and a signal too.
        let triggered = self.every.is_some()
            || (self.interval.is_some() || self.signal.is_some()) && (saved || self.preloaded);
        if triggered && !saved {
            return Err(Failure::usage(
                "nothing saves the state of the processes: set BLOBCR_MPI_HOOK to a library that \
                 exports blobcr_mpi_save, or BLOBCR_MPI_SAVE to a command or to criu",
            ));
        }
        if !triggered && (self.preloaded || self.save.is_some()) {
            return Err(Failure::usage(
                "nothing tells when to take checkpoints: set BLOBCR_MPI_EVERY, \
                 BLOBCR_MPI_INTERVAL_S or BLOBCR_MPI_SIGNAL",
            ));
        }
        // Processes are saved for a program that asks by itself, too.
        let triggered = triggered || self.images;
        if triggered && self.dir.is_none() {
            return Err(Failure::usage(
                "nothing tells where to save the state: set BLOBCR_MPI_DIR to a directory on a disk \
                 of this machine",
            ));
        }
        Ok(triggered)
    }

    /// A number above 0 that is the same for all ranks whose checkpoints are due at the same calls.
    pub(crate) fn rule(&self) -> c_int {
        let Self { every, interval, signal, images, .. } = self;
        let rule = format!("{every:?} {interval:?} {signal:?} {images}");
        (Hash::of(rule.as_bytes()).prefix() % c_int::MAX as u64) as c_int + 1
    }
}

/// A name that is nearly right would do nothing, and nobody would know.
fn known(names: impl Iterator<Item = String>) -> Result<(), Failure> {
    for name in names {
        if let Some(ours) = name.strip_prefix("BLOBCR_MPI_")
            && !NAMES.contains(&ours)
        {
            let names = NAMES.join(", BLOBCR_MPI_");
            return Err(Failure::usage(format!("{name} is none of BLOBCR_MPI_{names}")));
        }
    }
    Ok(())
}

fn wrong(name: &str, value: &str, what: &str) -> Failure {
    Failure::usage(format!("{name}={value}: {what}"))
}

fn seconds((name, value): (String, String)) -> Result<Duration, Failure> {
    let seconds: f64 = value.parse().unwrap_or(-1.0);
    match seconds > 0.0 && seconds <= 1e9 {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(wrong(&name, &value, "write a number of seconds above 0")),
    }
}

fn every((name, value): (String, String)) -> Result<Every, Failure> {
    let wrong = || {
        let functions = FUNCTIONS.join(", ");
        wrong(&name, &value, &format!("write FUNCTION:N, with one of {functions}, and N from 1"))
    };
    let (function, calls) = value.split_once(':').ok_or_else(wrong)?;
    let function = FUNCTIONS.iter().position(|f| *f == function).ok_or_else(wrong)?;
    let calls = calls.parse().ok().filter(|n| *n > 0).ok_or_else(wrong)?;
    Ok(Every { function, calls })
}

fn signal((name, value): (String, String)) -> Result<c_int, Failure> {
    match value.strip_prefix("SIG").unwrap_or(&value) {
        "USR1" => Ok(libc::SIGUSR1),
        "USR2" => Ok(libc::SIGUSR2),
        "TERM" => Ok(libc::SIGTERM),
        "HUP" => Ok(libc::SIGHUP),
        "INT" => Ok(libc::SIGINT),
        "URG" => Ok(libc::SIGURG),
        _ => Err(wrong(&name, &value, "write one of USR1, USR2, TERM, HUP, INT, URG")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Settings, Failure> {
        Settings::read(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_set_is_the_port_and_no_trigger() {
        let found = read(&[]).unwrap();
        assert!(found.flush && !found.triggers(false).unwrap());
        assert_eq!(found.timeout, TIMEOUT_DEFAULT);
    }

    #[test]
    fn triggers_are_read() {
        let found = read(&[
            ("BLOBCR_MPI_EVERY", "MPI_Allreduce:100"),
            ("BLOBCR_MPI_INTERVAL_S", "0.5"),
            ("BLOBCR_MPI_SIGNAL", "SIGUSR1"),
            ("BLOBCR_MPI_SAVE", "true"),
        ])
        .unwrap();
        assert_eq!(found.every, Some(Every { function: 3, calls: 100 }));
        assert_eq!(found.interval, Some(Duration::from_millis(500)));
        assert_eq!(found.signal, Some(libc::SIGUSR1));
        assert_eq!(found.save, Some(Save::Command("true".to_owned())));
        assert!(found.rule() > 0);
        assert_ne!(found.rule(), read(&[("BLOBCR_MPI_EVERY", "MPI_Bcast:1")]).unwrap().rule());
    }

    #[test]
    fn a_checkpoint_that_would_never_be_taken_is_refused() {
        let (every, dir) = (("BLOBCR_MPI_EVERY", "MPI_Barrier:2"), ("BLOBCR_MPI_DIR", "/d"));
        let (interval, save) = (("BLOBCR_MPI_INTERVAL_S", "5"), ("BLOBCR_MPI_SAVE", "true"));
        let images = ("BLOBCR_MPI_SAVE", "criu");
        let preloaded = ("LD_PRELOAD", "/usr/lib/libblobcr_mpi.so");
        let triggers = |pairs: &[_], exports| read(pairs).unwrap().triggers(exports);
        assert!(triggers(&[every, dir, save], false).unwrap());
        assert!(triggers(&[interval, dir], true).unwrap());
        assert!(triggers(&[preloaded, interval, images, dir], false).unwrap());
        assert!(triggers(&[images, dir], false).unwrap());
        // The program that asks by itself has an interval too.
        assert!(!triggers(&[interval], false).unwrap());
        for (pairs, text) in [
            (vec![every, dir], "nothing saves"),
            (vec![preloaded, interval, dir], "nothing saves"),
            (vec![save, dir], "nothing tells when"),
            (vec![preloaded], "nothing tells when"),
            (vec![every, save], "nothing tells where"),
            (vec![preloaded, images, dir], "nothing tells when"),
            (vec![images], "nothing tells where"),
        ] {
            let error = triggers(&pairs, false).unwrap_err();
            assert!(error.text.contains(text), "{}", error.text);
        }
        let names = |name: &str| known([name.to_owned()].into_iter());
        names("BLOBCR_MPI_EVERY").unwrap();
        names("BLOBCR_RANK").unwrap();
        assert!(names("BLOBCR_MPI_EVREY").unwrap_err().text.contains("BLOBCR_MPI_EVREY is none"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_name() {
        for (name, value) in [
            ("BLOBCR_MPI_EVERY", "MPI_Allreduce"),
            ("BLOBCR_MPI_EVERY", "MPI_Send:1"),
            ("BLOBCR_MPI_EVERY", "MPI_Barrier:0"),
            ("BLOBCR_MPI_INTERVAL_S", "0"),
            ("BLOBCR_MPI_INTERVAL_S", "NaN"),
            ("BLOBCR_MPI_TIMEOUT_S", "soon"),
            ("BLOBCR_MPI_SIGNAL", "KILL"),
            ("BLOBCR_MPI_EXIT_SIGNAL", "9"),
            ("BLOBCR_MPI_FLUSH", "some"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.text.contains(&format!("{name}={value}")), "{}", error.text);
            assert_eq!(error.errno, -libc::EINVAL);
        }
        read(&[("BLOBCR_MPI_HOOK", "a"), ("BLOBCR_MPI_SAVE", "b")]).unwrap_err();
    }
}
