//! The directory of a metadata service: who uses it, and what format it has.
//!
//! ```text
//! DIR/LOCK      locked by the process that uses the directory; holds its id
//! DIR/FORMAT    one line of `format`: "sled", or "moved" and where its records are now
//! DIR/sled/     the store
//! DIR/sled.new/ only while the directory is being made: tells that from a store that was lost
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::format::{self, LINE_BYTES_MAX, LineError, VERSION};

const STORE: &str = "sled";
const STORE_NEW: &str = "sled.new";
/// What the FORMAT file of a directory begins with whose records were moved.
const MOVED: &str = "moved ";

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A file could not be made, read or synced.
    #[error("cannot use the metadata directory {}: {path}: {source}", dir.display(), path = path.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process uses it.
    #[error(
        "the metadata directory {} is in use{}; stop that process, or give this one a directory \
         of its own", dir.display(), by(.pid)
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// The other process, when it left its id.
        pid: Option<u32>,
    },
    /// It was made by a newer program.
    #[error(
        "the metadata directory {} has format {version}, and this program reads up to {VERSION}; \
         use the program that wrote it, or a newer one", dir.display()
    )]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        version: u32,
    },
    /// Its records were moved, so it must not be used any more.
    #[error(
        "the records of the metadata directory {} were moved to {to}; start the metadata server \
         with --store {to}", dir.display()
    )]
    Moved {
        /// The directory.
        dir: PathBuf,
        /// Where they are now.
        to: String,
    },
    /// There is no store to move.
    #[error("there is no metadata store in {}; name the directory of `blobcr metadata`", dir.display())]
    Absent {
        /// The directory.
        dir: PathBuf,
    },
    /// It is not what it should be.
    #[error("the metadata directory {} is damaged: {detail}; restore it from a copy", dir.display())]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

fn by(pid: &Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" by process {pid}"))
}

/// A directory that this process alone uses, until it is dropped.
#[derive(Debug)]
pub struct Directory {
    dir: PathBuf,
    moved: bool,
    // Keeps the lock; the kernel lets go of it when the process dies.
    _lock: File,
}

impl Directory {
    /// Takes a directory, which is made when it is not there.
    ///
    /// # Errors
    /// See [`DirectoryError`].
    pub fn open(dir: &Path) -> Result<Self, DirectoryError> {
        match Self::take(dir)? {
            (directory, None) => Ok(directory),
            (_, Some(to)) => Err(DirectoryError::Moved { dir: dir.to_owned(), to }),
        }
    }

    /// Takes a directory whose records are to be moved to `to`, or were.
    ///
    /// # Errors
    /// See [`DirectoryError`]; when they were moved to somewhere else.
    pub fn open_to_move(dir: &Path, to: &str) -> Result<Self, DirectoryError> {
        if !dir.join("FORMAT").exists() {
            return Err(DirectoryError::Absent { dir: dir.to_owned() });
        }
        match Self::take(dir)? {
            (directory, None) => Ok(directory),
            (directory, Some(already)) if already == to => Ok(Self { moved: true, ..directory }),
            (_, Some(to)) => Err(DirectoryError::Moved { dir: dir.to_owned(), to }),
        }
    }

    /// Whether the records were moved before.
    #[must_use]
    pub const fn is_moved(&self) -> bool {
        self.moved
    }

    /// From now on the directory is refused: its records are at `to`. Its store stays as it is.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn mark_moved(&self, to: &str) -> Result<(), DirectoryError> {
        let path = self.dir.join("FORMAT");
        write_format(&self.dir, &path, &format!("{MOVED}{to}"))
            .map_err(|source| DirectoryError::Io { dir: self.dir.clone(), path, source })
    }

    /// Locks a directory and reads what it is; also where its records were moved to.
    fn take(dir: &Path) -> Result<(Self, Option<String>), DirectoryError> {
        let io = |path: &Path| {
            let (dir, path) = (dir.to_owned(), path.to_owned());
            move |source| DirectoryError::Io { dir: dir.clone(), path: path.clone(), source }
        };
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let path = dir.join("LOCK");
        let lock = lock(dir, &path, io(&path))?;
        let path = dir.join("FORMAT");
        let store = dir.join(STORE);
        let new = dir.join(STORE_NEW);
        let damaged = |detail: &str| {
            Err(DirectoryError::Damaged { dir: dir.to_owned(), detail: detail.to_owned() })
        };
        match read_format(&path).map_err(io(&path))? {
            Some(line) => {
                if let Some(to) = check_format(dir, &line)? {
                    return Ok((Self { dir: dir.to_owned(), moved: false, _lock: lock }, Some(to)));
                }
            }
            None if store.exists() => return damaged("there is a store but no FORMAT file"),
            None => {
                std::fs::create_dir_all(&new).map_err(io(&new))?;
                write_format(dir, &path, STORE).map_err(io(&path))?;
            }
        }
        if !store.exists() {
            if !new.exists() {
                return damaged("its store is gone");
            }
            std::fs::rename(&new, &store).map_err(io(&store))?;
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(io(dir))?;
        }
        Ok((Self { dir: dir.to_owned(), moved: false, _lock: lock }, None))
    }

    /// Where the store is.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.dir.join(STORE)
    }
}

