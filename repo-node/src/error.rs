//! What can go wrong with a store, and what to do about it.

use std::io;
use std::sync::Arc;

use blobcr_proto::record::RecordError;

use crate::disk::LockError;
use crate::format::FormatError;

/// Why a store did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file cannot be read or written.
    #[error("cannot {what} {file} of the chunk store: {source}; mend the disk and start again")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file cannot be used as it is.
    #[error("{file} of the chunk store cannot be used: {source}")]
    Format {
        /// Which file.
        file: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The store's thread cannot be started.
    #[error("cannot start a thread of the chunk store: {0}; raise the limit of processes")]
    Thread(io::Error),
}

/// Why an operation was refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No room. Reads, deletes and what is already held go on; writes will when there is room.
    #[error(
        "the disk is full: {free} bytes are free and {reserve} are kept for deletes and \
         compaction; add space to this node's file system"
    )]
    Full {
        /// Free bytes of the file system.
        free: u64,
        /// Bytes that are kept free.
        reserve: u64,
    },
    /// A write or sync failed: nothing is known any more about what the disk holds of what was
    /// written last. Reads go on.
    #[error("the chunk store takes no more writes since {cause}; restart the node to recover")]
    Poisoned {
        /// What failed.
        cause: Arc<str>,
    },
    /// The record is not what it says it is.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The request is outside the limits.
    #[error("{0}")]
    Refused(String),
    /// The store is being closed.
    #[error("the node is shutting down")]
    Closed,
    /// The disk failed in a read of the store's own files.
    #[error("cannot {what}: {source}; check the disk")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
}
