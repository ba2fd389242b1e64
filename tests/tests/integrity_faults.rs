//! A repository that is away, and disks that are full: nothing is lost, nobody sees an I/O error
//! that need not be, and all goes on afterwards.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Outage, Plan, Roles, Which};

const MIB: usize = 1 << 20;
const SIZE: usize = 16 * MIB;
/// How long a repository is away at least while somebody waits for it: longer than one call takes.
const AWAY: Duration = Duration::from_secs(3);
/// A COMMIT is local: this is a busy machine's share, not the network's deadline.
const AT_ONCE: Duration = Duration::from_secs(2);

fn import(roles: &Roles, content: &[u8]) -> Result<()> {
    let raw = sparse(&roles.dir().join("base.raw"), content.len() as u64, &[(0, content)])?;
    roles.json(&["image", "import", raw.to_str().context("ASCII")?, "base"])?;
    Ok(())
}

/// Writes `bytes` to the disk and to what it should hold.
fn write(disk: &MountedDisk, model: &mut [u8], offset: usize, bytes: &[u8]) -> Result<()> {
    disk.file().write_all_at(bytes, offset as u64)?;
    model[offset..offset + bytes.len()].copy_from_slice(bytes);
    Ok(())
}

/// Takes a process away while a disk is written, read and committed, and brings it back.
fn away(which: Which, outage: Outage) -> Result<()> {
    let mut roles = Roles::start(&Plan::default(), |_| Ok(()))?;
    let mut model = noise(5, SIZE);
    import(&roles, &model)?;
    let path = roles.attach(0, "base", "d")?;
    let disk = MountedDisk::open(&path, false)?;
    // The CLONE needs the repository once; the first chunk is fetched.
    disk.commit_stable()?;
    disk.file().read_exact_at(&mut [0; 4096], 0)?;
    write(&disk, &mut model, 100, &noise(6, 5000))?;

    roles.take_away(which, outage)?;
    // Whole sectors of absent chunks, and parts of present ones.
    write(&disk, &mut model, 4 * MIB, &noise(7, 64 << 10))?;
    write(&disk, &mut model, 300, &noise(8, 1000))?;
    let began = Instant::now();
    let made = disk.commit()?;
    ensure!(began.elapsed() < AT_ONCE, "COMMIT took {:?}", began.elapsed());
    let committed = model.clone();
    write(&disk, &mut model, 300, &noise(9, 1000))?;
    disk.file().sync_all()?;
    let mut here = vec![0; 64 << 10];
    disk.file().read_exact_at(&mut here, 4 * MIB as u64)?;
    ensure!(here == model[4 * MIB..4 * MIB + here.len()], "what was written reads otherwise");

    let absent = 9 * MIB + 1000;
    let (read, wrote) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<Vec<u8>> {
            let mut bytes = vec![0; 2 * MIB];
            disk.file().read_exact_at(&mut bytes, absent as u64).context("read what is absent")?;
            Ok(bytes)
        });
        // Part of a sector that is absent: the rest of it must be fetched, or waits to be.
        let writer = scope.spawn(|| disk.file().write_all_at(b"partial", 13 * MIB as u64 + 77));
        std::thread::sleep(AWAY);
        let waited = which != Which::Node(0) || !reader.is_finished();
        roles.bring_back(which)?;
        ensure!(waited, "a chunk was read though there is nobody who has it");
        let read = reader.join().expect("the reader does not panic")?;
        writer.join().expect("the writer does not panic").context("write to what is absent")?;
        Ok((read, b"partial"))
    })
    .with_context(|| roles.log())?;
    ensure!(read == model[absent..absent + read.len()], "what was absent reads otherwise");
    model[13 * MIB + 77..13 * MIB + 77 + wrote.len()].copy_from_slice(wrote);
    roles.wait_stable(&made.name())?;
    let file = roles.mount(0).join(format!("images/{}/{}.raw", made.image, made.number));
    ensure!(fs::read(file)? == committed, "{} is not the disk as it was", made.name());
    ensure!(fs::read(&path)? == model, "the disk is not what was written");
    drop(disk);
    roles.stop()
}

#[test]
fn a_node_that_does_not_answer_is_waited_for() -> Result<()> {
    away(Which::Node(0), Outage::Paused)
}

#[test]
fn a_node_that_died_is_waited_for() -> Result<()> {
    away(Which::Node(0), Outage::Killed)
}

#[test]
fn a_metadata_server_that_does_not_answer_is_waited_for() -> Result<()> {
    away(Which::Metadata(0), Outage::Paused)
}

#[test]
fn a_metadata_server_that_died_is_waited_for() -> Result<()> {
    away(Which::Metadata(0), Outage::Killed)
}

/// A small file system in memory; needs root, as do mounts of any kind but FUSE's.
fn small_file_system(at: &Path, bytes: usize) -> Result<()> {
    fs::create_dir(at)?;
    let size = format!("size={bytes}");
    let done = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(at).status()?;
    ensure!(done.success(), "mount of a tmpfs at {}", at.display());
    Ok(())
}

fn grow(at: &Path, bytes: usize) -> Result<()> {
    let size = format!("remount,size={bytes}");
    let done = Command::new("mount").args(["-o", &size]).arg(at).status()?;
    ensure!(done.success(), "remount of {}", at.display());
    Ok(())
}