fn lock(
    dir: &Path,
    path: &Path,
    io: impl Fn(io::Error) -> DirectoryError,
) -> Result<File, DirectoryError> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let mut file = open.map_err(&io)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let read = file.take(32).read_to_string(&mut text);
            let pid = read.ok().and_then(|_| text.trim().parse().ok());
            return Err(DirectoryError::InUse { dir: dir.to_owned(), pid });
        }
        Err(errno) => return Err(io(errno.into())),
    }
    file.set_len(0).map_err(&io)?;
    file.rewind().map_err(&io)?;
    writeln!(file, "{}", std::process::id()).map_err(&io)?;
    Ok(file)
}

fn read_format(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match File::open(path) {
        Ok(file) => {
            let mut line = Vec::new();
            file.take(LINE_BYTES_MAX as u64).read_to_end(&mut line)?;
            Ok(Some(line))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where the records of a directory were moved to, when they were.
fn check_format(dir: &Path, line: &[u8]) -> Result<Option<String>, DirectoryError> {
    let damaged = |detail: String| Err(DirectoryError::Damaged { dir: dir.to_owned(), detail });
    match format::read(line) {
        Ok(STORE) => Ok(None),
        Ok(what) => match what.strip_prefix(MOVED) {
            Some(to) => Ok(Some(to.to_owned())),
            None => damaged("its FORMAT file names another store".to_owned()),
        },
        Err(LineError::Newer(version)) => {
            Err(DirectoryError::Newer { dir: dir.to_owned(), version })
        }
        Err(LineError::Damaged(detail)) => damaged(format!("its FORMAT file {detail}")),
    }
}

/// Writes the FORMAT file so that it is there whole or not at all, whenever the power fails.
fn write_format(dir: &Path, path: &Path, what: &str) -> io::Result<()> {
    let new = dir.join("FORMAT.new");
    let mut file = File::create(&new)?;
    file.write_all(format::line(what).as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(dir)?.sync_all()?;
    match dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> String {
        Directory::open(dir).unwrap_err().to_string()
    }

    #[test]
    fn a_second_user_is_refused_by_name_and_let_in_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let first = Directory::open(dir.path()).unwrap();
        let message = open(dir.path());
        let pid = std::process::id();
        assert!(message.contains(&format!("in use by process {pid}")), "{message}");
        assert!(message.contains(&dir.path().display().to_string()), "{message}");
        drop(first);
        Directory::open(dir.path()).unwrap();
    }

    #[test]
    fn the_format_file_of_version_1_is_known() {
        let dir = tempfile::tempdir().unwrap();
        drop(Directory::open(dir.path()).unwrap());
        let line = std::fs::read_to_string(dir.path().join("FORMAT")).unwrap();
        assert_eq!(line, include_str!("../golden/FORMAT-v1"));
    }

    #[test]
    fn a_directory_that_was_moved_is_refused_and_says_where_to() {
        let dir = tempfile::tempdir().unwrap();
        let to = "etcd:http://127.0.0.1:2379#default";
        let absent = Directory::open_to_move(dir.path(), to).unwrap_err();
        assert!(matches!(absent, DirectoryError::Absent { .. }), "{absent}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");
        drop(Directory::open(dir.path()).unwrap());
        let directory = Directory::open_to_move(dir.path(), to).unwrap();
        assert!(!directory.is_moved());
        assert!(open(dir.path()).contains("in use"));
        directory.mark_moved(to).unwrap();
        drop(directory);
        let line = std::fs::read_to_string(dir.path().join("FORMAT")).unwrap();
        assert_eq!(line, include_str!("../golden/FORMAT-moved-v1"));
        let message = open(dir.path());
        assert!(message.contains("were moved to") && message.contains(to), "{message}");
        assert!(Directory::open_to_move(dir.path(), to).unwrap().is_moved());
        let elsewhere = Directory::open_to_move(dir.path(), "etcd:http://other:1#default");
        assert!(matches!(elsewhere, Err(DirectoryError::Moved { .. })), "{elsewhere:?}");
    }

    #[test]
    fn a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("FORMAT"), format::line_of(2, STORE)).unwrap();
        let message = open(dir.path());
        assert!(message.contains("has format 2") && message.contains("newer one"), "{message}");
    }

    #[test]
    fn a_damaged_format_file_is_refused() {
        let good = format::line(STORE).into_bytes();
        for at in 0..good.len() {
            let dir = tempfile::tempdir().unwrap();
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(dir.path().join("FORMAT"), bad).unwrap();
            let message = open(dir.path());
            assert!(message.contains("damaged"), "byte {at}: {message}");
        }
        for bad in ["", "\n", "blobcr-metadata", &"x".repeat(1000)] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("FORMAT"), bad).unwrap();
            assert!(open(dir.path()).contains("damaged"), "{bad:?}");
        }
    }

    #[test]
    fn a_store_that_is_gone_is_not_taken_for_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        drop(Directory::open(dir.path()).unwrap());
        drop(Directory::open(dir.path()).unwrap());
        std::fs::remove_dir_all(dir.path().join(STORE)).unwrap();
        let message = open(dir.path());
        assert!(message.contains("its store is gone"), "{message}");
    }

    #[test]
    fn a_directory_whose_making_was_interrupted_is_made() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(STORE_NEW)).unwrap();
        drop(Directory::open(dir.path()).unwrap());
        std::fs::rename(dir.path().join(STORE), dir.path().join(STORE_NEW)).unwrap();
        drop(Directory::open(dir.path()).unwrap());
        assert!(dir.path().join(STORE).exists() && !dir.path().join(STORE_NEW).exists());
    }

    #[test]
    fn a_store_without_a_format_file_is_not_taken_for_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(STORE)).unwrap();
        assert!(open(dir.path()).contains("no FORMAT file"));
    }
}
