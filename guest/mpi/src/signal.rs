//! Signals that were received; the handler does nothing but remember.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::Failure;

/// More than any signal's number.
const SIGNALS: usize = 65;
static RECEIVED: [AtomicBool; SIGNALS] = [const { AtomicBool::new(false) }; SIGNALS];
static WATCHED: [AtomicBool; SIGNALS] = [const { AtomicBool::new(false) }; SIGNALS];

extern "C" fn remember(signal: c_int) {
    if let Some(received) = RECEIVED.get(signal as usize) {
        received.store(true, Ordering::Relaxed);
    }
}

/// From now on the signal is remembered, and does nothing else.
pub(crate) fn watch(signal: c_int) -> Result<(), Failure> {
    if WATCHED[signal as usize].swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    // SAFETY: all zero is a valid sigaction, and the handler only stores to an atomic.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = remember as extern "C" fn(c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    match rc {
        0 => Ok(()),
        _ => Err(Failure::io("sigaction", &std::io::Error::last_os_error())),
    }
}

/// Whether it came.
pub(crate) fn received(signal: c_int) -> bool {
    RECEIVED[signal as usize].load(Ordering::Relaxed)
}

/// What came before counts no more.
pub(crate) fn forget(signal: c_int) {
    RECEIVED[signal as usize].store(false, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_remembered_until_forgotten() {
        watch(libc::SIGUSR2).unwrap();
        assert!(!received(libc::SIGUSR2));
        // SAFETY: it has a handler now.
        unsafe { libc::raise(libc::SIGUSR2) };
        assert!(received(libc::SIGUSR2));
        forget(libc::SIGUSR2);
        assert!(!received(libc::SIGUSR2));
    }
}
