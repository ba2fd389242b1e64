//! What can go wrong between a guest and its host, and the exit code and the errno of each.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// gRPC status codes, which a host's refusal carries.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const DEADLINE_EXCEEDED: i32 = 4;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const ALREADY_EXISTS: i32 = 6;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const ABORTED: i32 = 10;
    pub(super) const UNIMPLEMENTED: i32 = 12;
    pub(super) const UNAVAILABLE: i32 = 14;
    pub(super) const DATA_LOSS: i32 = 15;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// What failed, on which object, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The caller's own mistake.
    #[error("{0}")]
    Usage(String),
    /// The guest has no port to its host.
    #[error(
        "this guest has no virtio-serial port named {name}; start its hypervisor with one \
         (QEMU: -device virtserialport,chardev=…,name={name}) and see that virtio_console is loaded"
    )]
    NoPort {
        /// The name that was looked for.
        name: String,
    },
    /// The guest has no vsock.
    #[error(
        "this guest has no vsock; start its hypervisor with one \
         (QEMU: -device vhost-vsock-pci,guest-cid=…) and see that vmw_vsock_virtio_transport is \
         loaded"
    )]
    NoVsock,
    /// A system call on the way to the host failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing came back in time.
    #[error(
        "the host did not answer in time ({state}); see that its checkpoint proxy runs, then ask \
         again with the same key"
    )]
    NoAnswer {
        /// What the way to the host looked like at the end.
        state: String,
    },
    /// The host answered, and said no.
    #[error("the host refused: {message}")]
    Refused {
        /// A gRPC status code.
        code: i32,
        /// What the host said.
        message: String,
    },
    /// The host's answer makes no sense.
    #[error("the host's answer cannot be used ({0}); its blobcr and this one may not fit together")]
    BadAnswer(String),
    /// A snapshot can no longer become stable.
    #[error("the checkpoint {image}@{number} is lost: {reason}; take another one")]
    Lost {
        /// The checkpoint's image.
        image: String,
        /// The checkpoint's number.
        number: u64,
        /// Why.
        reason: String,
    },
    /// A snapshot is not stable yet.
    #[error("the checkpoint is not stable yet ({state}); it may still become so: wait again")]
    NotYet {
        /// The last thing that was heard.
        state: String,
    },
    /// The file systems did not stay frozen until the host had answered.
    #[error(
        "the file systems were frozen for {seconds} s, the most that is allowed, and thawed before \
         the host had answered: the checkpoint, if one was taken, is what a power cut would leave; \
         take another one, or allow more"
    )]
    Thawed {
        /// The limit.
        seconds: u64,
    },
    /// A state file of the worker is damaged.
    #[error("the state file {path} is damaged ({detail}); remove it to start anew")]
    BadState {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
}

impl GuestError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    /// The exit code: 2 usage, 3 not found, 4 conflict, 5 unavailable, 6 integrity, 1 the rest.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::NoPort { .. } | Self::NoVsock => 3,
            Self::NoAnswer { .. } | Self::NotYet { .. } => 5,
            Self::BadState { .. } => 6,
            Self::Refused { code, .. } => match *code {
                code::INVALID_ARGUMENT => 2,
                code::NOT_FOUND => 3,
                code::ALREADY_EXISTS | code::FAILED_PRECONDITION | code::ABORTED => 4,
                code::UNAVAILABLE | code::DEADLINE_EXCEEDED => 5,
                code::DATA_LOSS => 6,
                _ => 1,
            },
            Self::Io { .. } | Self::BadAnswer(_) | Self::Lost { .. } | Self::Thawed { .. } => 1,
        }
    }

    /// The errno that the C library gives for it, negated; never zero.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::Usage(_) => Errno::INVAL,
            Self::NoPort { .. } | Self::NoVsock => Errno::NODEV,
            Self::NoAnswer { .. } => Errno::TIMEDOUT,
            Self::NotYet { .. } => Errno::AGAIN,
            Self::BadAnswer(_) => Errno::PROTO,
            Self::Lost { .. } | Self::BadState { .. } => Errno::IO,
            Self::Thawed { .. } => Errno::INTR,
            Self::Io { source, .. } => return source.raw_os_error().unwrap_or(5),
            Self::Refused { code, .. } => match *code {
                code::INVALID_ARGUMENT => Errno::INVAL,
                code::NOT_FOUND => Errno::NOENT,
                code::ALREADY_EXISTS => Errno::EXIST,
                code::PERMISSION_DENIED | code::UNAUTHENTICATED => Errno::ACCESS,
                code::RESOURCE_EXHAUSTED => Errno::DQUOT,
                code::FAILED_PRECONDITION | code::ABORTED => Errno::BUSY,
                code::UNIMPLEMENTED => Errno::OPNOTSUPP,
                code::UNAVAILABLE => Errno::HOSTUNREACH,
                code::DEADLINE_EXCEEDED => Errno::TIMEDOUT,
                code::DATA_LOSS => Errno::IO,
                _ => Errno::REMOTEIO,
            },
        };
        errno.raw_os_error()
    }

    /// The host could not do it now; a wait goes on.
    pub(crate) fn is_not_yet(&self) -> bool {
        matches!(self, Self::Refused { code: code::UNAVAILABLE | code::DEADLINE_EXCEEDED, .. })
    }
}
