//! Brings what the guest's kernel still holds back onto its disks.
//!
//! First every mounted file system that lives on a block device (`syncfs`), those mounted last
//! first, because a loop device's file lies on one mounted before. Then every disk: `fsync` of the
//! device writes what was written to it directly and makes it flush its cache.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fstat, fsync, major, minor, open, syncfs};
use rustix::io::Errno;

use crate::error::GuestError;

pub(crate) const MOUNTS: &str = "/proc/thread-self/mountinfo";
const DISKS: &str = "/sys/block";
/// Devices of memory, of other devices' bytes, or with media that may be missing.
const NO_DISKS: [&str; 5] = ["loop", "ram", "zram", "sr", "fd"];

/// What was flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flushed {
    /// File systems.
    pub file_systems: usize,
    /// Disks.
    pub disks: usize,
}

/// Flushes every file system on a block device and every disk of this machine.
///
/// # Errors
/// When one of them cannot be flushed: a checkpoint taken then would lack acknowledged bytes.
pub fn everything() -> Result<Flushed, GuestError> {
    let text = fs::read_to_string(MOUNTS).map_err(GuestError::io("read", MOUNTS))?;
    let mounts = block_mounts(&text);
    let mut synced = HashSet::new();
    for mount in mounts.iter().rev() {
        if !synced.contains(mount.device) && sync_mount(mount)? {
            synced.insert(mount.device);
        }
    }
    if mounts.iter().any(|mount| !synced.contains(mount.device)) {
        // Other mounts cover all of its mount points: only the kernel still reaches it.
        rustix::fs::sync();
    }
    Ok(Flushed { file_systems: synced.len(), disks: disks()? })
}

/// Flushes every disk of this machine; how many. Frozen file systems do not hold it up.
///
/// # Errors
/// When one of them cannot be flushed.
pub fn disks() -> Result<usize, GuestError> {
    let mut disks = 0;
    for name in disk_names(Path::new(DISKS)).map_err(GuestError::io("list", DISKS))? {
        disks += usize::from(sync_disk(&Path::new("/dev").join(name))?);
    }
    Ok(disks)
}

/// Whether the file system was reached by this mount point, and then it is synced.
fn sync_mount(mount: &BlockMount<'_>) -> Result<bool, GuestError> {
    let Some(fd) = open_mount(mount)? else { return Ok(false) };
    syncfs(&fd).map_err(|e| GuestError::io("sync the file system", &mount.path)(e.into()))?;
    Ok(true)
}

/// The mount point, when it is the one of this mount still.
pub(crate) fn open_mount(mount: &BlockMount<'_>) -> Result<Option<OwnedFd>, GuestError> {
    let path = &mount.path;
    // Not as a path only: syncfs wants a file that was really opened.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = match open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        // Unmounted since, or below another mount.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::PERM) => return Ok(None),
        Err(error) => return Err(GuestError::io("open the mount", path)(error.into())),
    };
    let stat = fstat(&fd).map_err(|e| GuestError::io("look at the mount", path)(e.into()))?;
    let found = format!("{}:{}", major(stat.st_dev), minor(stat.st_dev));
    // A btrfs subvolume has a number of its own, which is not the one in mountinfo.
    Ok((found == mount.device || mount.device.starts_with("0:")).then_some(fd))
}

fn sync_disk(device: &Path) -> Result<bool, GuestError> {
    match open(device, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()) {
        Ok(fd) => {
            fsync(&fd).map_err(|e| GuestError::io("flush the disk", device)(e.into()))?;
            Ok(true)
        }
        // Without a medium, or kept from this program: then it has written nothing there directly,
        // and the file systems have flushed the disk for what is theirs.
        Err(
            Errno::NOENT
            | Errno::NXIO
            | Errno::NODEV
            | Errno::NOMEDIUM
            | Errno::ACCESS
            | Errno::PERM,
        ) => Ok(false),
        Err(error) => Err(GuestError::io("open the disk", device)(error.into())),
    }
}

/// A mount of a file system on a block device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BlockMount<'a> {
    /// `MAJOR:MINOR`
    pub(crate) device: &'a str,
    pub(crate) path: PathBuf,
    /// Whether the file system itself is, by any of its mounts.
    pub(crate) writable: bool,
}

/// All mounts of file systems on block devices, in the order of mounting.
pub(crate) fn block_mounts(mountinfo: &str) -> Vec<BlockMount<'_>> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        let mut fields = line.split(' ');
        let (Some(device), Some(mount)) = (fields.nth(2), fields.nth(1)) else { continue };
        let mut fields = fields.skip_while(|f| *f != "-");
        let source = fields.nth(2).unwrap_or_default();
        let writable = fields.next().is_some_and(|o| o.split(',').any(|o| o == "rw"));
        // btrfs has a device number of no block device (0:N), but its source is one.
        if !device.starts_with("0:") || source.starts_with("/dev/") {
            found.push(BlockMount { device, path: PathBuf::from(unescape(mount)), writable });
        }
    }
    found
}

/// mountinfo writes blanks, tabs, newlines and backslashes as `\ooo`.
fn unescape(field: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = field.get(at + 1..at + 4).and_then(|o| u8::from_str_radix(o, 8).ok());
        match (bytes[at], octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                at += 4;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out)
}

fn disk_names(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let is_disk = !NO_DISKS.iter().any(|prefix| {
            name.strip_prefix(prefix).is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
        });
        if is_disk {
            // A name like cciss/c0d0 is written with '!' there.
            names.push(name.replace('!', "/"));
        }
    }
    names.sort();
    Ok(names)
}

/// Makes a file's bytes and its directory entry durable.
pub(crate) fn sync_file_and_dir(file: &File, dir: &Path) -> io::Result<()> {
    file.sync_all()?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_block_devices_are_found() {
        let mountinfo = "\
21 1 254:0 / / rw,relatime - ext4 /dev/root rw
22 21 0:20 / /proc rw - proc proc rw
23 21 0:5 / /dev rw shared:2 - devtmpfs dev rw
24 21 254:16 / /data\\040disk rw master:1 shared:7 - xfs /dev/vdb rw
25 21 254:0 /var /srv rw - ext4 /dev/root rw
26 21 0:40 / /pool rw - btrfs /dev/vdc rw
27 24 7:0 / /loop rw - ext4 /dev/loop0 ro,norecovery
28 21 0:41 / /net rw - nfs4 server:/x rw
broken line
";
        let found: Vec<_> = block_mounts(mountinfo)
            .into_iter()
            .map(|mount| {
                let (device, path) = (mount.device, mount.path.display());
                format!("{device} {path}{}", if mount.writable { "" } else { " ro" })
            })
            .collect();
        assert_eq!(
            found,
            ["254:0 /", "254:16 /data disk", "254:0 /srv", "0:40 /pool", "7:0 /loop ro"]
        );
    }

    #[test]
    fn the_file_systems_of_this_machine_can_be_flushed() {
        // As any user: what cannot be opened is left to the kernel.
        everything().unwrap();
    }

    #[test]
    fn escapes_are_undone_and_stray_ones_kept() {
        for (field, plain) in
            [("a\\040b", "a b"), ("a\\134", "a\\"), ("a\\", "a\\"), ("\\9", "\\9")]
        {
            assert_eq!(unescape(field), plain);
        }
    }

    #[test]
    fn disks_are_told_from_memory_and_loops() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vda", "loop0", "ram1", "zram0", "sr0", "fd0", "nvme0n1", "cciss!c0d0", "srv"]
        {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(disk_names(dir.path()).unwrap(), ["cciss/c0d0", "nvme0n1", "srv", "vda"]);
    }
}
