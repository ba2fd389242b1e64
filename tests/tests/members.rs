//! Nodes that die, are drained and removed, or belong to another repository; with real processes.

use std::path::Path;

use anyhow::{Context, Result};
use blobcr_tests::cluster::{json, run};
use blobcr_tests::daemon::{Daemon, wait_until};
use blobcr_tests::disk_file::{noise, same, sparse};
use rustix::process::Signal;
use serde_json::Value;

/// Longer than the time after which a node is suspected, so that both can be seen.
const DOWN_AFTER_SECONDS: &str = "20";

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

fn metadata(dir: &Path, name: &str) -> Result<Daemon> {
    let own = dir.join(name);
    let args = ["metadata", "--listen", "127.0.0.1:0", "--dir", text(&own), "--pool", "replica:2"];
    let args = [&args[..], &["--node-down-after", DOWN_AFTER_SECONDS]].concat();
    Daemon::start(&args, &dir.join(format!("{name}.log")))
}

fn node(dir: &Path, name: &str, metadata: &Daemon) -> Result<Daemon> {
    let own = dir.join(name);
    let args = ["repo-node", "--listen", "127.0.0.1:0", "--dir", text(&own)];
    let args = [&args[..], &["--metadata", metadata.address()]].concat();
    Daemon::start(&args, &dir.join(format!("{name}.log")))
}

/// The node at an address, as `node list` shows it.
fn shown(metadata: &Daemon, address: &str) -> Result<Value> {
    let nodes = json(metadata.address().as_ref(), &["node", "list"])?;
    let nodes = nodes.as_array().context("no list")?;
    nodes.iter().find(|node| node["address"] == address).cloned().context("not listed")
}

fn wait_for_state(metadata: &Daemon, address: &str, state: &str) -> Result<()> {
    wait_until(state, || Ok(shown(metadata, address)?["state"] == state))
}

#[test]
fn nodes_die_come_back_and_are_drained() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let metadata = metadata(dir, "metadata")?;
    let at = metadata.address().to_owned();
    let at = at.as_ref();
    let mut nodes = Vec::new();
    for name in ["n1", "n2", "n3"] {
        nodes.push(node(dir, name, &metadata)?);
    }
    let raw = sparse(&dir.join("raw"), 16 << 20, &[(0, &noise(1, 8 << 20))])?;
    json(at, &["image", "import", text(&raw), "base"])?;
    let readable = |name: &str| -> Result<()> {
        let out = dir.join(name);
        json(at, &["image", "export", "base", text(&out)])?;
        same(&raw, &out)
    };

    // Dead: suspected first, then down, and its partitions go to the others.
    let dead = nodes.remove(0);
    let address = dead.address().to_owned();
    let id = shown(&metadata, &address)?["node"].as_str().context("no id")?.to_owned();
    dead.kill()?;
    wait_for_state(&metadata, &address, "suspected")?;
    wait_for_state(&metadata, &address, "down")?;
    wait_until("a new table", || Ok(metadata.log().contains("a new placement table")))?;
    readable("while-down")?;
    // With two nodes left everything new goes to them.
    let other = sparse(&dir.join("other"), 4 << 20, &[(0, &noise(2, 2 << 20))])?;
    json(at, &["image", "import", text(&other), "other"])?;
    // What it held has not been copied: it cannot go.
    let refused = run(at, &["node", "remove", &id])?;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("still holds data"), "{refused:?}");
    nodes.push(node(dir, "n1", &metadata)?);
    let address = nodes.last().context("no node")?.address().to_owned();
    assert_eq!(shown(&metadata, &address)?["node"], id.as_str(), "the same, elsewhere");
    assert_eq!(shown(&metadata, &address)?["state"], "up");
    readable("back")?;

    // Drained and taken back.
    assert_eq!(json(at, &["node", "drain", &id])?["state"], "draining");
    assert_eq!(shown(&metadata, &address)?["state"], "draining");
    assert_eq!(json(at, &["node", "drain", &id, "--cancel"])?["state"], "up");
    assert_eq!(run(at, &["node", "drain", "nobody"])?.code, 3);
    for node in nodes {
        node.stop(Signal::TERM)?;
    }
    metadata.stop(Signal::TERM)
}

#[test]
fn a_node_of_another_repository_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let own = metadata(dir, "own")?;
    node(dir, "n1", &own)?.stop(Signal::TERM)?;
    let other = metadata(dir, "other")?;
    let foreign = node(dir, "n1", &other).err().context("it was let in")?.to_string();
    assert!(foreign.contains("belongs to another repository"), "{foreign}");
    assert_eq!(json(other.address().as_ref(), &["node", "list"])?, serde_json::json!([]));
    // A node that holds nothing is removed, and stays so.
    let mine = node(dir, "n1", &own)?;
    let address = mine.address().to_owned();
    let id = shown(&own, &address)?["node"].as_str().context("no id")?.to_owned();
    mine.stop(Signal::TERM)?;
    let removed = json(own.address().as_ref(), &["node", "remove", &id])?;
    assert_eq!(removed["state"], "removed");
    let refused = node(dir, "n1", &own).err().context("it was let in")?.to_string();
    assert!(refused.contains("was removed"), "{refused}");
    own.stop(Signal::TERM)?;
    other.stop(Signal::TERM)
}
