//! The roles as separate processes: the same verbs, through whichever endpoint.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use blobcr_tests::cluster::{Ran, json, mounts_below, run};
use blobcr_tests::daemon::{Daemon, wait_until};
use blobcr_tests::disk_file::{noise, same, sparse};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

/// One metadata server, `nodes` nodes, one mirror and one proxy.
struct Processes {
    // In the order in which they are to end.
    proxy: Daemon,
    mirror: Daemon,
    nodes: Vec<Daemon>,
    /// `None` while a test has it down.
    metadata: Option<Daemon>,
    dir: TempDir,
}

impl Processes {
    fn start(nodes: u32, policy: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("blobcr-roles-").tempdir()?;
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let role = |name: &str, args: &[&str]| {
            let (own, log) = (path(name), dir.path().join(format!("{name}.log")));
            let word = name.trim_end_matches(|c: char| c.is_ascii_digit());
            let mut all = vec![word];
            match word {
                "proxy" => all.extend(["--sockets", &own]),
                _ => all.extend(["--listen", "127.0.0.1:0", "--dir", &own]),
            }
            all.extend(args);
            Daemon::start(&all, &log)
        };
        let metadata = role("metadata", &["--pool", policy])?;
        let at = metadata.address().to_owned();
        let nodes = (1..=nodes)
            .map(|number| role(&format!("repo-node{number}"), &["--metadata", &at]))
            .collect::<Result<_>>()?;
        let mount = path("mnt");
        let mirror = role("mirror", &["--metadata", &at, "--mount", &mount])?;
        let proxy = role("proxy", &["--mirror", mirror.address()])?;
        Ok(Self { proxy, mirror, nodes, metadata: Some(metadata), dir })
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        json(self.mirror.address().as_ref(), args)
    }

    fn metadata(&self) -> Result<&str> {
        Ok(self.metadata.as_ref().context("no metadata server runs")?.address())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stop(self) -> Result<()> {
        self.proxy.stop(Signal::TERM)?;
        self.mirror.stop(Signal::TERM)?;
        for node in self.nodes {
            node.stop(Signal::TERM)?;
        }
        self.metadata.context("no metadata server runs")?.stop(Signal::TERM)?;
        assert!(mounts_below(self.dir.path())?.is_empty());
        Ok(())
    }
}

fn image(processes: &Processes) -> Result<PathBuf> {
    let pieces: [(u64, &[u8]); 1] = [(123_456, &noise(5, 2 << 20))];
    sparse(&processes.path("raw"), 32 << 20, &pieces)
}

#[test]
fn every_verb_works_through_the_mirror() -> Result<()> {
    let processes = Processes::start(3, "replica:2")?;
    let raw = image(&processes)?;
    let at = processes.mirror.address().to_owned();
    processes.json(&["image", "import", text(&raw), "base"])?;
    let disk = processes.json(&["disk", "attach", "base", "d1"])?;
    let path = PathBuf::from(disk["path"].as_str().context("no path")?);
    same(&raw, &path)?;
    let made = processes.json(&["disk", "checkpoint", "d1", "--wait"])?;
    assert_eq!(made["state"], "stable");
    // The proxy tells its mirror where it is.
    let mut added = None;
    wait_until("the mirror knows its proxy", || {
        let ran = run(at.as_ref(), &["--json", "vm", "add", "vm1", "--disk", "d1"])?;
        added = (ran.code == 0).then_some(ran.stdout);
        Ok(added.is_some())
    })?;
    let vm: Value = serde_json::from_str(&added.context("no VM")?)?;
    assert_eq!(vm["socket"], text(&processes.path("proxy/vm1.sock")));
    // The proxy leads to everything as well.
    let through_proxy = json(processes.proxy.address().as_ref(), &["status"])?;
    assert_eq!(through_proxy["disks"][0]["disk"], "d1");
    assert_eq!(through_proxy["nodes"].as_array().map(Vec::len), Some(3));
    processes.stop()
}

#[test]
fn a_metadata_server_serves_images_and_says_where_disks_are() -> Result<()> {
    let processes = Processes::start(1, "replica:1")?;
    let raw = image(&processes)?;
    let metadata = processes.metadata()?;
    json(metadata.as_ref(), &["image", "import", text(&raw), "base"])?;
    assert!(json(metadata.as_ref(), &["status"])?["disks"].is_null());
    let refused = run(metadata.as_ref(), &["disk", "list"])?;
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.stderr.contains("mirror"), "{refused:?}");
    // A node leads to its metadata server too.
    let node = processes.nodes[0].address();
    assert_eq!(json(node.as_ref(), &["image", "list"])?[0]["image"], "base");
    processes.stop()
}

