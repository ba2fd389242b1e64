//! fio and fsx verify a mounted disk while COMMITs run.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::integrity::tools::{Engine, fio, fsx};
use blobcr_tests::integrity::{COMMIT_EVERY, check_snapshots, with_commits};
use rustix::process::Signal;

const SIZE: u64 = 32 << 20;

/// A cluster with a disk that is half data and half hole.
fn with_disk() -> Result<(Cluster, PathBuf)> {
    let cluster = Cluster::start(&[])?;
    let data = noise(3, SIZE as usize / 2);
    let raw = sparse(&cluster.scratch().join("base.raw"), SIZE, &[(0, &data)])?;
    cluster.import(&raw, "base")?;
    let path = cluster.attach("base", "d")?;
    Ok((cluster, path))
}

fn fio_verifies(engine: Engine) -> Result<()> {
    let (mut cluster, path) = with_disk()?;
    let time = Duration::from_secs(5);
    let made = with_commits(&path, COMMIT_EVERY, || fio(&path, SIZE, engine, time, 1, None))?;
    assert!(made.len() > 3, "COMMITs ran beside fio: {}", made.len());
    check_snapshots(&cluster, &path, &made)?;
    cluster.stop(Signal::TERM)
}

#[test]
fn fio_verifies_with_libaio_while_commits_run() -> Result<()> {
    fio_verifies(Engine::Libaio)
}

#[test]
fn fio_verifies_with_io_uring_while_commits_run() -> Result<()> {
    fio_verifies(Engine::IoUring)
}

#[test]
fn fio_verifies_with_plain_calls_while_commits_run() -> Result<()> {
    fio_verifies(Engine::Sync)
}

#[test]
fn fsx_finds_nothing_while_commits_run() -> Result<()> {
    let (mut cluster, path) = with_disk()?;
    for seed in [1, 2] {
        let made = with_commits(&path, COMMIT_EVERY, || fsx(&path, 1500, seed))?;
        assert!(made.len() > 1, "COMMITs ran beside fsx");
        check_snapshots(&cluster, &path, &made)?;
    }
    cluster.stop(Signal::TERM)
}
