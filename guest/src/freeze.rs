//! Holds file systems still around a request, so that the snapshot needs no journal to mend it.
//!
//! What freezes must thaw, whatever becomes of this program. A child process holds the same open
//! mount points and one end of a pipe: it thaws everything when the other end closes (this program
//! was killed, panicked, was cancelled) and when the time limit is over. It blocks every signal, is
//! in a session of its own, and does nothing that a frozen file system could hold up.
//!
//! While frozen, this program must not write to a file: it would wait for itself. Everything that it
//! needs is opened before, and what it has to say is said after.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::GuestError;
use crate::flush::{MOUNTS, block_mounts, open_mount};

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`.
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;
/// Past the limit, what this program still freezes is thawed again this often.
const AGAIN_MS: i32 = 50;
/// What tells the child that there is nothing to thaw.
const DONE: &[u8] = b"d";

/// Which file systems to freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All on block devices that can be, the root's included: only where the host is another
    /// machine, because a host that shares a frozen file system cannot answer.
    All,
    /// Those mounted here.
    Only(Vec<PathBuf>),
}

/// File systems that are frozen until this is dropped, its process ends, or its limit is over.
#[derive(Debug)]
pub struct Frozen {
    /// In the order of freezing.
    held: Vec<Mount>,
    /// Open until the child may go.
    pipe: Option<OwnedFd>,
    /// Without a reader, writing would bring a signal that ends the program.
    _theirs: OwnedFd,
    child: libc::pid_t,
    began: Instant,
    limit: Duration,
}

#[derive(Debug)]
struct Mount {
    path: PathBuf,
    fd: OwnedFd,
}

/// Freezes file systems for at most `limit`.
///
/// # Errors
/// When one of them cannot be frozen; none of them is then. In the scope of all, those that do not
/// know freezing are left out.
pub fn freeze(scope: &Scope, limit: Duration) -> Result<Frozen, GuestError> {
    let mounts = mounts(scope)?;
    let (theirs, ours) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| GuestError::io("make", "a pipe")(e.into()))?;
    let child = spawn_watchdog(&mounts, &theirs, &ours, limit)?;
    let began = Instant::now();
    let (held, pipe) = (Vec::new(), Some(ours));
    let mut frozen = Frozen { held, pipe, _theirs: theirs, child, began, limit };
    for mount in mounts {
        match ioctl(mount.fd.as_raw_fd(), FIFREEZE) {
            Ok(()) => frozen.held.push(mount),
            Err(Errno::OPNOTSUPP) if *scope == Scope::All => {}
            Err(error) => {
                return Err(GuestError::io("freeze the file system", mount.path)(error.into()));
            }
        }
    }
    Ok(frozen)
}

impl Frozen {
    /// How many file systems are frozen.
    #[must_use]
    pub fn count(&self) -> usize {
        self.held.len()
    }

    /// Thaws them.
    ///
    /// # Errors
    /// When one of them was thawed before, by the limit or by somebody else: what was done meanwhile
    /// was done to file systems that may have changed.
    pub fn thaw(mut self) -> Result<(), GuestError> {
        self.thaw_all()
    }

    fn thaw_all(&mut self) -> Result<(), GuestError> {
        let mut outcome = Ok(());
        // Those below others first: the others write to them as they thaw.
        for mount in self.held.drain(..).rev() {
            match ioctl(mount.fd.as_raw_fd(), FITHAW) {
                Ok(()) => {}
                Err(Errno::INVAL) => {
                    let seconds = self.limit.min(self.began.elapsed()).as_secs();
                    outcome = Err(GuestError::Thawed { seconds });
                }
                Err(error) => {
                    let error = GuestError::io("thaw the file system", mount.path)(error.into());
                    // The child tries it as well.
                    self.pipe = None;
                    outcome = Err(error);
                }
            }
        }
        if let Some(pipe) = self.pipe.take() {
            // A child that is no more has thawed already.
            rustix::io::write(&pipe, DONE).ok();
        }
        let mut status = 0;
        // SAFETY: the child is ours and nobody else waits for it; `status` outlives the call.
        unsafe { libc::waitpid(self.child, &raw mut status, 0) };
        outcome
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.pipe.is_some() {
            // Whoever drops it has an error of his own to tell.
            drop(self.thaw_all());
        }
    }
}

/// The mount points, opened, those mounted last first: a loop device's file lies on one mounted
/// before, and is written to when the loop's file system freezes.
fn mounts(scope: &Scope) -> Result<Vec<Mount>, GuestError> {
    let text = fs::read_to_string(MOUNTS).map_err(GuestError::io("read", MOUNTS))?;
    let wanted = match scope {
        Scope::All => None,
        Scope::Only(paths) => Some(
            paths
                .iter()
                .map(|p| p.canonicalize().map_err(GuestError::io("find the mount", p)))
                .collect::<Result<Vec<_>, _>>()?,
        ),
    };
    let mut found = Vec::new();
    let mut devices = HashSet::new();
    for mount in block_mounts(&text).iter().rev() {
        let named = wanted.as_ref().is_none_or(|all| all.contains(&mount.path));
        if !named || !mount.writable || devices.contains(mount.device) {
            continue;
        }
        if let Some(fd) = open_mount(mount)? {
            devices.insert(mount.device);
            found.push(Mount { path: mount.path.clone(), fd });
        }
    }
    for path in wanted.iter().flatten() {
        if !found.iter().any(|mount| mount.path == *path) {
            return Err(GuestError::Usage(format!(
                "{} is no mount point of a writable file system on a block device",
                path.display()
            )));
        }
    }
    Ok(found)
}

fn ioctl(fd: RawFd, request: libc::Ioctl) -> Result<(), Errno> {
    // SAFETY: both requests take an int that they do not use, and touch no memory of ours.
    match unsafe { libc::ioctl(fd, request, 0) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn spawn_watchdog(
    mounts: &[Mount],
    theirs: &OwnedFd,
    ours: &OwnedFd,
    limit: Duration,
) -> Result<libc::pid_t, GuestError> {
    // Everything that needs memory is done before the fork: other threads may hold its locks.
    let fds: Vec<RawFd> = mounts.iter().rev().map(|mount| mount.fd.as_raw_fd()).collect();
    let limit_ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    let (theirs, ours) = (theirs.as_raw_fd(), ours.as_raw_fd());
    // Without its signals from the first moment on: they come to a whole group of processes.
    // SAFETY: both sets are valid and outlive the calls.
    let before = unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    };
    // SAFETY: the child makes nothing but system calls, see `watch`, and never returns.
    let child = unsafe { libc::fork() };
    if child == 0 {
        watch(&fds, theirs, ours, limit_ms);
    }
    let error = last_errno();
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    if child < 0 {
        return Err(GuestError::io("start", "the process that thaws")(error.into()));
    }
    Ok(child)
}

/// The child: thaws when the pipe closes or the limit is over, unless told that all is done.
fn watch(fds: &[RawFd], theirs: RawFd, ours: RawFd, limit_ms: i32) -> ! {
    // SAFETY: system calls alone, on descriptors that this process got with the fork. `byte` and
    // `poll` outlive the calls that are given their addresses.
    unsafe {
        libc::setsid();
        // Otherwise it would never see the other end close.
        drop(OwnedFd::from_raw_fd(ours));
        let mut wait_ms = limit_ms;
        loop {
            let mut poll = libc::pollfd { fd: theirs, events: libc::POLLIN, revents: 0 };
            let seen = libc::poll(&raw mut poll, 1, wait_ms);
            let mut byte = 0_u8;
            if seen > 0 && libc::read(theirs, (&raw mut byte).cast(), 1) == 1 {
                libc::_exit(0);
            }
            for fd in fds {
                libc::ioctl(*fd, FITHAW, 0);
            }
            if seen > 0 {
                libc::_exit(0);
            }
            wait_ms = AGAIN_MS;
        }
    }
}
