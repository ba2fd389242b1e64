//! Why a mirror did not do what it was asked.

use std::io;
use std::path::PathBuf;

use blobcr_proto::name::NameError;
use blobcr_repository::CatalogError;
use tokio::task::JoinError;

use crate::disk::DiskError;
use crate::identity::DirectoryError;
use crate::mount::MountError;

/// Why a mirror did not do what it was asked. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Nothing can be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A file of the mirror cannot be used.
    #[error("the mirror cannot use {path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No name for a disk.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is no such disk on this host.
    #[error("there is no disk {0} on this host; `blobcr disk list` shows those that there are")]
    NoDisk(String),
    /// The name is taken.
    #[error("there is a disk {0} on this host already; choose another name, or detach it first")]
    Exists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The state of the disk or snapshot forbids it.
    #[error("{0}")]
    Precondition(String),
    /// The mirror is stopping.
    #[error("the mirror is stopping; ask again when it has been started")]
    Stopping,
    /// A disk did not do its part.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The catalog did not do its part.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A task of the mirror ended by a fault of its own.
    #[error("internal fault: {0}; the log has more")]
    Fault(#[from] JoinError),
}
