//! The mount point: is it fit to mount on, and how to get rid of a mount.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};

/// What our mounts say they are a mount of.
pub(crate) const SOURCE: &str = "blobcr";
const MOUNTINFO: &str = "/proc/self/mountinfo";
const FUSE_CONF: &str = "/etc/fuse.conf";

/// Why nothing can be mounted at a mount point.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// It is not there.
    #[error("the mount point {0} does not exist; create it: mkdir -p {0}")]
    Absent(PathBuf),
    /// It is no directory.
    #[error("the mount point {0} is not a directory")]
    NotADirectory(PathBuf),
    /// Its files would be hidden.
    #[error("the mount point {0} is not empty; choose another one or move its files away")]
    NotEmpty(PathBuf),
    /// Something is mounted there, by us or by others.
    #[error("{point} is already mounted on ({what}); stop what serves it, or choose another one")]
    Busy {
        /// The mount point.
        point: PathBuf,
        /// Type and source of what is there.
        what: String,
    },
    /// A mount that a killed mirror left cannot be removed.
    #[error(
        "a dead mirror's mount at {point} cannot be removed ({source}): fusermount3 -u -z {point}"
    )]
    Stale {
        /// The mount point.
        point: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `/dev/fuse` is not usable.
    #[error(
        "/dev/fuse cannot be opened ({0}); load the module with `modprobe fuse`, or let this user use it"
    )]
    Device(io::Error),
    /// `allow_other` needs root or a setting.
    #[error(
        "only root may let other users into the mount; run as root, add `user_allow_other` to {FUSE_CONF}, or do without other users"
    )]
    AllowOther,
    /// The system refuses.
    #[error("{point} cannot be mounted: {source}")]
    Refused {
        /// The mount point.
        point: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The mount point cannot be looked at.
    #[error("{point} cannot be examined: {source}")]
    Io {
        /// The mount point.
        point: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MountedOn {
    point: PathBuf,
    kind: String,
    source: String,
}

impl MountedOn {
    fn is_ours(&self) -> bool {
        (self.kind == "fuse" || self.kind == "fuse.blobcr") && self.source == SOURCE
    }
}

/// Undoes the octal escapes (`\040` for a space) of mountinfo.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn parse_line(line: &str) -> Option<MountedOn> {
    let (left, right) = line.split_once(" - ")?;
    let point = unescape(left.split(' ').nth(4)?);
    let mut right = right.split(' ');
    let kind = right.next()?.to_owned();
    let source = unescape(right.next()?).to_string_lossy().into_owned();
    Some(MountedOn { point, kind, source })
}

/// What is mounted on top at `point`, which must be absolute and without symbolic links.
fn mounted_at(point: &Path) -> io::Result<Option<MountedOn>> {
    let mounts = std::fs::read_to_string(MOUNTINFO)?;
    Ok(mounts.lines().rev().filter_map(parse_line).find(|mount| mount.point == point))
}

/// The real path of a mount point, without touching what is mounted on it: a dead mount cannot
/// even be looked at.
fn real_path(point: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(point)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => {
            let below = parent.canonicalize()?.join(name);
            // The last part may be a link too, unless it is a dead mount.
            Ok(below.canonicalize().unwrap_or(below))
        }
        _ => absolute.canonicalize(),
    }
}

/// Removes a mount from the tree at once, whoever still has files of it open; with `abort`, what
/// waits for an answer from it gets an error.
pub(crate) fn detach(point: &Path, abort: bool) -> io::Result<()> {
    let mut flags = UnmountFlags::DETACH;
    if abort {
        flags |= UnmountFlags::FORCE;
    }
    match unmount(point, flags) {
        Err(rustix::io::Errno::PERM) => {
            let ran = Command::new("fusermount3").args(["-u", "-z", "--"]).arg(point).output()?;
            if ran.status.success() {
                return Ok(());
            }
            Err(io::Error::other(String::from_utf8_lossy(&ran.stderr).trim().to_owned()))
        }
        result => Ok(result?),
    }
}

