//! CLONE, COMMIT and STATUS, from Rust and from C.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use blobcr_mirror_fuse::ioctl::{CLONE, COMMIT, STATUS};
use blobcr_repository::StoreError;
use blobcr_repository::testing::PoolOperation;
use rustix::io::Errno;
use rustix::ioctl::Updater;

use crate::support::{CHUNK, World, eventually, pattern};

/// Any ioctl on `LEN` bytes.
pub(crate) fn raw<const COMMAND: u32, const LEN: usize>(
    file: &File,
    bytes: &mut [u8; LEN],
) -> Result<(), Errno> {
    // SAFETY: the kernel reads and writes at most as many bytes as the command says, and no command
    // used here says more than `LEN`.
    unsafe { rustix::ioctl::ioctl(file, Updater::<COMMAND, [u8; LEN]>::new(bytes)) }
}

fn request<const LEN: usize>(flags: u32) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..4].copy_from_slice(&1u32.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(LEN as u32).to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    std::str::from_utf8(&bytes[..end]).unwrap()
}

struct Commit {
    state: u32,
    number: u64,
    dirty_bytes: u64,
    image: String,
}

fn commit(file: &File, wait_ms: Option<u64>) -> Result<Commit, Errno> {
    let mut bytes = request::<192>(u32::from(wait_ms.is_some()));
    bytes[16..24].copy_from_slice(&wait_ms.unwrap_or(0).to_ne_bytes());
    raw::<COMMIT, 192>(file, &mut bytes)?;
    Ok(Commit {
        state: u32::from_ne_bytes(bytes[12..16].try_into().unwrap()),
        number: number(&bytes, 24),
        dirty_bytes: number(&bytes, 40),
        image: text(&bytes[56..]).to_owned(),
    })
}

fn status(file: &File, of: u64) -> Result<[u8; 448], Errno> {
    let mut bytes = request::<448>(0);
    bytes[16..24].copy_from_slice(&of.to_ne_bytes());
    raw::<STATUS, 448>(file, &mut bytes)?;
    Ok(bytes)
}

fn state(bytes: &[u8; 448]) -> u32 {
    u32::from_ne_bytes(bytes[12..16].try_into().unwrap())
}

