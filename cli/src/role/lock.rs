//! One `blobcr up` per directory.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};

use crate::exit::{Exit, Refusal};

/// A directory that this process alone uses; given back when it ends, however it ends.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

/// A process id is shorter.
const PID_BYTES_MAX: u64 = 32;

impl DirLock {
    /// Takes `dir`, which is made if it is missing.
    ///
    /// # Errors
    /// When another process has it, or it cannot be written.
    pub fn take(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join("lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(in_use(dir, &file).into()),
            Err(e) => return Err(io::Error::from(e).into()),
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { _file: file })
    }
}

fn in_use(dir: &Path, file: &File) -> Refusal {
    let mut pid = String::new();
    let read = file.take(PID_BYTES_MAX).read_to_string(&mut pid);
    let by = match (read, pid.trim()) {
        (Ok(_), pid) if !pid.is_empty() => format!(" (process {pid})"),
        _ => String::new(),
    };
    let message =
        format!("another blobcr{by} uses {}; stop it, or give another --dir", dir.display());
    Refusal::new(Exit::Conflict, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        let lock = DirLock::take(&dir).unwrap();
        let refusal = DirLock::take(&dir).unwrap_err();
        assert_eq!(crate::exit::code(&refusal), Exit::Conflict);
        assert!(refusal.to_string().contains(&std::process::id().to_string()));
        drop(lock);
        DirLock::take(&dir).unwrap();
    }
}
