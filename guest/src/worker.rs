//! A computation that can be checked after a restart; for the demo and the tests.
//!
//! Each step hashes the one before, writes a file of its own, appends a line to a log and replaces
//! the state file, each of them synced in this order. All of it follows from the number of the step
//! alone, so whatever is found on a disk later can be compared with an undisturbed computation.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use blobcr_proto::Hash;

use crate::error::GuestError;
use crate::flush::sync_file_and_dir;

const MAGIC: &str = "blobcr-worker";
const VERSION: u32 = 1;
/// A state file is one line of about 120 bytes.
const STATE_BYTES_MAX: u64 = 4096;

/// What the computation has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// The hash of the last one.
    pub hash: Hash,
}

impl State {
    /// Before the first step.
    #[must_use]
    pub fn first() -> Self {
        Self { step: 0, hash: Hash::of(MAGIC.as_bytes()) }
    }

    /// After one step more.
    #[must_use]
    pub fn next(&self) -> Self {
        let step = self.step + 1;
        let mut input = [0; 40];
        input[..32].copy_from_slice(&self.hash.to_bytes());
        input[32..].copy_from_slice(&step.to_le_bytes());
        Self { step, hash: Hash::of(&input) }
    }

    /// What an undisturbed computation has come to after so many steps.
    #[must_use]
    pub fn after(steps: u64) -> Self {
        (0..steps).fold(Self::first(), |state, _| state.next())
    }

    /// The contents of the step's own file.
    #[must_use]
    pub fn file(&self, bytes: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes + 32);
        let mut block = self.hash;
        while out.len() < bytes {
            block = Hash::of(&block.to_bytes());
            out.extend_from_slice(&block.to_bytes());
        }
        out.truncate(bytes);
        out
    }

    fn line(&self) -> String {
        format!("{} {}", self.step, self.hash)
    }

    fn encode(&self) -> String {
        let text = format!("{MAGIC} {VERSION} {}", self.line());
        format!("{text} {:016x}\n", Hash::of(text.as_bytes()).prefix())
    }

    fn decode(text: &str) -> Result<Self, String> {
        let (head, check) =
            text.strip_suffix('\n').and_then(|l| l.rsplit_once(' ')).ok_or("it is cut short")?;
        let fields: Vec<&str> = head.split(' ').collect();
        let [magic, version, step, hash] = fields[..] else {
            return Err("it has not the fields of a state".to_owned());
        };
        if magic != MAGIC {
            return Err("it is no state of a worker".to_owned());
        }
        if version.parse() != Ok(VERSION) {
            return Err(format!("it is of version {version}"));
        }
        if check != format!("{:016x}", Hash::of(head.as_bytes()).prefix()) {
            return Err("its checksum is wrong".to_owned());
        }
        let step = step.parse().map_err(|_| "its step is no number")?;
        let bytes: Option<Vec<u8>> = (0..32)
            .map(|i| hash.get(2 * i..2 * i + 2).and_then(|h| u8::from_str_radix(h, 16).ok()))
            .collect();
        let hash = bytes
            .filter(|_| hash.len() == 64)
            .and_then(|b| Hash::from_slice(&b))
            .ok_or("its hash is none")?;
        Ok(Self { step, hash })
    }
}

/// Where and how much a worker writes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its directory; made when it is not there.
    pub dir: PathBuf,
    /// Bytes of each step's own file.
    pub file_bytes: usize,
    /// How many of those files are kept; older ones are removed.
    pub keep: u64,
}

/// What was found in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Steps done before; 0 for a fresh start.
    pub step: u64,
    /// The highest step that has a file of its own; 0 without any.
    pub newest_file: u64,
    /// Files of steps that the state does not know yet.
    pub files_beyond: u64,
    /// Lines of the log.
    pub log_lines: u64,
    /// Everything that differs from an undisturbed computation; empty when nothing does.
    pub differences: Vec<String>,
}

/// The computation.
pub struct Worker {
    options: Options,
    state: State,
    log: File,
}

