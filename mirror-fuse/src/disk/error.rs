//! What can go wrong with a disk, and what to do about it.

use std::io;

/// Why bytes of the attached snapshot could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BaseError {
    /// The repository was not reached within the configured limit. Trying again later helps.
    #[error("chunk {chunk} of the attached snapshot cannot be fetched: {reason}")]
    Unavailable {
        /// Index of the chunk.
        chunk: u64,
        /// What the repository's client said.
        reason: String,
    },
    /// The repository has lost or damaged the bytes, or refuses to give them.
    #[error(
        "chunk {chunk} of the attached snapshot is lost: {reason}; bring its node back, or restore \
         the node's files"
    )]
    Lost {
        /// Index of the chunk.
        chunk: u64,
        /// What the repository's client said.
        reason: String,
    },
    /// The attached snapshot itself cannot be opened.
    #[error("the attached snapshot cannot be opened: {0}")]
    Open(String),
}

impl BaseError {
    /// Whether the same call may succeed later without anybody mending the data.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// Why the repository did not do what a disk asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    /// Nobody answered in time. Trying again later helps.
    #[error("the repository cannot be reached: {0}")]
    Unavailable(String),
    /// There is no such image or snapshot.
    #[error("{0}")]
    NotFound(String),
    /// The name of the image is taken by somebody else.
    #[error("{0}")]
    AlreadyExists(String),
    /// The repository refuses for good. The text says why.
    #[error("{0}")]
    Refused(String),
}

impl UpstreamError {
    /// Whether the same call may succeed later without anybody doing anything.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// Why a disk did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The request reaches beyond the end of the disk. Nothing was changed.
    #[error("disk {disk}: bytes {offset}+{len} are beyond its end at {size}")]
    OutOfRange {
        /// The disk.
        disk: String,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// The host's file system is full. The request was not carried out, or only in part, as when a
    /// real disk fails a write; nothing else was lost.
    #[error("disk {disk}: no space left on the host for its {file}; free some space and try again")]
    NoSpace {
        /// The disk.
        disk: String,
        /// Which of its files could not grow.
        file: &'static str,
    },
    /// An fsync failed earlier: what the disk holds can no longer be promised.
    #[error(
        "disk {disk} is stopped because an fsync of its {file} failed; check the host's disk and \
         restart the mirror"
    )]
    Poisoned {
        /// The disk.
        disk: String,
        /// Which of its files.
        file: &'static str,
    },
    /// A call to the host's file system failed.
    #[error("disk {disk}: cannot {action} its {file}: {source}")]
    Io {
        /// The disk.
        disk: String,
        /// What was tried.
        action: &'static str,
        /// With which of its files.
        file: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the disk is not what it should be.
    #[error("disk {disk}: its {file} is damaged: {detail}; restore it or detach the disk")]
    Damaged {
        /// The disk.
        disk: String,
        /// Which of its files.
        file: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The specification makes no sense.
    #[error("disk {disk} cannot be made: {detail}")]
    Invalid {
        /// The disk.
        disk: String,
        /// What is wrong.
        detail: String,
    },
    /// There is a disk in the directory already.
    #[error("there is a disk in {0} already")]
    Exists(String),
    /// There is no disk in the directory, or its making was interrupted: it holds no data.
    #[error("there is no disk in {0}")]
    Absent(String),
    /// Another process serves the disk.
    #[error("disk {0} is served by another process; stop that one first")]
    Locked(String),
    /// The disk was stopped.
    #[error("disk {0} is stopped")]
    Stopped(String),
    /// COMMIT before the first CLONE.
    #[error("disk {0} has no checkpoint image yet: CLONE it first")]
    NotCloned(String),
    /// The disk never handed out this snapshot number.
    #[error("disk {disk} has no snapshot {number}")]
    NoSnapshot {
        /// The disk.
        disk: String,
        /// The number.
        number: u64,
    },
    /// An idempotency key is longer than [`super::KEY_BYTES_MAX`].
    #[error("an idempotency key has at most {max} bytes", max = super::KEY_BYTES_MAX)]
    KeyTooLong,
    /// The attached snapshot's bytes could not be had.
    #[error("disk {disk}: {source}")]
    Base {
        /// The disk.
        disk: String,
        /// Why.
        source: BaseError,
    },
    /// The repository did not do its part.
    #[error("disk {disk}: {source}")]
    Upstream {
        /// The disk.
        disk: String,
        /// Why.
        source: UpstreamError,
    },
}
