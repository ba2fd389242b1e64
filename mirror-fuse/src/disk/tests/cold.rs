//! What is on this host, but not in its memory.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::Advice;

use super::super::*;
use super::support::*;

#[tokio::test]
async fn what_is_not_in_memory_is_told_and_read_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let size = 4 * CHUNK as u64;
    let source = world.image("base", &pattern(1, size as usize));
    let path = dir.path().join("disk");
    let disk =
        Disk::create(&path, spec_of("disk", source, size), deps(&world, (4, 4), "boot")).unwrap();
    let bytes = pattern(2, 2 * CHUNK);
    disk.put(CHUNK as u64, &bytes).await;
    disk.flush().unwrap();
    let mut out = vec![0; CHUNK];
    let at = CHUNK as u64 + 1000;
    assert!(matches!(disk.quick_read(at, &mut out).unwrap(), QuickRead::Done));
    assert!(out == bytes[1000..1000 + CHUNK]);

    let delta = File::open(path.join("gen-1/delta")).unwrap();
    rustix::fs::fadvise(&delta, 0, None, Advice::DontNeed).unwrap();
    out.fill(0);
    // A file system in memory keeps everything there.
    if let QuickRead::Cold(cold) = disk.quick_read(at, &mut out).unwrap() {
        assert_eq!((cold.offset, cold.len), (at, CHUNK));
        // What is written meanwhile may be seen: it was not acknowledged before the read began.
        disk.put(at, b"new").await;
        let mut from_file = vec![0; CHUNK];
        File::from(cold.as_fd().try_clone_to_owned().unwrap())
            .read_exact_at(&mut from_file, cold.offset)
            .unwrap();
        cold.read(&mut out).unwrap();
        assert!(out == from_file && out.starts_with(b"new"));
        assert!(out[3..] == bytes[1003..1000 + CHUNK]);
    }
    // Half of it is the snapshot's: not one range of one file.
    let mixed = CHUNK as u64 / 2;
    assert!(matches!(disk.quick_read(mixed, &mut out).unwrap(), QuickRead::NeedsAsync));
    assert!(disk.read(mixed, CHUNK).await.unwrap()[CHUNK / 2..][..1000] == bytes[..1000]);
}