/// Makes sure that something can be mounted at `point`, and removes what a killed mirror left
/// there. Returns the real path.
///
/// # Errors
/// When the mount point is absent, not empty or in use; the text says what to do.
pub(crate) fn prepare(point: &Path, allow_other: bool) -> Result<PathBuf, MountError> {
    let io_error = |source| MountError::Io { point: point.to_owned(), source };
    let real = real_path(point).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::Absent(point.to_owned()),
        _ => io_error(error),
    })?;
    if let Some(mount) = mounted_at(&real).map_err(io_error)? {
        // Not `stat`: the kernel may answer that from what it remembers of a dead one.
        let dead = matches!(
            rustix::fs::statfs(&real),
            Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED)
        );
        let busy = || {
            let what = format!("{} of {}", mount.kind, mount.source);
            Err(MountError::Busy { point: real.clone(), what })
        };
        match (mount.is_ours(), dead) {
            (true, true) => {
                detach(&real, false)
                    .map_err(|source| MountError::Stale { point: real.clone(), source })?;
                tracing::warn!(point = %real.display(), "removed the mount of a mirror that died");
                return prepare(&real, allow_other);
            }
            (true, false) => return busy(),
            // An empty file system of another kind may well be mounted on.
            (false, _) if mount.kind.starts_with("fuse") => return busy(),
            (false, _) => {}
        }
    }
    let mut files = std::fs::read_dir(&real).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::Absent(real.clone()),
        io::ErrorKind::NotADirectory => MountError::NotADirectory(real.clone()),
        _ => io_error(error),
    })?;
    if files.next().is_some() {
        return Err(MountError::NotEmpty(real));
    }
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        return Err(MountError::Device(error));
    }
    let root = rustix::process::geteuid().is_root();
    if allow_other && !root && !others_allowed(&std::fs::read_to_string(FUSE_CONF)) {
        return Err(MountError::AllowOther);
    }
    Ok(real)
}

fn others_allowed(conf: &io::Result<String>) -> bool {
    conf.as_ref().is_ok_and(|conf| conf.lines().any(|line| line.trim() == "user_allow_other"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_as_the_kernel_writes_it() {
        let line =
            r"141 30 0:59 / /mnt/a\040b\134c rw,nosuid,nodev shared:74 - fuse blobcr rw,user_id=0";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.point, Path::new(r"/mnt/a b\c"));
        assert!(mount.is_ours());
        let optional = "26 30 0:24 / /sys/fs/cgroup rw shared:9 master:2 - cgroup2 cgroup2 rw";
        assert!(!parse_line(optional).unwrap().is_ours());
        for other in [
            "1 2 0:3 / /m rw - fuse sshfs rw",
            "1 2 0:3 / /m rw - ext4 blobcr rw",
            "1 2 0:3 / /m rw - fuse.other blobcr rw",
        ] {
            assert!(!parse_line(other).unwrap().is_ours(), "{other}");
        }
        for junk in ["", "x", " - ", "1 2 3 - fuse", "a b c d e - "] {
            assert!(parse_line(junk).is_none_or(|mount| !mount.is_ours()), "{junk:?}");
        }
        assert!(mounted_at(Path::new("/proc")).unwrap().is_some_and(|mount| mount.kind == "proc"));
    }

    #[test]
    fn unfit_mount_points_are_refused_and_the_text_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let message = |path: &Path| prepare(path, false).unwrap_err().to_string();
        assert!(message(&dir.path().join("absent")).contains("mkdir -p"));
        assert!(message(&dir.path().join("absent/deeper")).contains("mkdir -p"));
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(message(&file).contains("not a directory"));
        assert!(message(dir.path()).contains("not empty"));
    }

    #[test]
    fn user_allow_other_is_found_only_where_it_counts() {
        assert!(others_allowed(&Ok("# x\nuser_allow_other\n".to_owned())));
        assert!(!others_allowed(&Ok("#user_allow_other\n".to_owned())));
        assert!(!others_allowed(&Err(io::Error::from(io::ErrorKind::NotFound))));
    }
}
