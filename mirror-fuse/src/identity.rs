//! Whose a mirror's directory is: an exclusive lock, and an identity that stays with it.
//!
//! ```text
//! offset  bytes  file `identity`
//!      0      4  magic "BCMI"
//!      4      4  version, 1
//!      8     16  the identity: random, made with the directory
//!     24      4  CRC-32C of bytes 0..24
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use blobcr_proto::codec::crc32c;
use rustix::fs::{FlockOperation, flock};

const MAGIC: [u8; 4] = *b"BCMI";
const VERSION: u32 = 1;
const LEN: usize = 28;
const CRC_AT: usize = 24;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Another mirror runs on it.
    #[error("another mirror runs on {0}; stop it first, or use another directory")]
    Locked(PathBuf),
    /// The identity is not readable.
    #[error(
        "the file {0} is damaged: the disks of this mirror can no longer prove that their \
         checkpoint images are theirs; restore the file from a backup"
    )]
    Damaged(PathBuf),
    /// The host's file system fails.
    #[error("cannot use the directory {path}: {source}")]
    Io {
        /// What was used.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A mirror's directory, locked until this is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Directory {
    lock: File,
    identity: u128,
}

pub(crate) fn encode(identity: u128) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..CRC_AT].copy_from_slice(&identity.to_be_bytes());
    let crc = crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

pub(crate) fn decode(bytes: &[u8]) -> Option<u128> {
    let identity = bytes.get(8..CRC_AT)?.try_into().ok().map(u128::from_be_bytes)?;
    (encode(identity) == bytes).then_some(identity)
}

/// Makes a directory and its parents, so that it survives the host.
pub(crate) fn make_durable(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

impl Directory {
    /// Locks `dir`, which is made if it is not there, and reads or makes its identity.
    pub(crate) fn open(dir: &Path) -> Result<Self, DirectoryError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| DirectoryError::Io { path, source }
        };
        make_durable(dir).map_err(failed(dir))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(failed(&lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => DirectoryError::Locked(dir.to_owned()),
            error => failed(&lock_path)(error.into()),
        })?;
        let path = dir.join("identity");
        let identity = match std::fs::read(&path) {
            Ok(bytes) => decode(&bytes).ok_or_else(|| DirectoryError::Damaged(path.clone()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let identity = rand::random();
                write_new(&path, &encode(identity)).map_err(failed(&path))?;
                identity
            }
            Err(error) => return Err(failed(&path)(error)),
        };
        Ok(Self { lock, identity })
    }

    /// Lets another mirror have it. Explicitly, because closing the file is not enough while a child
    /// process that was just forked has not yet closed its copy.
    pub(crate) fn unlock(&self) {
        if let Err(error) = flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!(%error, "the mirror's directory stays locked until the process ends");
        }
    }

    /// Names the mirror towards the repository.
    pub(crate) fn writer(&self) -> String {
        format!("mirror-{:032x}", self.identity)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_of_version_1_does_not_change() {
        let bytes = encode(0x0011_2233_4455_6677_8899_AABB_CCDD_EEFF);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../golden/identity-v1.hex").trim());
        for bit in 0..LEN * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad), None);
        }
        assert_eq!(decode(&bytes[..LEN - 1]), None);
    }

    #[test]
    fn one_mirror_at_a_time_and_always_the_same_identity() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/er");
        let first = Directory::open(&dir).unwrap();
        let error = Directory::open(&dir).unwrap_err();
        assert!(matches!(error, DirectoryError::Locked(_)), "{error}");
        let writer = first.writer();
        drop(first);
        assert_eq!(Directory::open(&dir).unwrap().writer(), writer);
        std::fs::write(dir.join("identity"), "rubbish").unwrap();
        let error = Directory::open(&dir).unwrap_err();
        assert!(matches!(error, DirectoryError::Damaged(_)), "{error}");
    }
}
