//! MOUNT/disks through the kernel: what hypervisors and people do to a raw file.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock};
use rustix::io::Errno;

use crate::support::{CHUNK, Mirror, World, errno, pattern};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn open_direct(path: &Path) -> File {
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// Writes to the file and to what it should be.
fn write(file: &File, model: &mut [u8], offset: u64, data: &[u8]) {
    file.write_all_at(data, offset).unwrap();
    model[offset as usize..offset as usize + data.len()].copy_from_slice(data);
}

#[track_caller]
fn assert_same(path: &Path, model: &[u8]) {
    let found = fs::read(path).unwrap();
    assert_eq!(found.len(), model.len());
    let differs = found.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte that differs");
}

#[test]
fn a_disk_reads_as_its_snapshot_and_writes_stay_its_own() {
    let world = World::new();
    let bytes = pattern(8 * CHUNK + 4096);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let (one, two) = (mirror.attach("vm", "one"), mirror.attach("vm", "two"));
    assert_same(&one, &bytes);
    let mut model = bytes.clone();
    let file = open(&one);
    // Across borders of sectors and chunks, in chunks never fetched, and up to the very end.
    for (offset, len) in [
        (0, 1),
        (4095, 2),
        (CHUNK - 1, 2),
        (CHUNK - 4096, 8192),
        (2 * CHUNK + 100, 3 * CHUNK as usize),
        (8 * CHUNK + 4095, 1),
        (7 * CHUNK, CHUNK as usize),
        (5, 0),
    ] {
        write(&file, &mut model, offset, &vec![0xA5; len]);
        assert_same(&one, &model);
    }
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    assert_same(&two, &bytes);
    assert_same(&mirror.path("images/vm/1.raw"), &bytes);
    let data = fs::metadata(&one).unwrap();
    assert_eq!(data.len(), model.len() as u64);
    let mode = if rustix::process::geteuid().is_root() { 0o666 } else { 0o600 };
    assert_eq!(data.permissions().mode() & 0o777, mode);
    let names: Vec<_> =
        fs::read_dir(mirror.path("disks")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["one.raw", "two.raw"]);
}

#[test]
fn direct_and_unaligned_io_agree() {
    let world = World::new();
    let mut model = pattern(6 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let (direct, plain) = (open_direct(&path), open(&path));
    // No alignment is asked for, in memory or in the file.
    let mut buffer = vec![0u8; 3 * CHUNK as usize + 7];
    for (seed, (offset, len)) in
        [(1u64, 513usize), (511, 4096), (CHUNK - 3, 7), (CHUNK + 4096, 65536), (9, 3 * 65536 + 5)]
            .into_iter()
            .enumerate()
    {
        let data = &mut buffer[1..=len];
        data.fill(seed as u8 + 1);
        write(&direct, &mut model, offset, data);
        let mut back = vec![0; len + 3];
        plain.read_exact_at(&mut back, offset).unwrap();
        assert!(back[..] == model[offset as usize..offset as usize + len + 3]);
        back.fill(0);
        direct.read_exact_at(&mut back[1..], offset + 1).unwrap();
        assert!(back[1..] == model[offset as usize + 1..offset as usize + len + 3]);
    }
    assert_same(&path, &model);
}

#[test]
fn discards_and_zeros_read_as_zeros_and_are_holes() {
    let world = World::new();
    let mut model = pattern(12 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let file = open(&path);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let zero = FallocateFlags::ZERO_RANGE;
    for (flags, offset, len) in [
        (punch, 0, CHUNK),
        (punch, 3 * CHUNK + 4096, 8192),
        (zero, 4 * CHUNK + 1, 4095),
        (zero, 6 * CHUNK + 100, 2 * CHUNK),
        (zero | FallocateFlags::KEEP_SIZE, 9 * CHUNK, CHUNK),
        (punch, 10 * CHUNK, 100 * CHUNK),
    ] {
        fallocate(&file, flags, offset, len).unwrap();
        let end = (offset + len).min(12 * CHUNK);
        model[offset as usize..end as usize].fill(0);
        assert_same(&path, &model);
    }
    // Parts of sectors too: QEMU writes zeros with a punch when it may unmap.
    write(&file, &mut model, 3 * CHUNK, &[7; 4096]);
    fallocate(&file, punch, 3 * CHUNK + 10, 5).unwrap();
    model[3 * CHUNK as usize + 10..][..5].fill(0);
    assert_same(&path, &model);

    let seek = |to| rustix::fs::seek(&file, to);
    assert_eq!(seek(SeekFrom::Data(0)), Ok(CHUNK));
    assert_eq!(seek(SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(SeekFrom::Data(10 * CHUNK)), Err(Errno::NXIO));
    assert_eq!(seek(SeekFrom::Hole(12 * CHUNK)), Err(Errno::NXIO));
    assert_eq!(seek(SeekFrom::End(0)), Ok(12 * CHUNK));

    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, CHUNK), Err(Errno::OPNOTSUPP));
    assert_eq!(fallocate(&file, zero, 12 * CHUNK, 1), Err(Errno::NOSPC));
    assert_eq!(fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, CHUNK), Err(Errno::OPNOTSUPP));
}

#[test]
fn a_disk_neither_grows_nor_shrinks() {
    let world = World::new();
    let size = 2 * CHUNK + 512;
    world.image("vm", pattern(size));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let file = open(&path);
    assert_eq!(errno(file.set_len(size - 1)), Errno::PERM);
    assert_eq!(errno(file.set_len(size + 1)), Errno::PERM);
    file.set_len(size).unwrap();
    assert_eq!(errno(File::create(&path)), Errno::PERM);
    assert_eq!(errno(file.write_at(b"x", size)), Errno::NOSPC);
    assert_eq!(errno(file.write_at(b"x", u64::MAX >> 2)), Errno::NOSPC);
    assert_eq!(file.write_at(b"xyz", size - 2).unwrap(), 2, "as much as fits");
    let mut end = [0; 9];
    assert_eq!(file.read_at(&mut end, size - 2).unwrap(), 2);
    assert_eq!(&end[..2], b"xy");
    assert_eq!(fs::metadata(&path).unwrap().len(), size);
    assert!(matches!(errno(fs::remove_file(&path)), Errno::PERM | Errno::ACCESS));
    // Times and owners are taken.
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(64055), Some(64055)).unwrap();
        let data = fs::metadata(&path).unwrap();
        assert_eq!((data.uid(), data.gid()), (64055, 64055));
    }
}

