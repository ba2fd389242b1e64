//! A mirror as its operator sees it: attach, detach, rollback, restart, kill, and the service.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blobcr_mirror_fuse::HostError;
use blobcr_mirror_fuse::mount::MountError;
use blobcr_proto::v1;
use blobcr_repository::{CatalogError, StoreError};
use rustix::io::Errno;
use tonic::Code;

use crate::support::{CHUNK, Mirror, World, errno, eventually, is_mounted, pattern};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn code(result: Result<impl std::fmt::Debug, HostError>) -> (Code, String) {
    let status = tonic::Status::from(result.expect_err("the call must fail"));
    (status.code(), status.message().to_owned())
}

#[test]
fn attaching_needs_a_good_name_and_a_stable_snapshot() {
    let world = World::new();
    world.image("vm", pattern(4 * CHUNK));
    let mirror = world.start();
    let disk = mirror.try_attach("vm", 1, "d", 0).unwrap();
    assert_eq!((disk.name.as_str(), disk.image.as_str(), disk.snapshot), ("d", "vm", 1));
    assert_eq!(Path::new(&disk.path), mirror.path("disks/d.raw"));
    assert_eq!((disk.size_bytes, disk.chunk_size), (4 * CHUNK, CHUNK as u32));
    assert_eq!((disk.checkpoint_image.as_str(), disk.dirty_bytes, disk.last_stable), ("", 0, 0));

    let long = "n".repeat(300);
    for bad in ["", "a/b", "..", "a\nb", ".x", "-x", long.as_str()] {
        assert_eq!(code(mirror.try_attach("vm", 1, bad, 0)).0, Code::InvalidArgument, "{bad:?}");
    }
    assert_eq!(code(mirror.try_attach("vm", 1, "d", 0)).0, Code::AlreadyExists);
    assert_eq!(code(mirror.try_attach("no", 1, "e", 0)).0, Code::NotFound);
    assert_eq!(code(mirror.try_attach("vm", 9, "e", 0)).0, Code::NotFound);
    let (kind, text) = code(mirror.try_attach("vm", 1, "e", CHUNK));
    assert_eq!(kind, Code::InvalidArgument);
    assert!(text.contains(&(4 * CHUNK).to_string()), "{text}");
    assert_eq!(code(mirror.try_attach("vm", 1, "e", u64::MAX)).0, Code::InvalidArgument);

    let image = v1::ImageRef { name: "vm".into(), id: 0 };
    let catalog = world.repository.catalog();
    let id = world.block_on(catalog.get_image(image)).unwrap().id;
    let begin = v1::BeginSnapshotRequest { image_id: id, number: 7, ..Default::default() };
    let begun = world.block_on(catalog.begin_snapshot(begin));
    if begun.is_ok() {
        let (kind, text) = code(mirror.try_attach("vm", 7, "e", 0));
        assert_eq!(kind, Code::FailedPrecondition);
        assert!(text.contains("vm@7 is pending"), "{text}");
    }
    world.catalog.faults().down(CatalogError::Unavailable("away".into()));
    assert_eq!(code(mirror.try_attach("vm", 1, "e", 0)).0, Code::Unavailable);
    world.catalog.faults().up();
    mirror.try_attach("vm", 1, "e", 0).expect("a name that was refused is free again");
    assert_eq!(mirror.host().list().len(), 2);
}

