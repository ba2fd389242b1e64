//! Stewards repair what dead and drained nodes held, one at a time; with real processes.

use std::path::Path;

use anyhow::{Context, Result};
use blobcr_tests::cluster::{json, run};
use blobcr_tests::daemon::{Daemon, wait_until};
use blobcr_tests::disk_file::{noise, same, sparse};
use rustix::process::Signal;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

/// A role that keeps what it has in a directory of its own.
fn role(dir: &Path, role: &str, name: &str, more: &[&str]) -> Result<Daemon> {
    let own = dir.join(name);
    let args = [role, "--listen", "127.0.0.1:0", "--dir", text(&own)];
    Daemon::start(&[&args[..], more].concat(), &dir.join(format!("{name}.log")))
}

fn steward(dir: &Path, name: &str, at: &str) -> Result<Daemon> {
    Daemon::start(&["steward", "--metadata", at], &dir.join(format!("{name}.log")))
}

fn id_of(at: &str, address: &str) -> Result<String> {
    let nodes = json(at.as_ref(), &["node", "list"])?;
    let nodes = nodes.as_array().context("no list")?;
    let found = nodes.iter().find(|node| node["address"] == address).context("not listed")?;
    Ok(found["node"].as_str().context("no id")?.to_owned())
}

#[test]
fn what_dead_and_drained_nodes_held_moves_and_they_are_removed_whichever_steward_works()
-> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let policy = ["--pool", "replica:2", "--node-down-after", "15"];
    let metadata = role(dir, "metadata", "metadata", &policy)?;
    let at = metadata.address().to_owned();
    let mut nodes = Vec::new();
    for name in ["n1", "n2", "n3", "n4"] {
        nodes.push(role(dir, "repo-node", name, &["--metadata", &at])?);
    }
    let raw = sparse(&dir.join("raw"), 32 << 20, &[(0, &noise(1, 24 << 20))])?;
    json(at.as_ref(), &["image", "import", text(&raw), "base"])?;
    let leads = |steward: &Daemon| Ok(steward.log().contains("this steward leads"));
    let first = steward(dir, "first", &at)?;
    wait_until("the first steward leads", || leads(&first))?;
    let second = steward(dir, "second", &at)?;

    // Dead: what is written meanwhile is owed, and the pool is whole without it in the end.
    let dead = nodes.remove(0);
    let id = id_of(&at, dead.address())?;
    dead.kill()?;
    let removed = || Ok(run(at.as_ref(), &["node", "remove", &id])?.code == 0);
    wait_until("the dead node is not needed any more", removed)?;
    let status = json(at.as_ref(), &["status"])?;
    assert_eq!(status["degraded_chunks"], 0, "{status:#}");
    assert!(status["steward_seen"].is_string(), "{status:#}");
    assert!(!leads(&second)?, "the first is alive");

    // Drained, while the steward that works is killed.
    let drained = nodes.remove(0);
    let id = id_of(&at, drained.address())?;
    json(at.as_ref(), &["node", "drain", &id])?;
    first.kill()?;
    let removed = || Ok(run(at.as_ref(), &["node", "remove", &id])?.code == 0);
    wait_until("the drained node is empty", removed)?;
    assert!(leads(&second)?);
    drained.kill()?;
    let out = dir.join("out");
    json(at.as_ref(), &["image", "export", "base", text(&out)])?;
    same(&raw, &out)?;

    // What ends orderly is followed at once.
    let third = steward(dir, "third", &at)?;
    second.stop(Signal::TERM)?;
    wait_until("the third steward leads", || leads(&third))?;
    third.stop(Signal::TERM)?;
    for node in nodes {
        node.stop(Signal::TERM)?;
    }
    metadata.stop(Signal::TERM)
}
