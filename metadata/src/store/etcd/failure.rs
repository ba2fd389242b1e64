//! What a failed request to an etcd member means.

use etcd_client::Error;
use tonic::{Code, ConnectError, Status};

use crate::store::StoreError;

/// What etcd says when it refused before it began: another member, or a later try, may do it.
const REFUSED_FIRST: [&str; 3] = [
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: mvcc: database space exceeded",
];

/// See the module.
#[derive(Debug)]
pub(super) enum Failure {
    /// It was certainly not carried out, and may be later or elsewhere.
    NotDone(String),
    /// Nobody knows.
    Unknown(String),
    /// It was not carried out, and never will be.
    Refused(StoreError),
}

impl Failure {
    pub(super) fn of(url: &str, error: &Error) -> Self {
        match error {
            Error::GRpcStatus(status) => Self::of_status(url, status),
            Error::InvalidArgs(_) | Error::InvalidUri(_) => {
                Self::Refused(StoreError::Invalid { detail: format!("{url}: {error}") })
            }
            _ => Self::Unknown(format!("{url}: {error}")),
        }
    }

    fn of_status(url: &str, status: &Status) -> Self {
        let detail = format!("{url}: {}", text(status));
        let first = REFUSED_FIRST.iter().any(|words| status.message().starts_with(words));
        if first || never_sent(status) {
            return Self::NotDone(detail);
        }
        match status.code() {
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented => Self::Refused(StoreError::Invalid { detail }),
            Code::DataLoss => Self::Refused(StoreError::Damaged { detail }),
            _ => Self::Unknown(detail),
        }
    }
}

/// Whether the request cannot have reached the member.
fn never_sent(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<ConnectError>())
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |cause| cause.source())
}

/// The innermost reason: a status that the transport made says only "transport error".
fn text(status: &Status) -> String {
    causes(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: Code, message: &str) -> Failure {
        Failure::of("u", &Error::GRpcStatus(Status::new(code, message)))
    }

    #[test]
    fn only_what_cannot_have_been_carried_out_is_not_done() {
        for (code, message) in [
            (Code::Unavailable, "etcdserver: no leader"),
            (Code::ResourceExhausted, "etcdserver: too many requests"),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
        ] {
            assert!(matches!(of(code, message), Failure::NotDone(_)), "{message}");
        }
        for (code, message) in [
            (Code::Unavailable, "etcdserver: request timed out"),
            (Code::Unavailable, "etcdserver: leader changed"),
            (Code::Unknown, "transport error"),
            (Code::Cancelled, "stream closed"),
            (Code::DeadlineExceeded, "too late"),
            (Code::Internal, "h2"),
        ] {
            assert!(matches!(of(code, message), Failure::Unknown(_)), "{message}");
        }
        let refused = of(Code::InvalidArgument, "etcdserver: request is too large");
        assert!(matches!(refused, Failure::Refused(StoreError::Invalid { .. })), "{refused:?}");
        let corrupt = of(Code::DataLoss, "etcdserver: corrupt cluster");
        assert!(matches!(corrupt, Failure::Refused(StoreError::Damaged { .. })), "{corrupt:?}");
    }
}