impl Worker {
    /// Resumes from the state file, or starts anew without one, and compares everything that is
    /// there with an undisturbed computation.
    ///
    /// # Errors
    /// When the state file is damaged or a file cannot be used.
    pub fn open(options: Options) -> Result<(Self, Found), GuestError> {
        let dir = &options.dir;
        fs::create_dir_all(dir).map_err(GuestError::io("create the directory", dir))?;
        let state = read_state(&dir.join("state"))?;
        let (found, log_bytes) = inspect(&options, state)?;
        let path = dir.join("log");
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(GuestError::io("open", &path))?;
        // Lines of steps that will be done again.
        log.set_len(log_bytes).map_err(GuestError::io("cut", &path))?;
        sync_file_and_dir(&log, dir).map_err(GuestError::io("sync", &path))?;
        Ok((Self { options, state, log }, found))
    }

    /// What the computation has come to.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Does one step; all that it wrote is on the disk when this returns.
    ///
    /// # Errors
    /// When something cannot be written.
    pub fn step(&mut self) -> Result<State, GuestError> {
        let dir = &self.options.dir;
        let next = self.state.next();
        let path = file_path(dir, next.step);
        let data = next.file(self.options.file_bytes);
        write_synced(dir, &path, &data).map_err(GuestError::io("write", &path))?;
        let path = dir.join("log");
        writeln!(self.log, "{}", next.line())
            .and_then(|()| self.log.sync_data())
            .map_err(GuestError::io("append to", &path))?;
        let (beside, path) = (dir.join("state.new"), dir.join("state"));
        write_synced(dir, &beside, next.encode().as_bytes())
            .and_then(|()| fs::rename(&beside, &path))
            .and_then(|()| File::open(dir)?.sync_all())
            .map_err(GuestError::io("replace", &path))?;
        if let Some(old) = next.step.checked_sub(self.options.keep) {
            let path = file_path(dir, old);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(GuestError::io("remove", &path)(e));
                }
                _ => {}
            }
        }
        self.state = next;
        Ok(next)
    }
}

fn write_synced(dir: &Path, path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(data)?;
    sync_file_and_dir(&file, dir)
}

fn file_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:010}"))
}

fn read_state(path: &Path) -> Result<State, GuestError> {
    let damaged = |detail: String| GuestError::BadState { path: path.to_owned(), detail };
    match fs::metadata(path) {
        Ok(meta) if meta.len() > STATE_BYTES_MAX => return Err(damaged("it is too long".into())),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(State::first()),
        Err(e) => return Err(GuestError::io("look at", path)(e)),
    }
    let bytes = fs::read(path).map_err(GuestError::io("read", path))?;
    let text = String::from_utf8(bytes).map_err(|_| damaged("it is no text".into()))?;
    State::decode(&text).map_err(damaged)
}

/// Compares the directory with an undisturbed computation; also tells the length of the log up to
/// and with the line of the state's step.
fn inspect(options: &Options, state: State) -> Result<(Found, u64), GuestError> {
    let mut found = Found {
        step: state.step,
        newest_file: 0,
        files_beyond: 0,
        log_lines: 0,
        differences: Vec::new(),
    };
    let mut undisturbed = State::first();
    let mut log = LogReader::open(&options.dir.join("log"))?;
    let mut log_bytes = 0;
    while undisturbed.step < state.step {
        undisturbed = undisturbed.next();
        match log.line()? {
            Some(line) if line == undisturbed.line() => log_bytes = log.bytes,
            line => found.differences.push(format!(
                "line {} of the log is {line:?}, not {:?}",
                undisturbed.step,
                undisturbed.line()
            )),
        }
        let path = file_path(&options.dir, undisturbed.step);
        let kept = undisturbed.step + options.keep > state.step;
        match fs::read(&path) {
            Ok(data) if data == undisturbed.file(data.len()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound && !kept => {}
            Ok(_) => found.differences.push(format!("the contents of {}", path.display())),
            Err(e) => found.differences.push(format!("{}: {e}", path.display())),
        }
    }
    if undisturbed != state {
        found
            .differences
            .push(format!("the state's hash is {}, not {}", state.hash, undisturbed.hash));
    }
    while log.line()?.is_some() {}
    found.log_lines = log.lines;
    for entry in fs::read_dir(&options.dir).map_err(GuestError::io("list", &options.dir))? {
        let name = entry.map_err(GuestError::io("list", &options.dir))?.file_name();
        let step = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse().ok());
        if let Some(step) = step {
            found.newest_file = found.newest_file.max(step);
            found.files_beyond += u64::from(step > state.step);
        }
    }
    Ok((found, log_bytes))
}