const PENDING: u32 = 1;
const STABLE: u32 = 2;

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn commits_become_snapshots_that_everybody_can_read() {
    let world = World::new();
    let mut model = pattern(6 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let file = open(&mirror.attach("vm", "d"));
    let before = status(&file, 0).unwrap();
    assert_eq!((state(&before), number(&before, 24), text(&before[72..])), (0, 0, ""));
    assert_eq!(number(&before, 48), 6 * CHUNK);

    let mut clone = request::<160>(0);
    raw::<CLONE, 160>(&file, &mut clone).unwrap();
    let image = text(&clone[24..]).to_owned();
    assert!(number(&clone, 16) > 0 && !image.is_empty());
    let mut again = request::<160>(0);
    raw::<CLONE, 160>(&file, &mut again).unwrap();
    assert_eq!(again, clone, "one checkpoint image for ever");

    let mut models = Vec::new();
    for round in 1..=3u8 {
        let at = u64::from(round) * CHUNK - 10;
        file.write_all_at(&[round; 20], at).unwrap();
        model[at as usize..at as usize + 20].fill(round);
        let made = commit(&file, Some(0)).unwrap();
        assert_eq!((made.state, made.image.as_str()), (STABLE, image.as_str()));
        assert!(made.dirty_bytes >= 20);
        models.push((made.number, model.clone()));
        let now = status(&file, 0).unwrap();
        assert_eq!(
            (state(&now), number(&now, 16), number(&now, 32)),
            (STABLE, made.number, made.number)
        );
    }
    for (number, model) in models {
        let path = mirror.path(format!("images/{image}/{number}.raw"));
        assert!(fs::read(path).unwrap() == model, "snapshot {number}");
        assert_eq!(state(&status(&file, number).unwrap()), STABLE);
    }
    assert_eq!(status(&file, 1 << 40).unwrap_err(), Errno::NOENT);
}

#[test]
fn a_commit_returns_while_the_repository_is_away() {
    let world = World::new();
    let bytes = pattern(3 * CHUNK);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let file = open(&path);
    commit(&file, Some(0)).unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
    world.pool.faults().down(StoreError::Unavailable("down for the test".into()));
    file.write_all_at(b"while it is away", 5).unwrap();
    let began = Instant::now();
    let made = commit(&file, None).unwrap();
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(made.state, PENDING);
    let waited = commit(&file, Some(50)).unwrap();
    assert_eq!(waited.state, PENDING, "the wait ends, the snapshot goes on");
    eventually("a reason", || !text(&status(&file, made.number).unwrap()[208..]).is_empty());
    // Reads, writes and flushes go on meanwhile.
    file.sync_all().unwrap();
    assert_eq!(&fs::read(&path).unwrap()[5..21], b"while it is away");
    assert_eq!(state(&status(&file, made.number).unwrap()), PENDING);
    world.pool.faults().up();
    eventually("both snapshots", || state(&status(&file, waited.number).unwrap()) == STABLE);
    let snapshot = mirror.path(format!("images/{}/{}.raw", made.image, made.number));
    assert_eq!(&fs::read(snapshot).unwrap()[5..21], b"while it is away");
}

#[test]
fn a_third_commit_waits_for_a_free_place() {
    let world = World::new();
    world.image("vm", pattern(3 * CHUNK));
    let mirror = world.start();
    let file = open(&mirror.attach("vm", "d"));
    commit(&file, Some(0)).unwrap();
    let held = world.pool.faults().hold_next(PoolOperation::Put, 1);
    let mut numbers = Vec::new();
    for round in 0..2u8 {
        file.write_all_at(&[round + 1; 4096], 0).unwrap();
        numbers.push(commit(&file, None).unwrap().number);
    }
    let third = file.try_clone().unwrap();
    let third = std::thread::spawn(move || commit(&third, None).unwrap().number);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!third.is_finished(), "two are under way");
    held.release();
    numbers.push(third.join().unwrap());
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    eventually("the last one", || state(&status(&file, numbers[2]).unwrap()) == STABLE);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    let file = open(&mirror.attach("vm", "d"));
    for (at, value) in [(0, 9u32), (4, 7), (8, 0x80)] {
        let mut bytes = request::<192>(0);
        bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        assert_eq!(raw::<COMMIT, 192>(&file, &mut bytes), Err(Errno::INVAL));
    }
    let snapshot = File::open(mirror.path("images/vm/1.raw")).unwrap();
    assert_eq!(commit(&snapshot, None).err(), Some(Errno::NOTTY));
    // Without the catalog there can be no first clone; after it there can.
    world.catalog.faults().fail_next(
        "clone_image",
        1,
        blobcr_repository::CatalogError::Unavailable("away".into()),
    );
    assert_eq!(commit(&file, None).err(), Some(Errno::HOSTUNREACH));
    assert!(commit(&file, None).is_ok());
}

#[test]
fn a_c_program_takes_a_checkpoint() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    let disk = mirror.attach("vm", "d");
    let binary = world.dir.path().join("checkpoint");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I"])
        .arg(here.join("../guest/include"))
        .arg("-o")
        .arg(&binary)
        .arg(here.join("tests/mount/checkpoint.c"))
        .output()
        .expect("cc must be installed: install gcc");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let ran = Command::new(&binary).arg(&disk).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let said = String::from_utf8(ran.stdout).unwrap();
    let (image, number) = said.trim().split_once('@').unwrap();
    let path = mirror.path(format!("images/{image}/{number}.raw"));
    assert_eq!(&fs::read(path).unwrap()[..6], b"from C");
}