#[test]
fn detaching_asks_before_it_throws_anything_away() {
    let world = World::new();
    world.image("vm", pattern(2 * CHUNK));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let detach = |discard| mirror.block_on(mirror.host().detach("d", discard));
    let file = open(&path);
    let (kind, text) = code(detach(true));
    assert_eq!(kind, Code::FailedPrecondition);
    assert!(text.contains("open 1 times"), "{text}");
    file.write_all_at(b"precious", 0).unwrap();
    drop(file);
    let (kind, text) = code(detach(false));
    assert_eq!(kind, Code::FailedPrecondition);
    assert!(text.contains("in no stable snapshot"), "{text}");
    let snapshot = mirror.checkpoint("d");
    mirror.wait_stable(&snapshot);
    eventually("nothing pending", || mirror.host().get("d").unwrap().pending.is_empty());
    detach(false).unwrap();
    assert_eq!(errno(fs::metadata(&path)), Errno::NOENT);
    assert_eq!(code(detach(false)).0, Code::NotFound);
    assert!(mirror.host().list().is_empty());
    assert_eq!(fs::read_dir(world.dir.path().join("mirror/disks")).unwrap().count(), 0);

    // Another disk of that name is another disk.
    let again = mirror.attach("vm", "d");
    assert!(fs::read(again).unwrap() == pattern(2 * CHUNK));
    open(&path).write_all_at(b"rubbish", 0).unwrap();
    detach(true).unwrap();
}

