//! `blobcr vm relay`, run as QEMU runs it for each connection to a forwarded address: stdin, stdout and
//! stderr are one socket, of which the guest has the other end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};

use anyhow::Result;
use blobcr_tests::daemon::{blobcr, wait_until};

/// A relay, and the guest's end of it.
fn relay(socket: &Path) -> Result<(Child, UnixStream)> {
    let (guest, own) = UnixStream::pair()?;
    let fd = || Ok::<OwnedFd, anyhow::Error>(own.try_clone()?.into());
    let mut command = Command::new(blobcr()?);
    command.args(["vm", "relay"]).arg(socket).stdin(fd()?).stdout(fd()?).stderr(fd()?);
    Ok((command.spawn()?, guest))
}

fn ends(relay: &mut Child) -> Result<()> {
    wait_until("the relay ended", || Ok(relay.try_wait()?.is_some()))
}

#[test]
fn it_ends_with_the_guests_connection_however_that_ends() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.sock");
    let listener = UnixListener::bind(&socket)?;
    let (mut closed, mut guest) = relay(&socket)?;
    let (mut proxy, _) = listener.accept()?;
    guest.write_all(b"request")?;
    guest.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    proxy.read_to_string(&mut said)?;
    assert_eq!(said, "request");
    // It has said all, and hears the answer.
    proxy.write_all(b"answer")?;
    drop(proxy);
    let mut heard = String::new();
    guest.read_to_string(&mut heard)?;
    assert_eq!(heard, "answer");
    ends(&mut closed)?;

    // A hypervisor that was killed with something unread: the connection is reset.
    let (mut reset, mut guest) = relay(&socket)?;
    let (mut proxy, _) = listener.accept()?;
    proxy.write_all(b"unread")?;
    guest.read_exact(&mut [0; 1])?;
    drop(guest);
    // Not even closed by us.
    ends(&mut reset)?;
    assert_eq!(proxy.read(&mut [0; 1])?, 0);
    Ok(())
}

#[test]
fn it_tells_the_guest_nothing_of_the_host() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut nobody, mut guest) = relay(&dir.path().join("vm.sock"))?;
    let mut heard = String::new();
    guest.read_to_string(&mut heard)?;
    assert_eq!(heard, "");
    assert!(!nobody.wait()?.success());
    Ok(())
}
