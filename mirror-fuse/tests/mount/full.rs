//! A host whose file system is full: the cache gives way, a guest gets a clear error, and nothing
//! that was written is lost.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::support::{CHUNK, World, errno, pattern};

/// A file system of its own, of so many bytes.
struct Small(PathBuf);

impl Small {
    /// `None` for users who may not mount.
    fn at(point: &Path, bytes: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        fs::create_dir_all(point).unwrap();
        let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        mount("tmpfs", point, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).unwrap();
        Some(Self(point.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_host_is_a_clear_refusal_and_loses_nothing() {
    let world = World::new();
    let image = pattern(24 << 20);
    world.image("vm", image.clone());
    let Some(_small) = Small::at(&world.dir.path().join("mirror"), 12 << 20) else { return };
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    // More than there is room to cache: all of it is read nevertheless.
    for _ in 0..2 {
        assert!(fs::read(&path).unwrap() == image);
    }
    let mut model = image;
    let file: File = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let piece = vec![0xAB; CHUNK as usize];
    let mut refused = None;
    for chunk in 0..(24 << 20) / CHUNK {
        match file.write_all_at(&piece, chunk * CHUNK) {
            Ok(()) => model[(chunk * CHUNK) as usize..][..CHUNK as usize].fill(0xAB),
            error => {
                refused = Some((chunk, errno(error)));
                break;
            }
        }
    }
    let (chunk, error) = refused.expect("24 MiB cannot fit in 12");
    assert_eq!(error, Errno::NOSPC);
    assert!(chunk * CHUNK > 8 << 20, "the cache made room for {chunk} chunks only");
    // What was acknowledged is there; the refused chunk is in part old and in part new.
    let now = fs::read(&path).unwrap();
    let at = (chunk * CHUNK) as usize;
    assert!(now[..at] == model[..at]);
    assert!(now[at + CHUNK as usize..] == model[at + CHUNK as usize..]);
    for (byte, old) in now[at..at + CHUNK as usize].iter().zip(&model[at..]) {
        assert!(*byte == 0xAB || byte == old);
    }
    // A guest that discards gets its room back.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, chunk * CHUNK).unwrap();
    file.write_all_at(&piece, chunk * CHUNK).unwrap();
    file.sync_all().unwrap();
    assert!(fs::read(&path).unwrap()[at..at + CHUNK as usize] == piece[..]);
}
