//! What went wrong, in a form that all ranks can share.

use blobcr_guest::GuestError;

/// An errno and what to tell people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Negative.
    pub(crate) errno: i32,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(errno: i32, text: String) -> Self {
        // Whatever its sign, and never "go on".
        let errno = errno.checked_abs().filter(|e| *e > 0).unwrap_or(libc::EIO);
        Self { errno: -errno, text }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, text.into())
    }

    pub(crate) fn io(what: &str, error: &std::io::Error) -> Self {
        Self::new(error.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {error}"))
    }
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_always_a_negative_errno() {
        for (errno, expected) in [(5, -5), (-28, -28), (0, -5), (i32::MIN, -5)] {
            assert_eq!(Failure::new(errno, String::new()).errno, expected);
        }
    }
}
