//! Probes of idle TCP connections (SO_KEEPALIVE). MPI libraries have them every few seconds; where the
//! network is cut off for longer than that, they would end connections that come to no harm.

use std::ffi::c_int;
use std::fs;

/// The connections of this process that were probed; they are again when this is dropped.
pub(crate) struct Stopped(Vec<c_int>);

impl Stopped {
    pub(crate) fn all() -> Self {
        // Without a list, all are left as they are.
        let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let probed: Vec<c_int> = numbers.filter(|fd| is_probed(*fd)).collect();
        for fd in &probed {
            probe(*fd, false);
        }
        Self(probed)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for fd in &self.0 {
            probe(*fd, true);
        }
    }
}

fn is_probed(fd: c_int) -> bool {
    let (mut on, mut len): (c_int, _) = (0, size_of::<c_int>() as libc::socklen_t);
    // SAFETY: the value and its length outlive the call; of what is no socket it tells nothing.
    let rc = unsafe {
        let value = (&raw mut on).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, value, &raw mut len)
    };
    rc == 0 && on != 0
}

fn probe(fd: c_int, on: bool) {
    let (value, len) = (c_int::from(on), size_of::<c_int>() as libc::socklen_t);
    // SAFETY: the value outlives the call. A connection that was closed since needs no probes.
    unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, value, len);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_those_that_were_probed_are_probed_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (probed, quiet) = (connect(), connect());
        probe(probed.as_raw_fd(), true);
        let stopped = Stopped::all();
        assert!(!is_probed(probed.as_raw_fd()));
        drop(stopped);
        assert!(is_probed(probed.as_raw_fd()));
        assert!(!is_probed(quiet.as_raw_fd()));
    }
}
