//! Many disks at once: forks of one snapshot, and disks that commit behind one barrier.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blobcr_guest::{Ask, Client, Deadline, Target};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{allocated_below, noise, sparse};
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Outage, Plan, Roles, Which};
use rustix::process::Signal;

const FORKS: u64 = 50;
const CHUNK: u64 = 256 << 10;
const BASE: u64 = 8 << 20;

/// Where fork `number` writes: within a chunk, across the border of two, at the end.
fn own_writes(number: u64) -> [(u64, Vec<u8>); 3] {
    let at = |seed, offset, len| (offset, noise(1000 + 10 * number + seed, len));
    [
        at(1, number * 1000 + 13, 777),
        at(2, (number % 30 + 1) * CHUNK - 5000, 9000),
        at(3, BASE - 100 - number, 50 + number as usize),
    ]
}

#[test]
fn forks_of_one_snapshot_differ_where_they_were_written_and_share_the_rest() -> Result<()> {
    let mut roles = Roles::start(&Plan::default(), |_| Ok(()))?;
    let base = noise(77, BASE as usize);
    let raw = sparse(&roles.dir().join("base.raw"), BASE, &[(0, &base)])?;
    roles.json(&["image", "import", raw.to_str().context("ASCII")?, "base"])?;
    let forks: Vec<_> =
        (0..FORKS).map(|n| roles.attach(0, "base@1", &format!("f{n}"))).collect::<Result<_>>()?;
    assert!(fs::read(&forks[0])? == base);
    // From here on there is nobody to fetch a chunk from: the one fork has fetched for all.
    roles.take_away(Which::Node(0), Outage::Killed)?;
    let mut models = Vec::new();
    for (number, path) in forks.iter().enumerate() {
        let disk = MountedDisk::open(path, false)?;
        let mut model = base.clone();
        for (offset, bytes) in own_writes(number as u64) {
            disk.file().write_all_at(&bytes, offset)?;
            model[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        }
        models.push(model);
    }
    for (number, path) in forks.iter().enumerate() {
        assert!(fs::read(path)? == models[number], "fork {number}");
    }
    let cache = allocated_below(&roles.dir().join("mirror1/cache"))?;
    assert!(cache < BASE + BASE / 4, "{cache} bytes of the cache for {BASE} of data");
    // Three short writes, their maps and journals each; a copy of the base would be 8 MiB.
    let own = allocated_below(&roles.dir().join("mirror1/disks"))? / FORKS;
    assert!(own < BASE / 16, "{own} bytes for each fork");

    // Each has snapshots of its own, which hold what it holds.
    let mut made = Vec::new();
    roles.bring_back(Which::Node(0))?;
    for path in &forks {
        made.push(MountedDisk::open(path, false)?.commit()?);
    }
    for (number, one) in made.iter().enumerate() {
        roles.wait_stable(&one.name())?;
        let file = roles.mount(0).join(format!("images/{}/{}.raw", one.image, one.number));
        assert!(fs::read(file)? == models[number], "{} of fork {number}", one.name());
    }
    assert!(fs::read(roles.mount(0).join("images/base/1.raw"))? == base);
    roles.stop()
}

/// Writers, each with a place of its own on both disks.
const WRITERS: u64 = 3;
const CHECKPOINTS: usize = 25;

/// Where writer `writer` counts: on its own chunk, across a border of sectors.
fn counter_at(writer: u64) -> u64 {
    (2 * writer + 1) * CHUNK + 4092
}

fn read_counter(path: &Path, writer: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    fs::File::open(path)?.read_exact_at(&mut bytes, counter_at(writer))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Counts up on one disk and then on the other, so that at any moment the first one is at most one
/// ahead.
fn count(disks: &[MountedDisk; 2], writer: u64, done: &AtomicBool) -> Result<()> {
    let mut value: u64 = 0;
    while !done.load(Ordering::Relaxed) {
        value += 1;
        for disk in disks {
            disk.file().write_all_at(&value.to_le_bytes(), counter_at(writer))?;
        }
    }
    ensure!(value > 1, "writer {writer} did nothing");
    Ok(())
}

#[test]
fn every_checkpoint_of_a_vm_is_one_cut_through_all_of_its_disks() -> Result<()> {
    let mut cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("base.raw"), BASE, &[])?;
    cluster.import(&raw, "base")?;
    let paths: [PathBuf; 2] = [cluster.attach("base", "d1")?, cluster.attach("base", "d2")?];
    let vm = cluster.json(&["vm", "add", "vm1", "--disk", "d1", "--disk", "d2"])?;
    let socket = PathBuf::from(vm["socket"].as_str().context("no socket")?);
    let client = Client::new(Target::Socket(socket));
    let done = AtomicBool::new(false);
    let sets = std::thread::scope(|scope| -> Result<Vec<_>> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let open = |path| MountedDisk::open(path, true);
                let disks = [open(&paths[0])?, open(&paths[1])?];
                let done = &done;
                Ok(scope.spawn(move || count(&disks, writer, done)))
            })
            .collect::<Result<_>>()?;
        let asked: Result<Vec<_>> = (0..CHECKPOINTS)
            .map(|_| {
                let deadline = Deadline::after(Duration::from_secs(60));
                Ok(client.checkpoint(&Ask::new(), deadline)?.snapshots)
            })
            .collect();
        done.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().expect("a writer does not panic")?;
        }
        asked
    })?;
    let mut seen = Vec::new();
    for set in &sets {
        assert_eq!(set.len(), 2, "{set:?}");
        let mut files = Vec::new();
        for one in set {
            let name = format!("{}@{}", one.image, one.number);
            assert_eq!(cluster.json(&["snapshot", "wait", &name])?["state"], "stable");
            files.push(cluster.mount().join(format!("images/{}/{}.raw", one.image, one.number)));
        }
        assert_eq!((set[0].disk.as_str(), set[1].disk.as_str()), ("d1", "d2"));
        for writer in 0..WRITERS {
            let (first, second) =
                (read_counter(&files[0], writer)?, read_counter(&files[1], writer)?);
            assert!(
                first == second || first == second + 1,
                "writer {writer}: {first} and {second} in {set:?}"
            );
            seen.push(first);
        }
    }
    assert!(seen.last() > seen.first(), "the writers wrote all the while: {seen:?}");
    cluster.json(&["vm", "remove", "vm1"])?;
    cluster.stop(Signal::TERM)
}
