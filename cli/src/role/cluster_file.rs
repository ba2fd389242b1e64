//! `DIR/cluster`: the repository that a node belongs to, so that it serves no other.
//!
//! One line: `blobcr-cluster`, the version, the repository's id, CRC-32C of the three in hex.
//! Directories without it are those of new nodes, and of nodes that a version before this one made.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use blobcr_proto::codec::crc32c;

const FILE_NAME: &str = "cluster";
const MAGIC: &str = "blobcr-cluster";
const VERSION: u32 = 1;
/// Characters of an id: 128 bits in hex.
const ID_LEN: usize = 32;
/// The file is one short line; what is longer is not ours.
const BYTES_MAX: u64 = 256;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterFileError {
    /// It cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A newer program wrote it.
    #[error("{} has version {version}, newer than {VERSION}: upgrade this program", path.display())]
    Newer { path: PathBuf, version: u32 },
    /// It is not what it should be.
    #[error(
        "{} is damaged; when you are sure that the node belongs to this repository, remove the file \
         and start the node again", path.display()
    )]
    Damaged { path: PathBuf },
}

fn line(version: u32, id: &str) -> String {
    let text = format!("{MAGIC} {version} {id}");
    format!("{text} {:08x}\n", crc32c(text.as_bytes()))
}

/// The repository that the node in `dir` belongs to; `None` when it has not been told.
///
/// # Errors
/// When the file is there and cannot be read.
pub(crate) fn read(dir: &Path) -> Result<Option<String>, ClusterFileError> {
    let path = dir.join(FILE_NAME);
    let mut text = Vec::new();
    match File::open(&path).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut text)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ClusterFileError::Io { path, source }),
        Ok(_) => {}
    }
    let text = String::from_utf8(text).unwrap_or_default();
    let fields: Vec<&str> = text.split(' ').collect();
    let [MAGIC, version, id, _] = fields.as_slice() else {
        return Err(ClusterFileError::Damaged { path });
    };
    match version.parse() {
        Ok(version) if line(version, id) != text => Err(ClusterFileError::Damaged { path }),
        Ok(VERSION) if id.len() == ID_LEN => Ok(Some((*id).to_owned())),
        Ok(version) if version > VERSION => Err(ClusterFileError::Newer { path, version }),
        _ => Err(ClusterFileError::Damaged { path }),
    }
}

/// Keeps the repository's id. On return it is durable.
///
/// # Errors
/// When the directory cannot be written.
pub(crate) fn write(dir: &Path, id: &str) -> Result<(), ClusterFileError> {
    let path = dir.join(FILE_NAME);
    // Written first and then renamed, so that a crash leaves no half of it.
    let new = dir.join("cluster.new");
    let written = File::create(&new)
        .and_then(|mut file| {
            file.write_all(line(VERSION, id).as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&new, &path))
        .and_then(|()| File::open(dir)?.sync_all());
    written.map_err(|source| ClusterFileError::Io { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn what_is_written_is_read_and_looks_as_version_1_did() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
        write(dir.path(), ID).unwrap();
        assert_eq!(read(dir.path()).unwrap().as_deref(), Some(ID));
        let golden = include_str!("../../golden/cluster-v1");
        assert_eq!(fs::read_to_string(dir.path().join(FILE_NAME)).unwrap(), golden);
    }

    #[test]
    fn whatever_else_is_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |text: &[u8]| {
            fs::write(dir.path().join(FILE_NAME), text).unwrap();
            read(dir.path()).unwrap_err().to_string()
        };
        let good = line(VERSION, ID);
        for at in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1;
            assert!(refused(&bad).contains("damaged"), "byte {at}");
        }
        for bad in ["", "\n", "x", &"x".repeat(1000), &line(1, "short"), &line(0, ID)] {
            assert!(refused(bad.as_bytes()).contains("damaged"), "{bad:?}");
        }
        assert!(refused(line(2, ID).as_bytes()).contains("version 2, newer"));
    }
}