struct LogReader {
    path: PathBuf,
    file: Option<BufReader<File>>,
    lines: u64,
    bytes: u64,
}

impl LogReader {
    fn open(path: &Path) -> Result<Self, GuestError> {
        let file = match File::open(path) {
            Ok(file) => Some(BufReader::new(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(GuestError::io("open", path)(e)),
        };
        Ok(Self { path: path.to_owned(), file, lines: 0, bytes: 0 })
    }

    fn line(&mut self) -> Result<Option<String>, GuestError> {
        let Some(file) = &mut self.file else { return Ok(None) };
        let mut line = Vec::new();
        let bytes =
            file.read_until(b'\n', &mut line).map_err(GuestError::io("read", &self.path))?;
        if bytes == 0 {
            return Ok(None);
        }
        self.lines += 1;
        self.bytes += bytes as u64;
        Ok(Some(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path) -> Options {
        Options { dir: dir.to_owned(), file_bytes: 100, keep: 4 }
    }

    #[test]
    fn golden_state_of_version_1() {
        let golden = include_str!("../golden/worker-state-v1.txt");
        assert_eq!(State::after(3).encode(), golden);
        assert_eq!(State::decode(golden).unwrap(), State::after(3));
    }

    #[test]
    fn damaged_states_are_refused() {
        let good = State::after(3).encode();
        for at in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1;
            assert!(State::decode(&String::from_utf8(bad).unwrap()).is_err(), "byte {at}");
            assert!(State::decode(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_computation_goes_on_where_it_was_and_is_the_undisturbed_one() {
        let dir = tempfile::tempdir().unwrap();
        let (mut worker, found) = Worker::open(options(dir.path())).unwrap();
        assert_eq!((found.step, found.newest_file, found.log_lines), (0, 0, 0));
        for _ in 0..10 {
            worker.step().unwrap();
        }
        drop(worker);
        let (mut worker, found) = Worker::open(options(dir.path())).unwrap();
        assert_eq!(
            found,
            Found {
                step: 10,
                newest_file: 10,
                files_beyond: 0,
                log_lines: 10,
                differences: vec![]
            }
        );
        assert_eq!(worker.step().unwrap(), State::after(11));
        assert!(!file_path(dir.path(), 7).exists() && file_path(dir.path(), 8).exists());
    }

    #[test]
    fn what_differs_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let options = |dir: &Path| Options { keep: 100, ..options(dir) };
        let (mut worker, _) = Worker::open(options(dir.path())).unwrap();
        let old: Vec<_> = (0..6)
            .map(|_| {
                worker.step().unwrap();
                fs::read(dir.path().join("state")).unwrap()
            })
            .collect();
        // As if the state were of an older time than the files.
        fs::write(dir.path().join("state"), &old[4]).unwrap();
        let (_, found) = Worker::open(options(dir.path())).unwrap();
        assert_eq!((found.step, found.newest_file, found.files_beyond), (5, 6, 1));
        assert_eq!((found.log_lines, found.differences.len()), (6, 0));
        let (_, found) = Worker::open(options(dir.path())).unwrap();
        assert_eq!(found.log_lines, 5, "the line to be written again was cut");
        fs::write(file_path(dir.path(), 4), b"other").unwrap();
        fs::remove_file(file_path(dir.path(), 5)).unwrap();
        fs::write(dir.path().join("log"), b"1 x\n").unwrap();
        let (_, found) = Worker::open(options(dir.path())).unwrap();
        assert_eq!(found.differences.len(), 2 + 5, "{:?}", found.differences);
    }
}