/// Whether this test can make file systems; says so where it cannot.
#[expect(clippy::print_stdout, reason = "who reads the tests' output learns what was left out")]
fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("left out: only root can mount a small file system");
    }
    root
}

/// Room of the role whose disk gets full, and what it gets afterwards.
const ROOM: usize = 48 * MIB;
const MORE_ROOM: usize = 512 * MIB;
const LARGE: usize = 96 * MIB;

fn roles_with_little_room(role: &str) -> Result<(Roles, PathBuf)> {
    let mut at = PathBuf::new();
    let roles = Roles::start(&Plan::default(), |dir| {
        at = dir.join(role);
        small_file_system(&at, ROOM)
    })?;
    Ok((roles, at))
}

#[test]
fn a_full_local_disk_refuses_writes_and_loses_nothing() -> Result<()> {
    if !can_mount() {
        return Ok(());
    }
    let (roles, small) = roles_with_little_room("mirror1")?;
    let mut model = vec![0; LARGE];
    model[..MIB].copy_from_slice(&noise(3, MIB));
    import(&roles, &model)?;
    let path = roles.attach(0, "base", "d")?;
    let disk = MountedDisk::open(&path, false)?;
    let mut refused = None;
    for (number, offset) in (0..LARGE).step_by(MIB).enumerate() {
        let bytes = noise(100 + number as u64, MIB);
        match disk.file().write_all_at(&bytes, offset as u64) {
            Ok(()) => model[offset..offset + MIB].copy_from_slice(&bytes),
            Err(error) => {
                ensure!(error.kind() == ErrorKind::StorageFull, "refused with {error}");
                refused = Some(offset);
                break;
            }
        }
    }
    let refused = refused.context("more was written than there is room for")?;
    let check = |model: &mut [u8]| -> Result<()> {
        let now = fs::read(&path)?;
        // The write that was refused may have been done in part.
        let (maybe, new) = (refused..refused + MIB, noise(100 + (refused / MIB) as u64, MIB));
        for at in maybe.clone() {
            ensure!(now[at] == model[at] || now[at] == new[at - maybe.start], "byte {at}");
        }
        model[maybe.clone()].copy_from_slice(&now[maybe]);
        ensure!(now == model, "the disk is not what was written");
        Ok(())
    };
    check(&mut model).with_context(|| roles.log())?;
    // What is there can be written again, is served, and can be listed.
    write(&disk, &mut model, 5000, &noise(4, 3000)).context("write where there is room already")?;
    ensure!(roles.json(&["disk", "info", "d"])?["disk"] == "d", "it goes on serving");

    grow(&small, MORE_ROOM)?;
    check(&mut model)?;
    write(&disk, &mut model, refused, &noise(200, 2 * MIB)).context("write with room again")?;
    disk.file().sync_all().context("flush with room again")?;
    let made = disk.commit_stable().with_context(|| roles.log())?;
    let file = roles.mount(0).join(format!("images/{}/{}.raw", made.image, made.number));
    ensure!(fs::read(file)? == model, "{} is not the disk", made.name());
    ensure!(fs::read(&path)? == model, "the disk is not what was written");
    drop(disk);
    roles.stop()
}

#[test]
fn a_full_node_holds_a_snapshot_up_and_loses_nothing() -> Result<()> {
    if !can_mount() {
        return Ok(());
    }
    let (roles, small) = roles_with_little_room("repo-node1")?;
    let mut model = vec![0; LARGE];
    import(&roles, &model)?;
    let path = roles.attach(0, "base", "d")?;
    let disk = MountedDisk::open(&path, false)?;
    write(&disk, &mut model, 7, &noise(1, 5000))?;
    let small_one = disk.commit_stable()?;
    let small_model = model.clone();
    // More than the node has room for.
    write(&disk, &mut model, 0, &noise(2, ROOM + 16 * MIB))?;
    let large_one = disk.commit()?;
    let large_model = model.clone();
    wait_until("the disk says why nothing moves", || {
        let info = roles.json(&["disk", "info", "d"])?;
        ensure!(info["pending"].as_array().is_some_and(|all| !all.is_empty()), "{info}");
        Ok(info["stalled"].is_string())
    })
    .with_context(|| roles.log())?;
    // The guest does not notice, and what is stable is still there.
    write(&disk, &mut model, 3 * MIB - 9, &noise(5, MIB))?;
    disk.file().sync_all()?;
    ensure!(fs::read(&path)? == model, "the disk is not what was written");
    let verified = roles.json(&["snapshot", "verify", &small_one.name()])?;
    ensure!(verified["intact"] == true, "{verified}");

    grow(&small, MORE_ROOM)?;
    roles.wait_stable(&large_one.name())?;
    let last = disk.commit_stable()?;
    for (made, model) in [(small_one, &small_model), (large_one, &large_model), (last, &model)] {
        let file = roles.mount(0).join(format!("images/{}/{}.raw", made.image, made.number));
        ensure!(fs::read(file)? == *model, "{} is not the disk as it was", made.name());
    }
    drop(disk);
    roles.stop()
}
