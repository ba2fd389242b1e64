//! Many disks of one snapshot in one call.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use blobcr_mirror_fuse::HostError;
use blobcr_proto::v1;

use crate::support::{CHUNK, Mirror, World, pattern};

fn fork(mirror: &Mirror<'_>, names: &[&str]) -> Result<Vec<v1::Disk>, HostError> {
    let image = Some(v1::ImageRef { name: "vm".into(), id: 0 });
    let request = v1::ForkDisksRequest {
        source: Some(v1::SnapshotRef { image, number: 1 }),
        disks: names.iter().map(|name| (*name).to_owned()).collect(),
        size_bytes: 0,
    };
    mirror.block_on(mirror.host().fork(request))
}

fn pinned(world: &World) -> usize {
    let all = v1::ListPinsRequest::default();
    world.block_on(world.repository.catalog().list_pins(all)).unwrap().pins.len()
}

#[test]
fn forks_are_disks_of_their_own_and_there_after_a_restart() {
    let world = World::new();
    let bytes = pattern(4 * CHUNK);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let names: Vec<String> = (0..70).map(|number| format!("f{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let made = fork(&mirror, &names).unwrap();
    assert_eq!(made.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), names);
    assert_eq!(pinned(&world), names.len());
    let write = |name: &str, byte: u8| {
        let path = mirror.path(format!("disks/{name}.raw"));
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&[byte; 5000], CHUNK).unwrap();
        file.sync_all().unwrap();
    };
    write("f1", 1);
    write("f69", 2);
    mirror.stop();
    let mirror = world.start();
    for (name, wrote) in [("f0", None), ("f1", Some(1)), ("f69", Some(2))] {
        let mut model = bytes.clone();
        if let Some(byte) = wrote {
            model[CHUNK as usize..][..5000].fill(byte);
        }
        assert!(fs::read(mirror.path(format!("disks/{name}.raw"))).unwrap() == model, "{name}");
    }
    for name in names {
        mirror.block_on(mirror.host().detach(name, true)).unwrap();
    }
    assert_eq!(pinned(&world), 0);
}

#[test]
fn all_disks_of_a_fork_are_made_or_none() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    fork(&mirror, &["taken"]).unwrap();
    // A file where the directory of a disk is to be.
    fs::create_dir_all(world.dir.path().join("mirror/disks")).unwrap();
    let in_the_way = world.dir.path().join("mirror/disks/c");
    fs::write(&in_the_way, "not a directory").unwrap();
    for names in [&["a", "taken", "b"][..], &["a", "b", "a"], &["a", "b", "c"], &[], &["a", "/"]] {
        assert!(fork(&mirror, names).is_err(), "{names:?}");
        let left: Vec<_> = mirror.host().list().into_iter().map(|disk| disk.name).collect();
        assert_eq!(left, ["taken"], "{names:?}");
        assert_eq!(pinned(&world), 1, "{names:?}");
        assert!(!world.dir.path().join("mirror/disks/a").exists(), "{names:?}");
    }
    fs::remove_file(in_the_way).unwrap();
    assert_eq!(fork(&mirror, &["a", "b", "c"]).unwrap().len(), 3);
}
