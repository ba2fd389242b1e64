//! The calls in the shape of SCR. An output is a directory of each machine's disk:
//!
//! ```text
//! DIR/00000007.NAME.partial     being written
//! DIR/00000007.NAME             complete: all files of this machine's ranks are durable in it
//! ```
//!
//! The number orders them and is the same on all machines. A restart takes the newest that every
//! machine has complete, which matters where processes start over without their disks being rolled
//! back; after a roll-back, all have the same ones anyway.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::failure::Failure;
use crate::global::{agree, checkpoint};
use crate::mpi::Comm;
use crate::settings::Settings;
use crate::signal;
use crate::trigger::Clock;

const PARTIAL: &str = ".partial";
/// An output's name fits into the header's, and into a directory's beside its number.
const NAME_BYTES_MAX: usize = 63;

static STATE: Mutex<State> = Mutex::new(State::new());

struct State {
    clock: Option<Clock>,
    open: Option<Open>,
    /// Outputs from this number on could not be read.
    before: i32,
}

/// An output or a restart that has begun.
struct Open {
    number: i32,
    name: String,
    dir: PathBuf,
    writes: bool,
    /// This rank's files.
    files: Vec<PathBuf>,
}

impl State {
    const fn new() -> Self {
        Self { clock: None, open: None, before: i32::MAX }
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn need_checkpoint(comm: &Comm) -> Result<bool, Failure> {
    let settings = Settings::get();
    let mine = settings.and_then(|settings| {
        let mut state = state();
        let clock = state.clock.get_or_insert_with(|| Clock::new(settings.interval));
        let signalled = match settings.signal {
            Some(wanted) => {
                signal::watch(wanted)?;
                let came = signal::received(wanted);
                signal::forget(wanted);
                came
            }
            None => false,
        };
        let always = settings.interval.is_none() && settings.signal.is_none();
        // The clocks of several machines differ: the first rank's counts.
        let timed = comm.rank == 0 && clock.is_time();
        Ok(always || signalled || timed || ends(comm, settings)?)
    });
    any(comm, mine)
}

pub(crate) fn should_exit(comm: &Comm) -> Result<bool, Failure> {
    let mine = Settings::get().and_then(|settings| ends(comm, settings));
    any(comm, mine)
}

/// Whether this rank sees a reason to end.
fn ends(comm: &Comm, settings: &Settings) -> Result<bool, Failure> {
    if let Some(wanted) = settings.exit_signal {
        signal::watch(wanted)?;
        if signal::received(wanted) {
            return Ok(true);
        }
    }
    Ok(comm.rank == 0 && settings.exit_file.as_ref().is_some_and(|file| file.exists()))
}

fn any(comm: &Comm, mine: Result<bool, Failure>) -> Result<bool, Failure> {
    let mine = agree(comm, mine)?;
    Ok(comm.max([mine.into()])? != [0])
}

pub(crate) fn start_output(comm: &Comm, name: Result<&str, Failure>) -> Result<(), Failure> {
    let begun = (|| {
        let name = name?;
        check_name(name)?;
        if state().open.is_some() {
            return Err(Failure::usage("complete the output or restart before, first"));
        }
        let dir = dir()?;
        fs::create_dir_all(dir).map_err(|e| Failure::io(&dir.display().to_string(), &e))?;
        Ok((name.to_owned(), dir, list(dir)?.last().map_or(0, |found| found.number)))
    })();
    let (name, dir, newest) = agree(comm, begun)?;
    // Above all that any machine has, complete or not.
    let [newest] = comm.max([newest])?;
    let number = newest + 1;
    let path = dir.join(format!("{}{PARTIAL}", base(number, &name)));
    let made = fs::create_dir_all(&path).map_err(|e| Failure::io("cannot begin the output", &e));
    agree(comm, made)?;
    state().open = Some(Open { number, name, dir: path, writes: true, files: Vec::new() });
    Ok(())
}

pub(crate) fn route_file(file: &str) -> Result<String, Failure> {
    // What a program names with a path is a file of that name in the output.
    let name = Path::new(file).file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Failure::usage(format!("{file:?} names no file")))?;
    let mut state = state();
    let Some(open) = state.open.as_mut() else {
        return Err(Failure::usage("start an output or a restart first"));
    };
    let path = open.dir.join(name);
    if open.writes && !open.files.contains(&path) {
        open.files.push(path.clone());
    }
    path.into_os_string().into_string().map_err(|_| Failure::usage("BLOBCR_MPI_DIR is no UTF-8"))
}

pub(crate) fn complete_output(comm: &Comm, valid: bool) -> Result<u64, Failure> {
    let open = state().open.take_if(|open| open.writes);
    let written = open.ok_or_else(|| Failure::usage("start an output first")).and_then(|open| {
        if !valid {
            return Err(Failure::new(libc::EIO, "it could not write its output".to_owned()));
        }
        for file in &open.files {
            sync(file)?;
        }
        Ok(open)
    });
    let open = agree(comm, written)?;
    let dir = dir()?;
    // Whoever of a machine's ranks comes first renames it; the others find it done.
    agree(comm, publish(dir, &open))?;
    let set = checkpoint(comm, Settings::get(), Ok(()))?;
    let below = state().before.min(open.number);
    // Only now: until the set was accepted, the outputs before were all that there was. The set is
    // good also when they cannot be removed; the next one tries again.
    if let Ok(previous) = newest_common(comm, below) {
        keep(dir, [open.number, previous.map_or(0, |found| found.number)]);
    }
    let mut state = state();
    state.before = i32::MAX;
    if let Some(clock) = state.clock.as_mut() {
        clock.taken();
    }
    Ok(set)
}

fn publish(dir: &Path, open: &Open) -> Result<(), Failure> {
    let to = dir.join(base(open.number, &open.name));
    sync(&open.dir).or_else(|failure| if to.exists() { Ok(()) } else { Err(failure) })?;
    match fs::rename(&open.dir, &to) {
        Err(error) if !to.exists() => {
            return Err(Failure::io("cannot complete the output", &error));
        }
        _ => {}
    }
    sync(dir)
}

/// Removes all outputs but these: half-written ones, and those that other machines have not.
fn keep(dir: &Path, numbers: [i32; 2]) {
    for output in list(dir).unwrap_or_default() {
        if !output.complete || !numbers.contains(&output.number) {
            // Several ranks remove the same; what is left is removed next time.
            fs::remove_dir_all(&output.path).ok();
        }
    }
}

pub(crate) fn have_restart(comm: &Comm) -> Result<Option<String>, Failure> {
    let below = state().before;
    Ok(newest_common(comm, below)?.map(|found| found.name))
}

pub(crate) fn start_restart(comm: &Comm) -> Result<String, Failure> {
    let below = state().before;
    let found = newest_common(comm, below)?
        .ok_or_else(|| Failure::new(libc::ENOENT, "no output is complete everywhere".to_owned()))?;
    let Found { number, name, path, .. } = found;
    let open = Open { number, name: name.clone(), dir: path, writes: false, files: Vec::new() };
    state().open = Some(open);
    Ok(name)
}

pub(crate) fn complete_restart(comm: &Comm, valid: bool) -> Result<(), Failure> {
    let open = state().open.take_if(|open| !open.writes);
    let open = agree(comm, open.ok_or_else(|| Failure::usage("start a restart first")))?;
    let read = match valid {
        true => Ok(()),
        false => Err(Failure::new(libc::EIO, format!("it could not read {}", open.name))),
    };
    agree(comm, read).inspect_err(|_| state().before = open.number)
}

/// The newest output below that number that is complete on every machine.
fn newest_common(comm: &Comm, below: i32) -> Result<Option<Found>, Failure> {
    let mine = dir().and_then(|dir| if dir.exists() { list(dir) } else { Ok(Vec::new()) });
    let mut mine = agree(comm, mine)?;
    mine.retain(|found| found.complete && found.number < below);
    loop {
        let newest = mine.last().map_or(0, |found| found.number);
        // Nobody can have a common one above the least of the newest.
        let least = comm.min(newest)?;
        if least <= 0 {
            return Ok(None);
        }
        mine.retain(|found| found.number <= least);
        let has = mine.last().is_some_and(|found| found.number == least);
        if comm.min(has.into())? == 1 {
            return Ok(mine.pop());
        }
    }
}

struct Found {
    number: i32,
    name: String,
    path: PathBuf,
    complete: bool,
}

/// All outputs of this machine, the newest last.
fn list(dir: &Path) -> Result<Vec<Found>, Failure> {
    let failed = |e| Failure::io(&format!("cannot list {}", dir.display()), &e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some(text) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let (text, complete) = match text.strip_suffix(PARTIAL) {
            Some(text) => (text, false),
            None => (text, true),
        };
        // Other files may lie there as well.
        let Some((number, name)) = text.split_once('.') else { continue };
        let Ok(number) = number.parse() else { continue };
        let name = name.to_owned();
        found.push(Found { number, name, path, complete });
    }
    found.sort_by_key(|found| found.number);
    Ok(found)
}

fn base(number: i32, name: &str) -> String {
    format!("{number:08}.{name}")
}

fn check_name(name: &str) -> Result<(), Failure> {
    let bad = name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || name.ends_with(PARTIAL)
        || name.contains(['/', '\0']);
    match bad {
        false => Ok(()),
        true => Err(Failure::usage(format!(
            "{name:?} cannot name an output: take 1 to {NAME_BYTES_MAX} bytes without a slash"
        ))),
    }
}

fn dir() -> Result<&'static Path, Failure> {
    Settings::get()?.dir.as_deref().ok_or_else(|| {
        Failure::usage("set BLOBCR_MPI_DIR to a directory on a disk of this machine")
    })
}

fn sync(path: &Path) -> Result<(), Failure> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|e| Failure::io(&format!("cannot sync {}", path.display()), &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_listed_by_number_and_old_ones_removed() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["00000003.c", "00000001.a", "00000002.b.x", "00000004.d.partial", "other", "x.y"]
        {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let names = || -> Vec<String> {
            let found = list(dir.path()).unwrap();
            found.iter().map(|f| format!("{} {} {}", f.number, f.name, f.complete)).collect()
        };
        assert_eq!(names(), ["1 a true", "2 b.x true", "3 c true", "4 d false"]);
        keep(dir.path(), [4, 3]);
        assert_eq!(names(), ["3 c true"]);
        assert!(dir.path().join("other").exists());
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        check_name("step-100").unwrap();
        for bad in ["", "a/b", "x.partial", &"x".repeat(64)] {
            check_name(bad).unwrap_err();
        }
    }
}