#[test]
fn a_node_that_is_down_shows_and_its_copies_are_elsewhere() -> Result<()> {
    let mut processes = Processes::start(3, "replica:2")?;
    let raw = image(&processes)?;
    processes.json(&["image", "import", text(&raw), "base"])?;
    let before = processes.json(&["status"])?;
    assert_eq!((&before["degraded_chunks"], &before["repair"]), (&0.into(), &Value::Null));

    let down = processes.nodes.remove(0);
    let address = down.address().to_owned();
    down.kill()?;
    let status = processes.json(&["status"])?;
    assert!(status["degraded_chunks"].as_u64().unwrap() > 0, "{status}");
    let listed = processes.json(&["node", "list"])?;
    let states: Vec<_> = listed
        .as_array()
        .context("no list")?
        .iter()
        .filter(|node| node["health"] == "unreachable")
        .map(|node| node["address"].clone())
        .collect();
    assert_eq!(states, [address.as_str()]);
    let out = processes.path("out");
    processes.json(&["image", "export", "base", text(&out)])?;
    same(&raw, &out)?;
    assert_eq!(processes.json(&["snapshot", "verify", "base@1"])?["intact"], true);
    // Two copies cannot be made of everything now, and half of the pool is not written to.
    let other = sparse(&processes.path("other"), 8 << 20, &[(0, &noise(9, 4 << 20))])?;
    let at = processes.mirror.address();
    let refused: Ran = run(at.as_ref(), &["image", "import", text(&other), "other"])?;
    assert_eq!(refused.code, 5, "{refused:?}");
    assert_eq!(run(at.as_ref(), &["image", "info", "other"])?.code, 3);

    // The node comes back at another address and takes its place again.
    let log = processes.path("repo-node1.log");
    let dir = processes.path("repo-node1");
    let metadata = processes.metadata()?.to_owned();
    let args =
        ["repo-node", "--listen", "127.0.0.1:0", "--dir", text(&dir), "--metadata", &metadata];
    let back = Daemon::start(&args, &log)?;
    assert_eq!(processes.json(&["status"])?["degraded_chunks"], 0);
    processes.nodes.push(back);
    processes.json(&["image", "import", text(&other), "other"])?;
    processes.stop()
}

/// Writes to disk `d1` and makes it a snapshot.
fn written(processes: &Processes, path: &Path, seed: u64, offset: u64) -> Result<Value> {
    let file = fs::File::options().write(true).open(path)?;
    file.write_all_at(&noise(seed, 3 << 20), offset)?;
    drop(file);
    processes.json(&["disk", "checkpoint", "d1", "--wait"])
}

#[test]
fn an_erasure_coded_pool_goes_on_without_one_node_and_is_read_without_two() -> Result<()> {
    let mut processes = Processes::start(6, "ec:4+2")?;
    let raw = image(&processes)?;
    processes.json(&["image", "import", text(&raw), "base"])?;
    let disk = processes.json(&["disk", "attach", "base", "d1"])?;
    let path = PathBuf::from(disk["path"].as_str().context("no path")?);
    same(&raw, &path)?;
    assert_eq!(written(&processes, &path, 6, 1 << 20)?["state"], "stable");
    assert_eq!(processes.json(&["status"])?["degraded_chunks"], 0);
    let first = processes.path("first");
    fs::copy(&path, &first)?;

    processes.nodes.remove(1).kill()?;
    let made = written(&processes, &path, 7, 9 << 20)?;
    assert_eq!(made["state"], "stable", "one node less does not stop writes");
    assert!(processes.json(&["status"])?["degraded_chunks"].as_u64() > Some(0));

    processes.nodes.remove(3).kill()?;
    let checkpoints = made["image"].as_str().context("no image")?;
    let newest = made["snapshot"].as_u64().context("no number")?;
    for (number, expected) in [(newest - 1, &first), (newest, &path)] {
        let (name, out) = (format!("{checkpoints}@{number}"), processes.path("out"));
        processes.json(&["image", "export", &name, text(&out)])?;
        same(expected, &out)?;
        fs::remove_file(&out)?;
        assert_eq!(processes.json(&["snapshot", "verify", &name])?["intact"], true, "{name}");
    }
    let other = sparse(&processes.path("other"), 8 << 20, &[(0, &noise(9, 4 << 20))])?;
    let at = processes.mirror.address();
    let refused: Ran = run(at.as_ref(), &["image", "import", text(&other), "other"])?;
    assert_eq!(refused.code, 5, "two nodes less are too few to write: {refused:?}");
    processes.stop()
}

