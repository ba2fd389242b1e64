//! Metadata on an etcd: several servers, any one of which may die, and a member of the etcd as well.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use blobcr_tests::cluster::{json, run};
use blobcr_tests::daemon::Daemon;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::etcd::Etcd;
use blobcr_tests::roles::{Outage, Plan, Roles, Which};
use blobcr_tests::writer::Writer;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const DISK_BYTES: u64 = 8 << 20;
/// COMMITs between two deaths.
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

fn raw(dir: &Path) -> Result<PathBuf> {
    let pieces: [(u64, &[u8]); 1] = [(123_456, &noise(5, 2 << 20))];
    sparse(&dir.join("raw"), DISK_BYTES, &pieces)
}

/// One server and then one member of the etcd are killed while a disk is committed: every snapshot that was
/// accepted becomes stable, and no number is given twice.
#[test]
fn commits_survive_the_death_of_a_server_and_of_a_member() -> Result<()> {
    let plan = Plan { mirrors: 1, ..Plan::cluster("replica:2", 3) };
    let mut roles = Roles::start(&plan, |_| Ok(()))?;
    let base = noise(5, DISK_BYTES as usize);
    let file = sparse(&roles.dir().join("raw"), DISK_BYTES, &[(0, &base)])?;
    roles.json(&["image", "import", text(&file), "base"])?;
    let mut writer = Writer::start(&roles.attach(0, "base", "d1")?, base, 1);
    let (server, member) = (Which::Metadata(0), Which::Etcd(1));
    let mut died = || -> Result<()> {
        writer.wait_more(BETWEEN)?;
        roles.take_away(server, Outage::Killed)?;
        writer.wait_more(BETWEEN)?;
        // The one that the living server asks first.
        roles.take_away(member, Outage::Killed)?;
        writer.wait_more(BETWEEN)
    };
    died().with_context(|| roles.log())?;
    let written = writer.finish().with_context(|| roles.log())?;
    assert!(written.commits().len() > 3 * BETWEEN, "{:?}", written.commits());
    written.check(&roles, 0)?;
    // Asked of the server that lives; and of both, one that is dead before it.
    let image = &written.commits()[0].image;
    let listed = roles.json_from(Which::Metadata(1), &["snapshot", "list", image])?;
    let both = roles.servers(0);
    assert_eq!(json(both.as_ref(), &["snapshot", "list", image])?, listed);
    roles.bring_back(server)?;
    roles.bring_back(member)?;
    assert_eq!(roles.json_from(server, &["snapshot", "list", image])?, listed);
    roles.stop()
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