#[test]
fn a_disk_can_be_larger_than_its_snapshot() {
    let world = World::new();
    let bytes = pattern(2 * CHUNK + 700);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let grown = 5 * CHUNK;
    let path = mirror.try_attach("vm", 1, "d", grown).unwrap().path;
    let mut model = bytes;
    model.resize(grown as usize, 0);
    assert_same(path.as_ref(), &model);
    write(&open(path.as_ref()), &mut model, 2 * CHUNK + 690, &[3; 20]);
    write(&open(path.as_ref()), &mut model, grown - 1, &[4]);
    assert_same(path.as_ref(), &model);
}

#[test]
fn a_disk_can_be_mapped() {
    let world = World::new();
    let mut model = pattern(4 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let file = open(&path);
    // SAFETY: nobody but this test has the disk.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    assert!(map[..] == model[..]);
    for offset in [0, 5000, CHUNK as usize * 2 - 1, CHUNK as usize * 4 - 4096] {
        map[offset..offset + 3].copy_from_slice(b"map");
        model[offset..offset + 3].copy_from_slice(b"map");
    }
    map.flush().unwrap();
    assert_same(&path, &model);
    write(&file, &mut model, 9000, b"behind the map");
    assert_eq!(&map[9000..9014], b"behind the map");
}

#[test]
fn locks_keep_a_second_hypervisor_out() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let (first, second) = (open(&path), open(&path));
    flock(&first, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(flock(&second, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
    drop(first);
    flock(&second, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[test]
fn unknown_ioctls_and_attributes_are_refused_as_hypervisors_expect() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    let file = open(&mirror.attach("vm", "d"));
    let mut out = [0u8; 16];
    for _ in 0..2 {
        // BLKSSZGET and XFS_IOC_DIOINFO, with which QEMU looks for the alignment.
        assert_eq!(crate::ioctls::raw::<0x1268, 16>(&file, &mut out), Err(Errno::NOTTY));
        assert_eq!(crate::ioctls::raw::<0x800c_581e, 16>(&file, &mut out), Err(Errno::NOTTY));
    }
    assert_eq!(out, [0; 16]);
    let mut value = [0u8; 64];
    let found = rustix::fs::fgetxattr(&file, "security.capability", &mut value[..]);
    assert_eq!(found, Err(Errno::OPNOTSUPP));
    let stat = rustix::fs::fstatvfs(&file).unwrap();
    assert!(stat.f_blocks > 0 && stat.f_bsize > 0);
}

/// Runs a program as a user that is neither root nor us.
fn as_nobody(program: &str, arguments: &[&str]) -> std::process::Output {
    std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", program])
        .args(arguments)
        .output()
        .expect("setpriv (package util-linux) must be installed")
}

#[test]
fn another_user_can_use_a_disk_if_the_mode_allows() {
    if !rustix::process::geteuid().is_root() {
        // Only root can be somebody else.
        return;
    }
    let world = World::new();
    let bytes = pattern(2 * CHUNK);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let file = path.to_str().unwrap();
    let read = as_nobody("cat", &[file]);
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    assert!(read.stdout == bytes);
    let target = format!("of={file}");
    let wrote =
        as_nobody("dd", &["if=/dev/zero", &target, "conv=notrunc,fsync", "bs=4k", "count=1"]);
    assert!(wrote.status.success(), "{}", String::from_utf8_lossy(&wrote.stderr));
    assert_eq!(fs::read(&path).unwrap()[..4096], [0; 4096]);
    let image = mirror.path("images/vm/1.raw");
    assert!(as_nobody("cat", &[image.to_str().unwrap()]).stdout == bytes);

    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!as_nobody("cat", &[file]).status.success());
    drop(mirror);

    let mut options = world.options();
    options.allow_other = false;
    let mirror = world.try_start(options).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!as_nobody("ls", &[mirror.mount.to_str().unwrap()]).status.success());
    drop(mirror);

    let mut options = world.options();
    (options.disk_mode, options.disk_uid) = (Some(0o600), Some(65534));
    let _mirror: Mirror<'_> = world.try_start(options).unwrap();
    assert!(as_nobody("cat", &[file]).status.success());
}
