//! A directory of a real file system.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::{FallocateFlags, FlockOperation};

use super::direct::{self, Buffer, Direct};
use super::{Disk, DiskFile, Space};

/// The file whose lock says that a process has the directory.
const LOCK_NAME: &str = "lock";

/// What the kernel takes in one `pwritev` (UIO_MAXIOV).
const PIECES_PER_WRITE_MAX: usize = 1024;

/// A directory that this process alone has, until the value is dropped.
#[derive(Debug)]
pub struct RealDisk {
    dir: PathBuf,
    handle: File,
    buffer: Buffer,
    _lock: File,
}

/// Why a directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error(
        "{dir} is in use by another repo-node ({holder}): stop that process, or choose another \
         directory"
    )]
    Held {
        /// The directory.
        dir: PathBuf,
        /// What the lock file says of its holder.
        holder: String,
    },
    /// It cannot be made, read or locked.
    #[error("cannot {what} {path}: {source}; check that the directory exists and is writable")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl RealDisk {
    /// Takes `dir`, creating it when it is not there.
    ///
    /// # Errors
    /// When another process has it, or it cannot be made or written.
    pub fn open(dir: &Path) -> Result<Self, LockError> {
        let fail = |what, path: &Path| {
            let path = path.to_owned();
            move |source| LockError::Io { what, path, source }
        };
        std::fs::create_dir_all(dir).map_err(fail("create", dir))?;
        let path = dir.join(LOCK_NAME);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(fail("open", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                (&lock).take(64).read_to_string(&mut holder).map_err(fail("read", &path))?;
                return Err(LockError::Held { dir: dir.to_owned(), holder });
            }
            Err(error) => return Err(fail("lock", &path)(error.into())),
        }
        lock.set_len(0).map_err(fail("write", &path))?;
        write!(lock, "process {}", std::process::id()).map_err(fail("write", &path))?;
        let handle = File::open(dir).map_err(fail("open", dir))?;
        Ok(Self { dir: dir.to_owned(), handle, buffer: Buffer::default(), _lock: lock })
    }

    fn file(&self, name: &str, how: &OpenOptions) -> io::Result<Arc<dyn DiskFile>> {
        let cached = how.open(self.dir.join(name))?;
        Ok(Arc::new(RealFile { cached, direct: OnceLock::new(), buffer: self.buffer.clone() }))
    }
}

impl Disk for RealDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.file(name, OpenOptions::new().read(true).write(true).create_new(true))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.file(name, OpenOptions::new().read(true).write(true))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let stat = rustix::fs::fstatvfs(&self.handle)?;
        Ok(Space {
            capacity: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

/// A file.
#[derive(Debug)]
struct RealFile {
    cached: File,
    /// Open once more, from the first large write on, where such can pass by the page cache: of most
    /// files a node only reads.
    direct: OnceLock<Option<Direct>>,
    buffer: Buffer,
}

impl DiskFile for RealFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.cached.metadata()?.len())
    }

    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            match rustix::io::pread(&self.cached, rustix::buffer::spare_capacity(&mut bytes), at) {
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    fn write_at(&self, mut offset: u64, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        if let Some((before, large)) = Direct::part(offset, len)
            && let Some(direct) = self.direct.get_or_init(|| Direct::of(&self.cached, &self.buffer))
        {
            let mut head = [0; direct::BLOCK as usize];
            direct::take(&mut pieces, &mut head[..before]);
            self.cached.write_all_at(&head[..before], offset)?;
            offset += before as u64;
            direct.write(&self.cached, offset, large, &mut pieces)?;
            offset += large;
        }
        while !pieces.is_empty() {
            let now = pieces.len().min(PIECES_PER_WRITE_MAX);
            match rustix::io::pwritev(&self.cached, &pieces[..now], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut pieces, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.cached.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.cached.set_len(len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        rustix::fs::fallocate(&self.cached, FallocateFlags::empty(), 0, len).map_err(Into::into)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Below `parent`: appends of all lengths and cuts, as the store does them, and single blocks over
    /// what is there.
    fn writes_and_reads_back(parent: &Path) {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let disk = RealDisk::open(dir.path()).unwrap();
        let file = disk.create("file").unwrap();
        let mut random = rand::rngs::StdRng::seed_from_u64(7);
        let mut model: Vec<u8> = Vec::new();
        for round in 0..200 {
            let at = match round % 10 {
                8 => random.random_range(0..=model.len()),
                9 => {
                    let cut = random.random_range(0..=model.len());
                    file.truncate(cut as u64).unwrap();
                    model.truncate(cut);
                    cut
                }
                _ => model.len(),
            };
            let most = if random.random_ratio(1, 8) { 3 << 20 } else { 300 << 10 };
            let mut bytes = vec![0; random.random_range(1..most)];
            random.fill(&mut bytes[..]);
            let parts = [random.random_range(0..=bytes.len()), bytes.len()];
            let mut pieces = [
                IoSlice::new(&bytes[..parts[0] / 2]),
                IoSlice::new(&bytes[parts[0] / 2..parts[0]]),
                IoSlice::new(&bytes[parts[0]..]),
            ];
            file.write_at(at as u64, &mut pieces).unwrap();
            model.resize(model.len().max(at + bytes.len()), 0);
            model[at..at + bytes.len()].copy_from_slice(&bytes);
            if round % 16 == 0 {
                file.sync().unwrap();
                assert!(file.read_at(0, model.len() + 1).unwrap() == model, "round {round}");
            }
        }
        assert!(disk.open("file").unwrap().read_at(0, model.len() + 1).unwrap() == model);
    }

    /// A node has thousands of segments open.
    #[test]
    fn a_file_is_open_once_until_it_gets_a_large_write() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(dir.path()).unwrap();
        let path = dir.path().canonicalize().unwrap().join("file");
        let open = || {
            let all = std::fs::read_dir("/proc/self/fd").unwrap();
            let targets = all.filter_map(|one| std::fs::read_link(one.ok()?.path()).ok());
            targets.filter(|target| *target == path).count()
        };
        let file = disk.create("file").unwrap();
        file.write_at(0, &mut [IoSlice::new(&[1; 4096])]).unwrap();
        assert_eq!(open(), 1);
        file.write_at(4096, &mut [IoSlice::new(&[2; 1 << 20])]).unwrap();
        let possible = Direct::of(&File::open(&path).unwrap(), &Buffer::default()).is_some();
        assert_eq!(open(), 1 + usize::from(possible));
        drop(file);
        let file = disk.open("file").unwrap();
        assert_eq!(file.read_at(0, 2 << 20).unwrap().len(), 4096 + (1 << 20));
        assert_eq!(open(), 1);
    }

    #[test]
    fn large_and_small_writes_are_one_file() {
        writes_and_reads_back(&std::env::temp_dir());
    }

    #[test]
    fn a_file_system_in_memory_does_as_well() {
        writes_and_reads_back(Path::new("/dev/shm"));
    }
}
