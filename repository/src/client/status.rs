//! What a gRPC status means to a caller.

use blobcr_proto::Hash;
use blobcr_proto::v1::RecordKind;
use tonic::{Code, ConnectError, Status};

use crate::{CatalogError, StoreError};

/// What tonic's load shedding says: the node is busy, not full.
const SHED: &str = "Too many active requests for the connection";

/// Whether the request cannot have reached the server, so that even a call which must not happen
/// twice may be tried again.
pub(super) fn never_sent(status: &Status) -> bool {
    let mut error = std::error::Error::source(status);
    while let Some(cause) = error {
        if cause.is::<ConnectError>() {
            return true;
        }
        error = cause.source();
    }
    false
}

/// The text of a status that came from a connection: its own says only "transport error".
fn text(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut error = std::error::Error::source(status);
    while let Some(cause) = error {
        text = cause.to_string();
        error = cause.source();
    }
    if text.is_empty() { status.code().description().to_owned() } else { text }
}

pub(super) fn catalog_error(address: &str, status: &Status) -> CatalogError {
    let message = status.message().to_owned();
    match status.code() {
        Code::NotFound => CatalogError::NotFound(message),
        Code::AlreadyExists => CatalogError::AlreadyExists(message),
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => {
            CatalogError::Invalid(message)
        }
        Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated => {
            CatalogError::Precondition(message)
        }
        Code::Aborted => CatalogError::Conflict(message),
        Code::DeadlineExceeded => CatalogError::Timeout(message),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::ResourceExhausted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => CatalogError::Unavailable(format!("{address}: {}", text(status))),
    }
}

/// Why one node did not do what it was asked.
#[derive(Debug, Clone)]
pub(super) enum NodeError {
    /// No answer, or one that may be another later. Others may serve meanwhile, and the node may
    /// have moved.
    Unreachable(String),
    /// It takes no writes for want of space.
    Full(String),
    /// It does not hold the object.
    Absent,
    /// It holds the object, but damaged.
    Damaged(String),
    /// It will never do that.
    Refused(String),
}

impl NodeError {
    pub(super) fn of(status: &Status) -> Self {
        match status.code() {
            Code::ResourceExhausted if status.message() != SHED => Self::Full(text(status)),
            Code::InvalidArgument
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::PermissionDenied
            | Code::Unauthenticated => Self::Refused(text(status)),
            Code::DataLoss => Self::Damaged(text(status)),
            _ => Self::Unreachable(text(status)),
        }
    }

    pub(super) fn into_store_error(self, node: &str, kind: RecordKind, id: Hash) -> StoreError {
        let node = node.to_owned();
        match self {
            Self::Unreachable(detail) => StoreError::Unavailable(format!("{node}: {detail}")),
            Self::Full(detail) => StoreError::Full { node, detail },
            Self::Absent => StoreError::Missing { kind, id },
            Self::Damaged(detail) => {
                StoreError::Damaged { kind, id, detail: format!("{node}: {detail}") }
            }
            Self::Refused(detail) => StoreError::Refused { node, detail },
        }
    }
}
