//! Exit codes: the one place that maps errors to them.

use std::io;

use blobcr_mirror_fuse::mount::MountError;
use blobcr_mirror_fuse::{DirectoryError, HostError};
use blobcr_repository::tree::TreeError;
use blobcr_repository::{CatalogError, ImportError, ReadError, StoreError};
use blobcr_steward::{CollectError, ScrubError};
use tonic::Code;

/// What a script learns from the command's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Anything that has no code of its own.
    Other = 1,
    /// The command line, a name or a value makes no sense.
    Usage = 2,
    /// No such image, snapshot, disk, VM, pool or file.
    NotFound = 3,
    /// It exists already, is in use, or its state forbids the request.
    Conflict = 4,
    /// The repository (or the role that was asked) did not answer in time.
    Unavailable = 5,
    /// Data is missing or not what it should be.
    Integrity = 6,
}

/// An error that the command itself found, with its exit code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The exit code.
    pub exit: Exit,
    /// What failed, on which object, and what to do.
    pub message: String,
}

impl Refusal {
    /// An error with exit code `exit`.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }
}

/// What a role answered over gRPC, without gRPC's own words around it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    /// The status code.
    pub code: Code,
    /// The role's own words.
    pub message: String,
}

impl RemoteError {
    /// `role` is what was asked, `address` where.
    pub fn new(role: &str, address: &str, status: &tonic::Status) -> Self {
        // A status that a role sent has no source: only one that the transport made has.
        let is_ours = std::error::Error::source(status).is_some();
        let message = match status.code() {
            Code::Unavailable if is_ours => {
                format!("the {role} at {address} cannot be reached: {}", words(status))
            }
            Code::DeadlineExceeded | Code::Cancelled if is_ours => {
                format!("the {role} at {address} did not answer in time")
            }
            Code::Unimplemented => format!("{address} is no {role} of this version"),
            _ => words(status),
        };
        Self { code: status.code(), message }
    }
}

impl From<&tonic::Status> for RemoteError {
    fn from(status: &tonic::Status) -> Self {
        Self { code: status.code(), message: words(status) }
    }
}

