//! `DIR/VM.sock`: made under another name with its final mode and then renamed, so that nobody
//! ever sees it with another mode, and a stale one is replaced in one step.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};

use blobcr_proto::VmName;
use rustix::fs::{FlockOperation, flock};
use tokio::net::UnixListener;

use crate::error::ProxyError;

/// `sockaddr_un.sun_path` has 108 bytes, of which the last is zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where the socket of a VM is.
pub(crate) fn path(dir: &Path, vm: &VmName) -> PathBuf {
    dir.join(format!("{vm}.sock"))
}

/// Makes the directory and takes it for this process; the lock ends with the file.
pub(crate) fn lock_dir(dir: &Path) -> Result<File, ProxyError> {
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| ProxyError::Io { what, path, source }
    };
    fs::create_dir_all(dir).map_err(fail("create the directory", dir))?;
    let path = dir.join(".lock");
    let file = File::create(&path).map_err(fail("create", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ProxyError::Locked(dir.to_owned())),
        Err(e) => Err(fail("lock", &path)(e.into())),
    }
}

/// Listens on the VM's socket. A socket that nobody listens on any more is replaced.
pub(crate) fn bind(dir: &Path, vm: &VmName, mode: u32) -> Result<UnixListener, ProxyError> {
    let path = path(dir, vm);
    check_length(&path)?;
    check_free(&path)?;
    let beside = dir.join(".bind");
    let fail = |what| {
        let path = path.clone();
        move |source| ProxyError::Io { what, path, source }
    };
    remove(&beside)?;
    let listener = UnixListener::bind(&beside).map_err(fail("listen on"))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(mode))
        .map_err(fail("set the mode of"))?;
    fs::rename(&beside, &path).map_err(fail("put in place"))?;
    Ok(listener)
}

/// Removes a socket; that it is not there is no error.
pub(crate) fn remove(path: &Path) -> Result<(), ProxyError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ProxyError::Io { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn check_length(path: &Path) -> Result<(), ProxyError> {
    let len = path.as_os_str().as_bytes().len();
    if len > SOCKET_PATH_BYTES_MAX {
        return Err(ProxyError::PathTooLong {
            path: path.to_owned(),
            len,
            max: SOCKET_PATH_BYTES_MAX,
        });
    }
    Ok(())
}

fn check_free(path: &Path) -> Result<(), ProxyError> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(ProxyError::Io { what: "look at", path: path.to_owned(), source });
        }
    };
    if !meta.file_type().is_socket() {
        return Err(ProxyError::InTheWay(path.to_owned()));
    }
    match StdUnixStream::connect(path) {
        Ok(_) => Err(ProxyError::SocketInUse(path.to_owned())),
        // Nobody has it open: what a dead process left.
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ProxyError::Io { what: "probe", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmName {
        VmName::new("web").unwrap()
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = bind(dir.path(), &vm(), 0o640).unwrap();
        let path = path(dir.path(), &vm());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(matches!(bind(dir.path(), &vm(), 0o660), Err(ProxyError::SocketInUse(_))));
        drop(first);
        assert!(path.exists(), "a process that died removes nothing");
        let _second = bind(dir.path(), &vm(), 0o660).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        StdUnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(path(dir.path(), &vm()), b"precious").unwrap();
        assert!(matches!(bind(dir.path(), &vm(), 0o660), Err(ProxyError::InTheWay(_))));
        assert_eq!(fs::read(path(dir.path(), &vm())).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_path_too_long_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let long = VmName::new("v".repeat(128)).unwrap();
        let error = bind(dir.path(), &long, 0o660).unwrap_err();
        assert!(error.to_string().contains("use a shorter directory or VM name"), "{error}");
    }

    #[test]
    fn a_directory_serves_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let lock = lock_dir(dir.path()).unwrap();
        assert!(matches!(lock_dir(dir.path()), Err(ProxyError::Locked(_))));
        drop(lock);
        lock_dir(dir.path()).unwrap();
    }
}