#[test]
fn the_roles_wait_for_a_metadata_server_that_is_away() -> Result<()> {
    let mut processes = Processes::start(1, "replica:1")?;
    let raw = image(&processes)?;
    processes.json(&["image", "import", text(&raw), "base"])?;
    let disk = processes.json(&["disk", "attach", "base", "d1"])?;
    let path = PathBuf::from(disk["path"].as_str().context("no path")?);
    same(&raw, &path)?;
    let address = processes.metadata()?.to_owned();
    processes.metadata.take().context("no metadata server runs")?.kill()?;
    // What the host has needs nobody.
    same(&raw, &path)?;
    let down = run(processes.mirror.address().as_ref(), &["image", "list"])?;
    assert_eq!(down.code, 5, "{down:?}");
    let down = run(processes.mirror.address().as_ref(), &["disk", "attach", "base", "d2"])?;
    assert_eq!(down.code, 5, "{down:?}");
    assert!(down.stderr.contains("metadata service cannot be reached"), "{down:?}");
    let dir = processes.path("metadata");
    let args = ["metadata", "--listen", &address, "--dir", text(&dir)];
    processes.metadata = Some(Daemon::start(&args, &processes.path("metadata.log"))?);
    assert_eq!(processes.json(&["image", "list"])?[0]["image"], "base");
    assert_eq!(processes.json(&["disk", "checkpoint", "d1", "--wait"])?["state"], "stable");
    processes.stop()
}

#[test]
fn a_role_that_never_reached_its_metadata_stops_when_told() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let child = std::process::Command::new(blobcr_tests::daemon::blobcr()?)
        .args(["repo-node", "--listen", "127.0.0.1:0", "--metadata", "127.0.0.1:1", "--dir"])
        .arg(dir.path().join("node"))
        .stderr(fs::File::create(&log)?)
        .spawn();
    let mut child = child?;
    wait_until("it complains", || Ok(fs::read_to_string(&log)?.contains("not registered yet")))?;
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM)?;
    assert!(child.wait()?.success(), "{}", fs::read_to_string(&log)?);
    Ok(())
}

#[test]
fn a_second_signal_forces_a_stop_that_waits() -> Result<()> {
    let mut processes = Processes::start(1, "replica:1")?;
    let raw = image(&processes)?;
    processes.json(&["image", "import", text(&raw), "base"])?;
    let disk = processes.json(&["disk", "attach", "base", "d1"])?;
    let path = disk["path"].as_str().context("no path")?;
    fs::File::options().write(true).open(path)?.write_all_at(&noise(3, 1 << 20), 0)?;
    // The snapshot cannot be stored any more, and a stop waits for it for a while.
    processes.nodes.remove(0).kill()?;
    let made = processes.json(&["disk", "checkpoint", "d1"])?;
    assert_eq!(made["state"], "pending");
    let mirror = processes.mirror;
    mirror.signal(Signal::TERM)?;
    wait_until("it is stopping", || Ok(mirror.log().contains("a second signal forces it")))?;
    mirror.signal(Signal::TERM)?;
    assert_eq!(mirror.wait()?.code(), Some(1));
    assert!(mounts_below(processes.dir.path())?.is_empty());
    Ok(())
}

#[test]
fn a_role_says_as_json_where_it_is() -> Result<()> {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir()?;
    let mut child = std::process::Command::new(blobcr_tests::daemon::blobcr()?)
        .args(["--json", "metadata", "--listen", "127.0.0.1:0", "--dir"])
        .arg(dir.path().join("metadata"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let mut said = String::new();
    let mut stdout = BufReader::new(child.stdout.take().context("no stdout")?);
    while serde_json::from_str::<Value>(&said).is_err() {
        anyhow::ensure!(stdout.read_line(&mut said)? > 0, "it ended: {said}");
    }
    let ready: Value = serde_json::from_str(&said)?;
    assert_eq!(ready["role"], "metadata");
    let address = ready["address"].as_str().context("no address")?;
    assert_eq!(run(address.as_ref(), &["pool", "list"])?.code, 0);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::HUP)?;
    assert!(child.wait()?.success());
    Ok(())
}
