//! Metadata on an etcd: several servers, any one of which may die, and a member of the etcd as well.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::{json, mounts_below, run};
use blobcr_tests::daemon::{Daemon, wait_until};
use blobcr_tests::disk_file::{noise, same, sparse};
use blobcr_tests::etcd::Etcd;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const DISK_BYTES: u64 = 32 << 20;
/// What one round writes, at a place of its own.
const WRITE_BYTES: usize = 300_000;
/// Checkpoints between two deaths.
const BETWEEN: usize = 8;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

fn scratch() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("blobcr-metadata-").tempdir()?)
}

fn role(dir: &Path, name: &str, args: &[&str]) -> Result<Daemon> {
    let word = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let all: Vec<&str> = [word].into_iter().chain(args.iter().copied()).collect();
    Daemon::start(&all, &dir.join(format!("{name}.log")))
}

fn server(dir: &Path, name: &str, store: &str) -> Result<Daemon> {
    role(dir, name, &["--listen", "127.0.0.1:0", "--store", store, "--pool", "replica:2"])
}

fn node(dir: &Path, name: &str, metadata: &str) -> Result<Daemon> {
    let own = dir.join(name);
    let args = ["--listen", "127.0.0.1:0", "--dir", text(&own), "--metadata", metadata];
    role(dir, name, &args)
}

fn mirror(dir: &Path, metadata: &str) -> Result<Daemon> {
    let (own, mount) = (dir.join("mirror"), dir.join("mnt"));
    let args = ["--listen", "127.0.0.1:0", "--dir", text(&own), "--metadata", metadata];
    role(dir, "mirror", &[&args[..], &["--mount", text(&mount)]].concat())
}

fn raw(dir: &Path) -> Result<PathBuf> {
    let pieces: [(u64, &[u8]); 1] = [(123_456, &noise(5, 2 << 20))];
    sparse(&dir.join("raw"), DISK_BYTES, &pieces)
}

/// Writes and checkpoints until it is told to stop. Returns every number that was given.
fn checkpoints(
    mirror: &str,
    disk: &Path,
    made: &AtomicUsize,
    stop: &AtomicBool,
) -> Result<(String, Vec<u64>)> {
    let file = fs::File::options().write(true).open(disk)?;
    let (mut image, mut numbers) = (String::new(), Vec::new());
    for round in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let at = round * 777_777 % (DISK_BYTES - WRITE_BYTES as u64);
        file.write_all_at(&noise(round, WRITE_BYTES), at)?;
        let accepted = json(mirror.as_ref(), &["disk", "checkpoint", "d1"])?;
        image = accepted["image"].as_str().context("no image")?.to_owned();
        numbers.push(accepted["snapshot"].as_u64().context("no number")?);
        made.fetch_add(1, Ordering::SeqCst);
    }
    Ok((image, numbers))
}

fn wait_more(made: &AtomicUsize, stopped: impl Fn() -> bool) -> Result<()> {
    let from = made.load(Ordering::SeqCst);
    wait_until("more checkpoints are accepted", || {
        ensure!(!stopped(), "the loop has ended");
        Ok(made.load(Ordering::SeqCst) >= from + BETWEEN)
    })
}

