//! `blobcr vm relay`: the host's end of an address that QEMU forwards. QEMU runs it for each
//! connection of the guest, so it does nothing but pass bytes on.

use std::fs::File;
use std::io::{self, copy};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use rustix::fs::{FileType, fstat};

/// Passes bytes both ways until the proxy ends the connection, which it does when the guest has.
///
/// # Errors
/// When nobody listens on the socket, or one side breaks.
pub fn run(socket: &Path) -> anyhow::Result<()> {
    if the_guest_reads_stderr()? {
        let nowhere = File::options().write(true).open("/dev/null").context("open /dev/null")?;
        rustix::stdio::dup2_stderr(&nowhere)?;
    }
    let stream = UnixStream::connect(socket).with_context(|| {
        format!("cannot connect to {}; see that the VM's proxy runs", socket.display())
    })?;
    let mut to_proxy = stream.try_clone().context("cannot use the connection both ways")?;
    // It may wait for the guest when the proxy is gone; it ends with the process.
    std::thread::spawn(move || {
        let passed = copy(&mut io::stdin().lock(), &mut to_proxy);
        // A guest that has said all may still wait for its answers; one that is gone does not.
        to_proxy.shutdown(if passed.is_ok() { Shutdown::Write } else { Shutdown::Both })
    });
    // Not as a stream of lines: a frame may lie in any of them.
    let stdout = io::stdout().as_fd().try_clone_to_owned().context("stdout is closed")?;
    copy(&mut &stream, &mut File::from(stdout)).context("cannot pass on what the proxy says")?;
    Ok(())
}

/// QEMU connects all three to the guest, which has no use for its host's paths.
fn the_guest_reads_stderr() -> anyhow::Result<bool> {
    let (stdin, stderr) = (fstat(rustix::stdio::stdin())?, fstat(rustix::stdio::stderr())?);
    let is_socket = FileType::from_raw_mode(stderr.st_mode) == FileType::Socket;
    Ok(is_socket && (stdin.st_dev, stdin.st_ino) == (stderr.st_dev, stderr.st_ino))
}
