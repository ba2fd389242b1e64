//! MOUNT/images through the kernel.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use blobcr_proto::v1;
use blobcr_proto::v1::RecordKind;
use blobcr_repository::CatalogError;
use rustix::io::Errno;

use crate::support::{CHUNK, World, errno, eventually, pattern};

#[test]
fn a_snapshot_is_a_plain_read_only_file() {
    let world = World::new();
    let bytes = pattern(10 * CHUNK + 777);
    world.image("debian-12", bytes.clone());
    let mirror = world.start();
    let path = mirror.path("images/debian-12/1.raw");

    assert_eq!(fs::read(&path).unwrap(), bytes, "first read: fetched");
    assert_eq!(fs::read(&path).unwrap(), bytes, "second read: local");
    let data = fs::metadata(&path).unwrap();
    assert!(data.is_file());
    assert_eq!((data.len(), data.permissions().mode() & 0o7777), (bytes.len() as u64, 0o444));

    let file = File::open(&path).unwrap();
    let mut part = [0; 1000];
    file.read_exact_at(&mut part, CHUNK - 500).unwrap();
    assert_eq!(part[..], bytes[CHUNK as usize - 500..CHUNK as usize + 500]);
    assert_eq!(file.read_at(&mut part, bytes.len() as u64 - 5).unwrap(), 5);
    assert_eq!(file.read_at(&mut part, bytes.len() as u64 + 5).unwrap(), 0);

    // What the kernel's own check of permissions lets through, we refuse.
    let refused = |errno| matches!(errno, Errno::ROFS | Errno::PERM | Errno::ACCESS);
    assert!(refused(errno(OpenOptions::new().write(true).open(&path))));
    assert!(refused(errno(OpenOptions::new().append(true).open(&path))));
    assert!(refused(errno(fs::remove_file(&path))));
    assert!(refused(errno(fs::rename(&path, mirror.path("x")))));
    assert!(refused(errno(fs::set_permissions(&path, fs::Permissions::from_mode(0o600)))));
    assert!(refused(errno(File::create(mirror.path("images/debian-12/2.raw")))));
    assert!(refused(errno(fs::create_dir(mirror.path("images/new")))));
    assert!(refused(errno(File::create(mirror.path("disks/new.raw")))));
    assert_eq!(fs::read(&path).unwrap(), bytes, "and nothing has changed");
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let direct = OpenOptions::new().read(true).custom_flags(flags).open(&path).unwrap();
    let mut page = vec![0; 2 * CHUNK as usize];
    direct.read_exact_at(&mut page, CHUNK).unwrap();
    assert!(page == bytes[CHUNK as usize..3 * CHUNK as usize]);
}

#[test]
fn a_snapshot_can_be_mapped() {
    let world = World::new();
    let bytes = pattern(4 * CHUNK);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let file = File::open(mirror.path("images/vm/1.raw")).unwrap();
    // SAFETY: a snapshot's file never changes.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    assert!(map[..] == bytes[..]);
}

#[test]
fn holes_are_found_by_whole_chunks() {
    let world = World::new();
    world.image("vm", pattern(6 * CHUNK));
    let mirror = world.start();
    let file = File::open(mirror.path("images/vm/1.raw")).unwrap();
    let seek = |to| rustix::fs::seek(&file, to);
    assert_eq!(seek(rustix::fs::SeekFrom::Data(0)), Ok(0));
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(10)), Ok(2 * CHUNK));
    assert_eq!(seek(rustix::fs::SeekFrom::Data(2 * CHUNK)), Ok(3 * CHUNK));
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(3 * CHUNK)), Ok(5 * CHUNK));
    assert_eq!(seek(rustix::fs::SeekFrom::Data(5 * CHUNK)), Err(Errno::NXIO));
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(5 * CHUNK + 1)), Ok(5 * CHUNK + 1));
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(6 * CHUNK)), Err(Errno::NXIO));
}