#[test]
fn a_rollback_brings_back_what_was() {
    let world = World::new();
    let mut model = pattern(4 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let write = |bytes: &[u8], at| open(&path).write_all_at(bytes, at).unwrap();
    write(b"first", CHUNK - 2);
    model[CHUNK as usize - 2..CHUNK as usize + 3].copy_from_slice(b"first");
    let first = mirror.checkpoint("d");
    mirror.wait_stable(&first);
    write(b"second", CHUNK - 2);
    let second = mirror.checkpoint("d");
    mirror.wait_stable(&second);
    write(b"third!", 0);

    let file = open(&path);
    let rollback = |number| mirror.block_on(mirror.host().rollback("d", number));
    assert_eq!(code(rollback(0)).0, Code::FailedPrecondition, "somebody has it open");
    drop(file);
    rollback(first.number).unwrap();
    assert!(fs::read(&path).unwrap() == model);
    rollback(0).unwrap();
    let now = fs::read(&path).unwrap();
    assert_eq!(&now[CHUNK as usize - 2..CHUNK as usize + 4], b"second");
    assert_eq!(now[..6], model[..6]);
    assert_eq!(code(rollback(99)).0, Code::NotFound);
    assert_eq!(code(mirror.block_on(mirror.host().rollback("x", 0))).0, Code::NotFound);
}

#[test]
fn several_disks_are_checkpointed_together_and_once_for_a_key() {
    let world = World::new();
    world.image("vm", pattern(2 * CHUNK));
    let mirror = world.start();
    for disk in ["a", "b"] {
        open(&mirror.attach("vm", disk)).write_all_at(disk.as_bytes(), 0).unwrap();
    }
    let both = ["a".to_owned(), "b".to_owned()];
    let take = |disks: &[String], key: &str| mirror.block_on(mirror.host().checkpoint(disks, key));
    let first = take(&both, "key 1").unwrap();
    assert_eq!(first.iter().map(|made| made.disk.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_ne!(first[0].image, first[1].image);
    let again = take(&both, "key 1").unwrap();
    assert!(first.iter().zip(&again).all(|(a, b)| (&a.image, a.number) == (&b.image, b.number)));
    let second = take(&both, "key 2").unwrap();
    assert!(second[0].number > first[0].number);
    first.iter().chain(&second).for_each(|made| drop(mirror.wait_stable(made)));
    assert_eq!(code(take(&["a".to_owned(), "x".to_owned()], "")).0, Code::NotFound);
    assert_eq!(code(take(&["a".to_owned(), "a".to_owned()], "")).0, Code::InvalidArgument);
    assert_eq!(code(take(&[], "")).0, Code::InvalidArgument);
    for made in first {
        let path = mirror.path(format!("images/{}/{}.raw", made.image, made.number));
        assert_eq!(fs::read(path).unwrap()[..1], *made.disk.as_bytes());
    }
}

#[test]
fn disks_are_there_again_after_a_restart_even_without_the_repository() {
    let world = World::new();
    let mut model = pattern(4 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    assert!(fs::read(&path).unwrap() == model, "and now it is cached");
    open(&path).write_all_at(b"kept", 3 * CHUNK - 2).unwrap();
    model[3 * CHUNK as usize - 2..3 * CHUNK as usize + 2].copy_from_slice(b"kept");
    let snapshot = mirror.checkpoint("d");
    mirror.wait_stable(&snapshot);
    let writer = mirror.host().writer().to_owned();
    mirror.stop();

    world.pool.faults().down(StoreError::Unavailable("down".into()));
    world.catalog.faults().down(CatalogError::Unavailable("down".into()));
    let mirror = world.start();
    assert_eq!(mirror.host().writer(), writer);
    assert!(fs::read(&path).unwrap() == model);
    open(&path).write_all_at(b"more", 0).unwrap();
    model[..4].copy_from_slice(b"more");
    assert!(fs::read(&path).unwrap() == model);
    open(&path).sync_all().unwrap();
    // A checkpoint is taken too, and goes out when the repository is back.
    let snapshot = mirror.checkpoint("d");
    world.pool.faults().up();
    world.catalog.faults().up();
    mirror.wait_stable(&snapshot);
    let shown = mirror.path(format!("images/{}/{}.raw", snapshot.image, snapshot.number));
    assert!(fs::read(shown).unwrap() == model);
}

/// What is pinned: snapshots, and the disks that pin them.
fn pins(world: &World) -> Vec<(String, String)> {
    let all = v1::ListPinsRequest::default();
    let page = world.block_on(world.repository.catalog().list_pins(all)).unwrap();
    let described = page.pins.into_iter().map(|pin| {
        let disk = pin.holder.rsplit('/').next().unwrap_or_default().to_owned();
        (format!("{}@{}", pin.image, pin.number), disk)
    });
    described.collect()
}

#[test]
fn a_disk_pins_what_it_needs_from_its_attach_to_its_detach() {
    let world = World::new();
    world.image("vm", pattern(4 * CHUNK));
    let mirror = world.start();
    mirror.attach("vm", "d");
    let of = |snapshot: &str| (snapshot.to_owned(), "d".to_owned());
    assert_eq!(pins(&world), [of("vm@1")]);
    assert!(mirror.try_attach("vm", 0, "d", 0).is_err(), "the name is taken");
    assert!(mirror.try_attach("vm", 0, "small", 1).is_err());
    assert_eq!(pins(&world), [of("vm@1")]);
    let named = |name: &str| v1::ImageRef { name: name.to_owned(), id: 0 };
    let remove = |name: &str| world.block_on(world.repository.catalog().remove_image(named(name)));
    assert!(matches!(remove("vm"), Err(CatalogError::Precondition(_))));
    let made = mirror.checkpoint("d");
    mirror.wait_stable(&made);
    assert_eq!(pins(&world), [of("vm@1"), of(&format!("{}@1", made.image))]);
    assert!(matches!(remove(&made.image), Err(CatalogError::Precondition(_))));
    mirror.block_on(mirror.host().rollback("d", made.number)).unwrap();
    let own = [1, made.number].map(|number| of(&format!("{}@{number}", made.image)));
    assert_eq!(pins(&world), own);
    mirror.block_on(mirror.host().detach("d", false)).unwrap();
    assert_eq!(pins(&world), []);
    remove("vm").unwrap();
    remove(&made.image).unwrap();
}

#[test]
fn pins_that_a_crash_left_or_an_older_version_never_made_are_settled_at_start() {
    let world = World::new();
    world.image("vm", pattern(4 * CHUNK));
    let mirror = world.start();
    mirror.attach("vm", "old");
    let writer = mirror.host().writer().to_owned();
    mirror.stop();
    let catalog = world.repository.catalog();
    let all = v1::ListPinsRequest::default();
    let pinned = world.block_on(catalog.list_pins(all)).unwrap().pins.remove(0);
    let v1::Pin { image_id, number, holder, .. } = pinned;
    let request = v1::UnpinSnapshotRequest { image_id, number, holder };
    world.block_on(catalog.unpin_snapshot(request)).unwrap();
    for holder in [format!("{writer}/half-made"), "mirror-other/d".to_owned()] {
        let image = Some(v1::ImageRef { name: "vm".into(), id: 0 });
        let snapshot = Some(v1::SnapshotRef { image, number: 1 });
        let request = v1::PinSnapshotRequest { snapshot, holder };
        world.block_on(catalog.pin_snapshot(request)).unwrap();
    }
    let _mirror = world.start();
    let settled = [("vm@1", "old"), ("vm@1", "d")].map(|(s, d)| (s.to_owned(), d.to_owned()));
    eventually("its own pins are settled, another's left alone", || pins(&world) == settled);
}

#[test]
fn a_second_mirror_and_unfit_mount_points_are_refused() {
    let world = World::new();
    let mirror = world.start();
    let mut options = world.options();
    options.mount = world.dir.path().join("other");
    fs::create_dir(&options.mount).unwrap();
    let text = world.try_start(options.clone()).err().unwrap().to_string();
    assert!(text.contains("another mirror runs on"), "{text}");

    // Another directory, but the mount point of the first.
    let mut same_mount = world.options();
    same_mount.dir = world.dir.path().join("second");
    let error = world.try_start(same_mount).err().unwrap();
    assert!(matches!(error, HostError::Mount(MountError::Busy { .. })), "{error}");
    assert!(is_mounted(&mirror.mount), "the first one goes on");
    assert!(fs::metadata(mirror.path("disks")).unwrap().is_dir());
    drop(mirror);

    File::create(options.mount.join("file")).unwrap();
    let text = world.try_start(options.clone()).err().unwrap().to_string();
    assert!(text.contains("not empty"), "{text}");
    options.mount = world.dir.path().join("absent");
    let text = world.try_start(options).err().unwrap().to_string();
    assert!(text.contains("does not exist"), "{text}");
    // And after all that the directory can be used.
    world.start();
}

#[test]
fn a_mount_in_use_is_left_all_the_same() {
    let world = World::new();
    world.image("vm", pattern(2 * CHUNK));
    let mirror = world.start();
    let file = open(&mirror.attach("vm", "d"));
    file.write_all_at(b"last words", 0).unwrap();
    mirror.stop();
    // Only root can make the kernel give up at once; otherwise the disk says that it is stopped.
    let error = errno(file.write_at(b"too late", 0));
    let expected = [Errno::NOTCONN, Errno::CONNABORTED, Errno::SHUTDOWN];
    assert!(expected.contains(&error), "{error}");
    drop(file);
    let mirror = world.start();
    assert_eq!(&fs::read(mirror.path("disks/d.raw")).unwrap()[..10], b"last words");
}

#[test]
fn a_mount_that_somebody_else_removed_is_noticed() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    mirror.attach("vm", "d");
    let removed = Command::new("fusermount3").arg("-u").arg(&mirror.mount).status().unwrap();
    assert!(removed.success());
    let limit = std::time::Duration::from_secs(30);
    let noticed = async { tokio::time::timeout(limit, mirror.host().unmounted()).await };
    mirror.block_on(noticed).expect("the end of the mount is told");
    mirror.stop();
    let mirror = world.start();
    assert!(fs::read(mirror.path("disks/d.raw")).unwrap() == pattern(CHUNK));
}

#[test]
fn reads_that_wait_for_the_repository_end_when_the_mirror_stops() {
    let world = World::new();
    world.image("vm", pattern(2 * CHUNK));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    world.pool.faults().down(StoreError::Unavailable("down".into()));
    let read = std::thread::spawn(move || fs::read(path));
    eventually("a stalled disk", || {
        mirror.host().get("d").unwrap().stalled.contains("wait for the repository")
    });
    mirror.stop();
    assert!(read.join().unwrap().is_err());
}

/// A mirror in a process of its own, to be killed.
struct Victim {
    child: Child,
    dir: PathBuf,
}

const VICTIM_DIR: &str = "BLOBCR_TEST_VICTIM";

impl Victim {
    /// Starts this test program again, as the test below.
    fn start(world: &World) -> Self {
        let dir = world.dir.path().to_owned();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hosts::a_victim_that_is_to_be_killed", "--nocapture"])
            .env(VICTIM_DIR, &dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ready = dir.join("ready");
        eventually("the mirror to be killed", || ready.exists());
        fs::remove_file(ready).unwrap();
        Self { child, dir }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        assert!(is_mounted(&self.dir.join("mnt")));
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn victims_image() -> Vec<u8> {
    pattern(8 * CHUNK)
}

#[test]
fn a_victim_that_is_to_be_killed() {
    // Only as the child of another test.
    let Some(dir) = std::env::var_os(VICTIM_DIR) else { return };
    let world = World::at(dir.into());
    world.image("vm", victims_image());
    let mirror = world.start();
    if mirror.host().list().is_empty() {
        mirror.attach("vm", "d");
    }
    File::create(world.dir.path().join("ready")).unwrap();
    // Longer than any test; the child of a dead parent must not stay for ever.
    std::thread::sleep(std::time::Duration::from_secs(120));
}

#[test]
fn a_killed_mirror_loses_nothing_and_its_mount_is_cleared_away() {
    let world = World::new();
    world.image("vm", victims_image());
    let mut model = victims_image();
    for round in 0..3u8 {
        let victim = Victim::start(&world);
        let path = world.dir.path().join("mnt/disks/d.raw");
        assert!(fs::read(&path).unwrap() == model, "round {round}");
        let mut file = open(&path);
        file.write_all(&[round + 1; 10_000]).unwrap();
        file.sync_data().unwrap();
        file.write_all_at(&[round + 100; 777], 5 * CHUNK - 300).unwrap();
        model[..10_000].fill(round + 1);
        model[5 * CHUNK as usize - 300..][..777].fill(round + 100);
        victim.kill();
        let error = errno(file.read_at(&mut [0], 0));
        assert!(matches!(error, Errno::NOTCONN | Errno::CONNABORTED), "{error}");
    }
    let mirror: Mirror<'_> = world.start();
    assert!(fs::read(mirror.path("disks/d.raw")).unwrap() == model);
}

#[test]
fn the_service_speaks_for_the_mirror() {
    use v1::mirror_client::MirrorClient;
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    mirror.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(mirror.host().service());
        let server = tokio::spawn(server.serve_with_incoming(incoming));
        let mut client = MirrorClient::connect(address).await.unwrap();
        let image = Some(v1::ImageRef { name: "vm".into(), id: 0 });
        let source = Some(v1::SnapshotRef { image, number: 0 });
        let request = v1::AttachDiskRequest { source, disk: "d".into(), size_bytes: 0 };
        let disk = client.attach_disk(request.clone()).await.unwrap().into_inner();
        assert_eq!((disk.name.as_str(), disk.snapshot), ("d", 1));
        let again = client.attach_disk(request).await.unwrap_err();
        assert_eq!(again.code(), Code::AlreadyExists);
        assert!(again.message().contains("detach it first"), "{}", again.message());
        let disk_ref = || v1::DiskRef { disk: "d".into() };
        assert_eq!(client.get_disk(disk_ref()).await.unwrap().into_inner(), disk);
        let list = client.list_disks(v1::ListDisksRequest {}).await.unwrap().into_inner();
        assert_eq!(list.disks, [disk]);
        let request =
            v1::CheckpointDisksRequest { disks: vec!["d".into()], idempotency_key: "once".into() };
        let made = client.checkpoint_disks(request).await.unwrap().into_inner().snapshots;
        assert_eq!((made.len(), made[0].disk.as_str()), (1, "d"));
        let rollback = v1::RollbackDiskRequest { disk: "d".into(), number: 0 };
        client.rollback_disk(rollback).await.unwrap();
        let detach = v1::DetachDiskRequest { disk: "d".into(), discard_changes: true };
        client.detach_disk(detach).await.unwrap();
        let gone = client.get_disk(disk_ref()).await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound);
        server.abort();
    });
}