/// One server and then one member of the etcd are killed while checkpoints are made: every snapshot that
/// was accepted becomes stable, and no number is given twice.
#[test]
fn commits_survive_the_death_of_a_server_and_of_a_member() -> Result<()> {
    let mut etcd = Etcd::start(3)?;
    let dir = scratch()?;
    let first = server(dir.path(), "metadata1", &etcd.target_from(0, "repo"))?;
    let second = server(dir.path(), "metadata2", &etcd.target_from(1, "repo"))?;
    let both = format!("{},{}", first.address(), second.address());
    let nodes: Vec<Daemon> = (1..=3)
        .map(|number| node(dir.path(), &format!("repo-node{number}"), &both))
        .collect::<Result<_>>()?;
    let mirror = mirror(dir.path(), &both)?;
    let at = mirror.address().to_owned();
    json(at.as_ref(), &["image", "import", text(&raw(dir.path())?), "base"])?;
    let attached = json(at.as_ref(), &["disk", "attach", "base", "d1"])?;
    let disk = PathBuf::from(attached["path"].as_str().context("no path")?);

    let (made, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (image, mut numbers) = std::thread::scope(|scope| -> Result<_> {
        let writer = scope.spawn(|| checkpoints(&at, &disk, &made, &stop));
        let deaths = (|| {
            wait_more(&made, || writer.is_finished())?;
            first.kill()?;
            wait_more(&made, || writer.is_finished())?;
            // The one that the living server asks first.
            etcd.kill(1)?;
            wait_more(&made, || writer.is_finished())
        })();
        stop.store(true, Ordering::SeqCst);
        let outcome = writer.join().map_err(|_| anyhow::anyhow!("the loop panicked"))?;
        deaths.and(outcome)
    })
    .with_context(|| format!("{}\n{}", mirror.log(), second.log()))?;

    let last = json(at.as_ref(), &["disk", "checkpoint", "d1", "--wait"])?;
    assert_eq!(last["state"], "stable");
    numbers.push(last["snapshot"].as_u64().context("no number")?);
    let unique: BTreeSet<u64> = numbers.iter().copied().collect();
    assert_eq!(unique.len(), numbers.len(), "{numbers:?}");
    assert!(numbers.is_sorted() && numbers.len() > 3 * BETWEEN, "{numbers:?}");
    // Asked of the server that lives, not through the mirror.
    let listed = json(second.address().as_ref(), &["snapshot", "list", &image])?;
    let stable: BTreeSet<u64> = listed
        .as_array()
        .context("no list")?
        .iter()
        .filter(|snapshot| snapshot["state"] == "stable")
        .filter_map(|snapshot| snapshot["snapshot"].as_u64())
        .collect();
    assert!(unique.is_subset(&stable), "{unique:?} {stable:?}");
    // One that is dead before one that lives.
    assert_eq!(json(both.as_ref(), &["snapshot", "list", &image])?, listed);
    let newest = format!("{image}@{}", numbers.last().context("none")?);
    assert_eq!(json(at.as_ref(), &["snapshot", "verify", &newest])?["intact"], true);
    let number = newest.rsplit('@').next().unwrap_or_default();
    same(&disk, &dir.path().join(format!("mnt/images/{image}/{number}.raw")))?;

    mirror.stop(Signal::TERM)?;
    for node in nodes {
        node.stop(Signal::TERM)?;
    }
    second.stop(Signal::TERM)?;
    assert!(mounts_below(dir.path())?.is_empty());
    Ok(())
}

#[test]
fn a_repository_moves_from_its_directory_to_an_etcd() -> Result<()> {
    let etcd = Etcd::start(1)?;
    let dir = scratch()?;
    let own = dir.path().join("metadata");
    let old = role(dir.path(), "metadata", &["--listen", "127.0.0.1:0", "--dir", text(&own)])?;
    let at = old.address().to_owned();
    let node = node(dir.path(), "repo-node1", &at)?;
    for image in ["one", "two"] {
        json(at.as_ref(), &["image", "import", text(&raw(dir.path())?), image])?;
    }
    let images = json(at.as_ref(), &["image", "list"])?;
    let target = etcd.target("moved");
    let migrate = ["--json", "metadata", "migrate", "--from", text(&own), "--to", &target];
    let in_use = run(at.as_ref(), &migrate)?;
    assert_eq!(in_use.code, 4, "{in_use:?}");
    assert!(in_use.stderr.contains("in use"), "{in_use:?}");
    old.stop(Signal::TERM)?;

    let moved = run(at.as_ref(), &migrate)?;
    assert_eq!(moved.code, 0, "{moved:?}");
    let said: Value = serde_json::from_str(&moved.stdout)?;
    assert!(said["records"].as_u64().context("no count")? > 5, "{said}");
    // By mistake.
    let again = run(at.as_ref(), &["metadata", "--listen", &at, "--dir", text(&own)])?;
    assert_eq!(again.code, 4, "{again:?}");
    assert!(again.stderr.contains(&target) && again.stderr.contains("moved"), "{again:?}");
    let twice = run(at.as_ref(), &migrate)?;
    assert_eq!(twice.code, 4, "{twice:?}");

    let new = role(dir.path(), "metadata", &["--listen", &at, "--store", &target])?;
    assert_eq!(json(at.as_ref(), &["image", "list"])?, images);
    assert_eq!(json(at.as_ref(), &["snapshot", "verify", "two@1"])?["intact"], true);
    json(at.as_ref(), &["image", "import", text(&raw(dir.path())?), "three"])?;
    node.stop(Signal::TERM)?;
    new.stop(Signal::TERM)?;
    Ok(())
}

#[test]
fn a_server_without_its_etcd_says_so() -> Result<()> {
    let mut etcd = Etcd::start(1)?;
    let dir = scratch()?;
    let target = etcd.target("repo");
    let running = server(dir.path(), "metadata1", &target)?;
    etcd.kill(0)?;
    let listed = run(running.address().as_ref(), &["image", "list"])?;
    assert_eq!(listed.code, 5, "{listed:?}");
    let started = run("".as_ref(), &["metadata", "--listen", "127.0.0.1:0", "--store", &target])?;
    assert_eq!(started.code, 5, "{started:?}");
    assert!(started.stderr.contains(&target), "{started:?}");
    etcd.restart(0)?;
    assert_eq!(run(running.address().as_ref(), &["image", "list"])?.code, 0);
    let store = ["metadata", "--listen", "127.0.0.1:0", "--store", "sled"];
    assert_eq!(run("".as_ref(), &store)?.code, 2);
    running.stop(Signal::TERM)
}