#[test]
fn the_tree_shows_what_the_catalog_has() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let request = v1::CreateImageRequest { name: "empty".into(), ..Default::default() };
    world.block_on(world.repository.catalog().create_image(request)).unwrap();
    let mirror = world.start();
    let names = |path: &str| -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(mirror.path(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["disks", "images"]);
    assert_eq!(names("images"), ["empty", "vm"]);
    assert_eq!(names("images/vm"), ["1.raw", "latest.raw"]);
    assert_eq!(names("images/empty"), [""; 0]);
    assert_eq!(names("disks"), [""; 0]);
    let link = mirror.path("images/vm/latest.raw");
    assert_eq!(fs::read_link(&link).unwrap().to_str(), Some("1.raw"));
    assert_eq!(fs::read(&link).unwrap(), pattern(CHUNK));
    assert!(fs::symlink_metadata(&link).unwrap().file_type().is_symlink());
    assert!(!fs::metadata(&link).unwrap().file_type().is_fifo());

    for absent in [
        "nothing",
        "images/no",
        "images/vm/2.raw",
        "images/vm/0.raw",
        "images/vm/01.raw",
        "images/vm/1",
        "images/empty/latest.raw",
        "images/.hidden",
        "images/a b",
        "images/ä",
        "disks/d.raw",
        "disks/..raw",
    ] {
        assert_eq!(errno(fs::metadata(mirror.path(absent))), Errno::NOENT, "{absent}");
    }
    let long = "n".repeat(200);
    assert_eq!(errno(fs::metadata(mirror.path("images").join(long))), Errno::NOENT);
    assert_eq!(errno(fs::metadata(mirror.path("images/vm/1.raw/x"))), Errno::NOTDIR);

    // What is told of a file by listing is what `stat` tells.
    for entry in fs::read_dir(mirror.path("images/vm")).unwrap() {
        let entry = entry.unwrap();
        let data = fs::symlink_metadata(entry.path()).unwrap();
        assert_eq!(std::os::unix::fs::DirEntryExt::ino(&entry), data.ino());
    }
    // An image that comes later is there as soon as it is asked for by name.
    world.image("later", pattern(3));
    assert_eq!(fs::read(mirror.path("images/later/1.raw")).unwrap(), pattern(3));
    eventually("the new image in the listing", || names("images").len() == 3);
}

#[test]
fn thousands_of_images_are_listed_once_each() {
    let world = World::new();
    let catalog = world.repository.catalog();
    world.block_on(async {
        for n in 0..3000 {
            let name = format!("image-{n:04}");
            let request = v1::CreateImageRequest { name, ..Default::default() };
            catalog.create_image(request).await.unwrap();
        }
    });
    let mirror = world.start();
    for _ in 0..2 {
        let mut listed: Vec<_> = fs::read_dir(mirror.path("images"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        listed.sort();
        assert!(listed.into_iter().eq((0..3000).map(|n| format!("image-{n:04}"))));
    }
    assert!(world.catalog.faults().calls("list_images") <= 2 * 7, "it is read page by page");
}

#[test]
fn a_file_that_is_open_outlives_the_catalog_and_errors_name_their_kind() {
    let world = World::new();
    let bytes = pattern(4 * CHUNK);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let mut file = File::open(mirror.path("images/vm/1.raw")).unwrap();
    let mut first = vec![0; CHUNK as usize];
    file.read_exact(&mut first).unwrap();

    world.catalog.faults().down(CatalogError::Unavailable("down for the test".into()));
    file.seek(SeekFrom::Start(CHUNK)).unwrap();
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).unwrap();
    assert!(rest == bytes[CHUNK as usize..]);
    assert_eq!(errno(fs::metadata(mirror.path("images/other"))), Errno::TIMEDOUT);
    assert_eq!(
        errno(
            fs::read_dir(mirror.path("images"))
                .and_then(|mut dir| { dir.next().unwrap_or_else(|| Err(ErrorKind::Other.into())) })
        ),
        Errno::TIMEDOUT
    );
    world.catalog.faults().up();
    assert!(fs::metadata(mirror.path("images/vm")).unwrap().is_dir());
}

#[test]
fn a_lost_chunk_is_an_error_of_its_own_bytes_only() {
    let world = World::new();
    let bytes = pattern(2 * CHUNK);
    world.image("vm", bytes.clone());
    let lost = blobcr_proto::Hash::of(&bytes[CHUNK as usize..]);
    assert!(world.pool.lose(RecordKind::Chunk, &lost));
    let mirror = world.start();
    let file = File::open(mirror.path("images/vm/1.raw")).unwrap();
    let mut part = [0; 100];
    assert_eq!(errno(file.read_at(&mut part, CHUNK + 5)), Errno::IO);
    file.read_exact_at(&mut part, 5).unwrap();
    assert_eq!(part[..], bytes[5..105]);
}
