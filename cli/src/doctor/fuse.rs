//! Whether this process may serve a FUSE mount, and to whom.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::Check;

/// CAP_SYS_ADMIN, the right to mount (include/uapi/linux/capability.h).
const CAP_SYS_ADMIN: u32 = 21;

/// The device through which the kernel talks to a FUSE server.
pub(super) fn device(path: &Path) -> Check {
    const NAME: &str = "/dev/fuse";
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok(NAME, "can be opened"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Check::fail(
            NAME,
            "is not there",
            "load the module (`modprobe fuse`); in a container add `--device /dev/fuse`",
        ),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Check::fail(
            NAME,
            "may not be opened by this user",
            "run as root, or `chmod 666 /dev/fuse` (the default of every distribution)",
        ),
        Err(e) => Check::fail(
            NAME,
            format!("cannot be opened: {e}"),
            "load the module (`modprobe fuse`); in a container add `--device /dev/fuse`",
        ),
    }
}

/// mount(2) itself, or the setuid helper.
pub(super) fn permission_to_mount() -> Check {
    const NAME: &str = "mount";
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let may_mount = has_capability(&status, CAP_SYS_ADMIN);
    match (in_path("fusermount3"), may_mount) {
        (Some(helper), true) => Check::ok(NAME, format!("CAP_SYS_ADMIN, and {}", helper.display())),
        (None, true) => Check::warn(
            NAME,
            "CAP_SYS_ADMIN, but no fusermount3",
            "install fuse3 (`apt-get install fuse3`): without it only root can mount and unmount",
        ),
        (Some(helper), false) if is_setuid_root(&helper) => {
            Check::ok(NAME, format!("through {}", helper.display()))
        }
        (Some(helper), false) => Check::fail(
            NAME,
            format!("{} is not setuid root and this user may not mount", helper.display()),
            format!("run as root, or `chmod u+s {}` (the package fuse3 does)", helper.display()),
        ),
        (None, false) => Check::fail(
            NAME,
            "this user may not mount and there is no fusermount3",
            "install fuse3 (`apt-get install fuse3`), or run as root",
        ),
    }
}

/// A hypervisor often runs as a user of its own: the mount must let it in.
pub(super) fn other_users(config: &Path) -> Check {
    const NAME: &str = "allow_other";
    if rustix::process::geteuid().is_root() {
        return Check::ok(NAME, "root may let other users into its mounts");
    }
    if others_may_enter(config) {
        return Check::ok(NAME, "user_allow_other is set");
    }
    Check::warn(
        NAME,
        "only this user will see the mount, so a hypervisor must run as this user too",
        format!("add the line `user_allow_other` to {}", config.display()),
    )
}

/// Whether this user may let others into its mounts. `config` is `/etc/fuse.conf`.
pub(crate) fn others_may_enter(config: &Path) -> bool {
    let root = rustix::process::geteuid().is_root();
    root || fs::read_to_string(config).is_ok_and(|text| allows_other(&text))
}

fn allows_other(fuse_conf: &str) -> bool {
    fuse_conf.lines().any(|line| line.trim() == "user_allow_other")
}

fn has_capability(proc_status: &str, bit: u32) -> bool {
    proc_status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|mask| mask >> bit & 1 == 1)
}

/// The first file of this name in PATH.
pub(super) fn in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

fn is_setuid_root(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    const SETUID: u32 = 0o4000;
    fs::metadata(path).is_ok_and(|meta| meta.uid() == 0 && meta.permissions().mode() & SETUID != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn a_missing_device_says_how_to_get_it() {
        let check = device(Path::new("/nonexistent/fuse"));
        assert_eq!(check.state, State::Fail);
        assert!(check.mend.unwrap().contains("modprobe fuse"));
    }

    #[test]
    fn capabilities_are_read_by_bit() {
        let status = "Name:\tx\nCapEff:\t0000000000200000\nCapBnd:\tffffffffffffffff\n";
        assert!(has_capability(status, CAP_SYS_ADMIN));
        assert!(!has_capability(status, 20));
        assert!(!has_capability("", CAP_SYS_ADMIN));
    }

    #[test]
    fn a_comment_does_not_allow_others() {
        assert!(allows_other("# x\n user_allow_other \n"));
        assert!(!allows_other("#user_allow_other\n"));
    }
}