/// The message of a status; where the transport made it, the innermost reason instead.
fn words(status: &tonic::Status) -> String {
    let mut innermost: Option<&(dyn std::error::Error + 'static)> =
        std::error::Error::source(status);
    while let Some(source) = innermost.and_then(std::error::Error::source) {
        innermost = Some(source);
    }
    innermost.map_or_else(|| status.message().to_owned(), ToString::to_string)
}

const fn of_code(code: Code) -> Exit {
    match code {
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Exit::Conflict,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unimplemented => {
            Exit::Unavailable
        }
        Code::DataLoss => Exit::Integrity,
        _ => Exit::Other,
    }
}

const fn of_catalog(error: &CatalogError) -> Exit {
    match error {
        CatalogError::Invalid(_) => Exit::Usage,
        CatalogError::NotFound(_) => Exit::NotFound,
        CatalogError::AlreadyExists(_)
        | CatalogError::Precondition(_)
        | CatalogError::Conflict(_) => Exit::Conflict,
        CatalogError::Unavailable(_) | CatalogError::Timeout(_) => Exit::Unavailable,
    }
}

const fn of_store(error: &StoreError) -> Exit {
    match error {
        StoreError::Unavailable(_) => Exit::Unavailable,
        StoreError::Missing { .. } | StoreError::Damaged { .. } => Exit::Integrity,
        StoreError::Full { .. } | StoreError::Refused { .. } => Exit::Other,
    }
}

fn of_tree(error: &TreeError) -> Exit {
    match error {
        TreeError::Store(error) => of_store(error),
        TreeError::Geometry(_) => Exit::Usage,
        error if error.is_damage() => Exit::Integrity,
        _ => Exit::Other,
    }
}

fn of_read(error: &ReadError) -> Exit {
    match error {
        ReadError::Tree(error) => of_tree(error),
        ReadError::Chunk { error, .. } => of_store(error),
        ReadError::BeyondEnd { .. } => Exit::Other,
    }
}

fn of_collect(error: &CollectError) -> Exit {
    match error {
        CollectError::Catalog(error) => of_catalog(error),
        CollectError::Tree { error, .. } => of_tree(error),
        CollectError::Root { .. } | CollectError::Layout(_) => Exit::Integrity,
    }
}

const fn of_scrub(error: &ScrubError) -> Exit {
    match error {
        ScrubError::Catalog(error) => of_catalog(error),
        ScrubError::Layout(_) => Exit::Integrity,
    }
}

/// `None`: what is deeper in the chain decides.
const fn of_import(error: &ImportError) -> Option<Exit> {
    match error {
        ImportError::Catalog(error) => Some(of_catalog(error)),
        ImportError::Geometry(_) => Some(Exit::Usage),
        ImportError::Lease => Some(Exit::Unavailable),
        ImportError::Persist(_) | ImportError::Source(_) => None,
    }
}

fn of_metadata(error: &blobcr_metadata::OpenError) -> Option<Exit> {
    match error {
        blobcr_metadata::OpenError::Directory(error) => of_metadata_directory(error),
        #[cfg(feature = "etcd")]
        blobcr_metadata::OpenError::Etcd(error) => of_etcd(error),
        blobcr_metadata::OpenError::Store(_) => None,
    }
}

const fn of_metadata_directory(error: &blobcr_metadata::directory::DirectoryError) -> Option<Exit> {
    use blobcr_metadata::directory::DirectoryError;
    match error {
        DirectoryError::InUse { .. } | DirectoryError::Moved { .. } => Some(Exit::Conflict),
        DirectoryError::Damaged { .. } => Some(Exit::Integrity),
        DirectoryError::Absent { .. } => Some(Exit::NotFound),
        DirectoryError::Io { .. } | DirectoryError::Newer { .. } => None,
    }
}

#[cfg(feature = "etcd")]
fn of_etcd(error: &blobcr_metadata::store::etcd::EtcdOpenError) -> Option<Exit> {
    use blobcr_metadata::store::etcd::EtcdOpenError;
    match error {
        EtcdOpenError::Store { source, .. } => Some(of_metadata_store(source)),
        EtcdOpenError::Migrating { .. } | EtcdOpenError::NotEmpty { .. } => Some(Exit::Conflict),
        EtcdOpenError::Damaged { .. } => Some(Exit::Integrity),
        EtcdOpenError::Newer { .. } => None,
    }
}

#[cfg(feature = "etcd")]
fn of_metadata_store(error: &blobcr_metadata::store::StoreError) -> Exit {
    use blobcr_metadata::store::StoreError;
    match error {
        StoreError::Unavailable { .. } => Exit::Unavailable,
        StoreError::Damaged { .. } => Exit::Integrity,
        _ => Exit::Other,
    }
}

#[cfg(feature = "etcd")]
fn of_migration(error: &blobcr_metadata::migrate::MigrateError) -> Option<Exit> {
    use blobcr_metadata::migrate::MigrateError;
    match error {
        MigrateError::Directory(error) => of_metadata_directory(error),
        MigrateError::Etcd(error) => of_etcd(error),
        MigrateError::Copy(error) => Some(of_metadata_store(error)),
        MigrateError::Differs { .. } => Some(Exit::Integrity),
        MigrateError::Sled(_) => None,
    }
}

/// Without etcd, nothing is moved to it.
#[cfg(not(feature = "etcd"))]
const fn of_migration(error: &std::convert::Infallible) -> Option<Exit> {
    match *error {}
}

/// A directory or a mount point that another process has.
fn of_role(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    use blobcr_ckpt_proxy::ProxyError;
    use blobcr_repo_node::{OpenError, disk::LockError};
    if let Some(OpenError::Lock(LockError::Held { .. })) = error.downcast_ref() {
        return Some(Exit::Conflict);
    }
    match error.downcast_ref()? {
        ProxyError::Locked(_) | ProxyError::SocketInUse(_) => Some(Exit::Conflict),
        ProxyError::BadAddress { .. } => Some(Exit::Usage),
        _ => None,
    }
}

fn of_host(error: &HostError) -> Option<Exit> {
    match error {
        HostError::Directory(DirectoryError::Locked(_)) => Some(Exit::Conflict),
        HostError::Directory(DirectoryError::Damaged(_)) => Some(Exit::Integrity),
        HostError::Mount(MountError::Busy { .. } | MountError::NotEmpty(_)) => Some(Exit::Conflict),
        HostError::Mount(MountError::Absent(_)) => Some(Exit::NotFound),
        _ => None,
    }
}

fn of_io(error: &io::Error) -> Exit {
    match error.kind() {
        io::ErrorKind::NotFound => Exit::NotFound,
        io::ErrorKind::AlreadyExists => Exit::Conflict,
        _ => Exit::Other,
    }
}

/// The exit code of a failure: that of the outermost error in its chain that has one.
#[must_use]
pub fn code(failure: &anyhow::Error) -> Exit {
    failure
        .chain()
        .find_map(|error| {
            if let Some(refusal) = error.downcast_ref::<Refusal>() {
                return Some(refusal.exit);
            }
            error
                .downcast_ref::<RemoteError>()
                .map(|e| of_code(e.code))
                .or_else(|| error.downcast_ref().map(of_catalog))
                .or_else(|| error.downcast_ref().map(of_store))
                .or_else(|| error.downcast_ref().map(of_tree))
                .or_else(|| error.downcast_ref().map(of_read))
                .or_else(|| error.downcast_ref().map(of_collect))
                .or_else(|| error.downcast_ref().map(of_scrub))
                .or_else(|| error.downcast_ref().and_then(of_import))
                .or_else(|| error.downcast_ref().and_then(of_metadata))
                .or_else(|| error.downcast_ref().and_then(of_migration))
                .or_else(|| of_role(error))
                .or_else(|| error.downcast_ref().and_then(of_host))
                .or_else(|| error.downcast_ref().map(of_io))
        })
        .unwrap_or(Exit::Other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;
    use blobcr_proto::Hash;
    use blobcr_proto::v1::RecordKind;
    use blobcr_repository::PersistError;

    fn missing() -> StoreError {
        StoreError::Missing { kind: RecordKind::Chunk, id: Hash::of(b"x") }
    }

    #[test]
    fn every_error_has_its_code_however_deep() {
        let io = |kind| anyhow::Error::new(io::Error::from(kind));
        let remote = |code| anyhow::Error::new(RemoteError { code, message: String::new() });
        for (error, exit) in [
            (anyhow!("x"), Exit::Other),
            (Refusal::new(Exit::Usage, "x").into(), Exit::Usage),
            (CatalogError::NotFound("x".into()).into(), Exit::NotFound),
            (CatalogError::Precondition("x".into()).into(), Exit::Conflict),
            (CatalogError::Unavailable("x".into()).into(), Exit::Unavailable),
            (missing().into(), Exit::Integrity),
            (TreeError::from(missing()).into(), Exit::Integrity),
            (PersistError::from(missing()).into(), Exit::Integrity),
            (ImportError::from(PersistError::from(missing())).into(), Exit::Integrity),
            (ImportError::from(CatalogError::AlreadyExists("x".into())).into(), Exit::Conflict),
            (ReadError::from(TreeError::from(missing())).into(), Exit::Integrity),
            (PersistError::from(StoreError::Unavailable("x".into())).into(), Exit::Unavailable),
            (io(io::ErrorKind::NotFound), Exit::NotFound),
            (io(io::ErrorKind::StorageFull), Exit::Other),
            (remote(Code::AlreadyExists), Exit::Conflict),
            (remote(Code::Unavailable), Exit::Unavailable),
            (remote(Code::DataLoss), Exit::Integrity),
        ] {
            let error = error.context("cannot do it");
            assert_eq!(code(&error), exit, "{error:?}");
        }
    }
}
