//! What a disk read on one host is fetched ahead on the next one, by real processes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Outage, Plan, Roles, Which};

const CHUNK: u64 = 256 << 10;
const CHUNKS: u64 = 256;
/// What the first disk reads: forwards, and here and there.
const READS: [u64; 12] = [0, 1, 2, 3, 200, 201, 7, 100, 50, 255, 8, 9];
const FIRST: Which = Which::Mirror(0);
const SECOND: Which = Which::Mirror(1);

fn cluster() -> Result<(Roles, Vec<u8>)> {
    let log = Some("info,blobcr_mirror_fuse::prefetch=debug".to_owned());
    let roles = Roles::start(&Plan { mirrors: 2, log, ..Plan::default() }, |_| Ok(()))?;
    let bytes = noise(7, (CHUNKS * CHUNK) as usize);
    let raw = sparse(&roles.dir().join("base.raw"), CHUNKS * CHUNK, &[(0, &bytes)])?;
    roles.json(&["image", "import", raw.to_str().context("ASCII")?, "base"])?;
    Ok((roles, bytes))
}

fn read(disk: &File, chunk: u64, bytes: &[u8]) -> Result<()> {
    let mut found = [0; 4096];
    let at = chunk * CHUNK + 8192;
    disk.read_exact_at(&mut found, at)?;
    ensure!(found[..] == bytes[at as usize..][..4096], "chunk {chunk}");
    Ok(())
}

/// A figure of a disk.
fn figure(roles: &Roles, mirror: Which, disk: &str, name: &str) -> Result<u64> {
    let info = roles.json_from(mirror, &["disk", "info", disk])?;
    info[name].as_u64().with_context(|| format!("no {name} in {info}"))
}

fn wait_kept(roles: &Roles, mirror: Which) -> Result<()> {
    wait_until("a trace is kept", || Ok(roles.log_of(mirror)?.contains("a read trace is kept")))
}

/// Reads what the first one read: how many of its chunks had to be waited for.
fn read_again(roles: &Roles, source: &str, bytes: &[u8]) -> Result<u64> {
    let disk = File::open(roles.attach(1, source, "second")?)?;
    read(&disk, READS[0], bytes)?;
    let ahead = (READS.len() as u64 - 1) * CHUNK;
    wait_until("the rest is fetched ahead", || {
        Ok(figure(roles, SECOND, "second", "prefetched_bytes")? == ahead)
    })?;
    READS.iter().try_for_each(|chunk| read(&disk, *chunk, bytes))?;
    let used = figure(roles, SECOND, "second", "prefetched_used_bytes")?;
    ensure!(used == ahead, "{used} bytes of {ahead} that were fetched ahead were read");
    Ok(figure(roles, SECOND, "second", "waited_bytes")? / CHUNK)
}

#[test]
fn a_second_host_fetches_ahead_what_the_first_one_read() -> Result<()> {
    let (roles, bytes) = cluster()?;
    let disk = File::open(roles.attach(0, "base", "first")?)?;
    READS.iter().try_for_each(|chunk| read(&disk, *chunk, &bytes))?;
    drop(disk);
    let waited = figure(&roles, FIRST, "first", "waited_bytes")? / CHUNK;
    ensure!(waited == READS.len() as u64, "the first disk waited for {waited} chunks");
    roles.json(&["disk", "detach", "first"])?;
    wait_kept(&roles, FIRST)?;
    let waited = read_again(&roles, "base", &bytes)?;
    ensure!(waited == 1, "the second disk waited for {waited} chunks, too");
    roles.stop()
}

/// Nobody was told that the host would die, and nobody has attached the checkpoint before.
#[test]
fn a_restart_from_a_checkpoint_after_the_death_of_its_host_fetches_ahead() -> Result<()> {
    let (mut roles, mut bytes) = cluster()?;
    let disk = MountedDisk::open(&roles.attach(0, "base", "first")?, false)?;
    READS.iter().try_for_each(|chunk| read(disk.file(), *chunk, &bytes))?;
    // Of a chunk that was read before, and of one that was not.
    for chunk in [READS[4], 150] {
        let at = chunk * CHUNK + 8192;
        bytes[at as usize..][..4096].fill(0xAB);
        disk.file().write_all_at(&[0xAB; 4096], at)?;
    }
    let taken = disk.commit_stable()?;
    wait_kept(&roles, FIRST)?;
    drop(disk);
    roles.take_away(FIRST, Outage::Killed)?;
    let waited = read_again(&roles, &format!("{}@{}", taken.image, taken.number), &bytes)?;
    ensure!(waited == 1, "the disk waited for {waited} chunks");
    roles.bring_back(FIRST)?;
    roles.stop()
}
