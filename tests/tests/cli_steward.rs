//! `blobcr gc`, `scrub` and `snapshot prune` against a real `blobcr up`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::noise;
use serde_json::Value;

fn live_bytes(cluster: &Cluster) -> Result<u64> {
    let status = cluster.json(&["status"])?;
    status["live_bytes"].as_u64().context("no live_bytes")
}

fn import(cluster: &Cluster, name: &str, seed: u64, bytes: usize) -> Result<()> {
    let raw = cluster.scratch().join(name);
    fs::write(&raw, noise(seed, bytes))?;
    cluster.import(&raw, name)?;
    Ok(())
}

#[test]
fn removing_an_image_and_collecting_wins_its_room_back() -> Result<()> {
    const SIZE: usize = 8 << 20;
    let cluster = Cluster::start(&["--nodes", "2", "--pool", "replica:2"])?;
    import(&cluster, "stays", 1, SIZE)?;
    import(&cluster, "goes", 2, SIZE)?;
    cluster.attach("stays", "disk")?;
    let before = live_bytes(&cluster)?;
    assert_eq!(cluster.json(&["gc"])?["records"], 0, "all of it is needed");

    cluster.json(&["image", "remove", "goes"])?;
    let told = cluster.json(&["gc", "--dry-run"])?;
    assert_eq!(live_bytes(&cluster)?, before, "a dry run changes nothing");
    let done = cluster.json(&["gc"])?;
    for key in ["records", "bytes", "roots"] {
        assert_eq!(told[key], done[key], "{key}: what was told is what was done");
    }
    assert!(done["records"].as_u64().unwrap() > 2 * 32, "{done}");
    let won = before - live_bytes(&cluster)?;
    assert!(won > 2 * SIZE as u64, "{won} bytes of two copies of {SIZE}");

    for snapshot in cluster.json(&["snapshot", "list", "stays"])?.as_array().unwrap() {
        let name = format!("stays@{}", snapshot["snapshot"]);
        assert_eq!(cluster.json(&["snapshot", "verify", &name])?["intact"], true);
    }
    let scrubbed = cluster.json(&["scrub"])?;
    assert_eq!(scrubbed["lost"], 0);
    for node in scrubbed["nodes"].as_array().unwrap() {
        assert!(node["records"].as_u64().unwrap() > 32, "{node}");
        assert_eq!((&node["damaged"], &node["missing"]), (&0.into(), &0.into()), "{node}");
    }
    Ok(())
}

#[test]
fn a_steward_collects_by_itself() -> Result<()> {
    let cluster = Cluster::start(&["--collect-every", "1"])?;
    import(&cluster, "goes", 3, 4 << 20)?;
    let before = live_bytes(&cluster)?;
    cluster.json(&["image", "remove", "goes"])?;
    wait_until("the steward has collected", || Ok(live_bytes(&cluster)? < before / 2))
}

#[test]
fn prune_tells_first_and_keeps_what_it_says() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    import(&cluster, "base", 4, 1 << 20)?;
    let path = cluster.attach("base", "disk")?;
    let mut image = String::new();
    for byte in 1..=5u8 {
        let file = File::options().write(true).open(&path)?;
        file.write_all_at(&vec![byte; 1 << 20], 0)?;
        file.sync_all()?;
        drop(file);
        let made = cluster.json(&["disk", "checkpoint", "disk", "--wait"])?;
        image = made["image"].as_str().context("no image")?.to_owned();
    }
    let states = |cluster: &Cluster| -> Result<Vec<String>> {
        let list = cluster.json(&["snapshot", "list", &image])?;
        let state = |snapshot: &Value| snapshot["state"].as_str().unwrap().to_owned();
        Ok(list.as_array().unwrap().iter().map(state).collect())
    };
    let ran = cluster.run(&["snapshot", "prune", &image])?;
    assert_eq!(ran.code, 2, "a policy is needed");

    cluster.json(&["snapshot", "pin", &format!("{image}@3")])?;
    let told = cluster.json(&["snapshot", "prune", &image, "--keep-last", "2", "--dry-run"])?;
    let actions = |views: &Value| -> Vec<(u64, String)> {
        let views = views.as_array().unwrap().iter();
        views.map(|view| (view["snapshot"].as_u64().unwrap(), view["action"].to_string())).collect()
    };
    assert_eq!(states(&cluster)?, ["stable"; 6], "a dry run changes nothing");
    let done = cluster.json(&["snapshot", "prune", &image, "--keep-last", "2"])?;
    let removed = |views: &Value, word: &str| -> Vec<u64> {
        let word = format!("{word:?}");
        actions(views).into_iter().filter(|(_, a)| *a == word).map(|(n, _)| n).collect()
    };
    let gone = removed(&done, "removed");
    assert_eq!(removed(&told, "would be removed"), gone);
    assert!(gone.contains(&2) && gone.contains(&4) && !gone.contains(&3), "{done}");
    let states = states(&cluster)?;
    assert_eq!(&states[4..], ["stable", "stable"], "{states:?}");
    assert_eq!((&*states[1], &*states[2]), ("obsolete", "stable"), "{states:?}");

    cluster.json(&["gc"])?;
    for number in [3, 5, 6] {
        let name = format!("{image}@{number}");
        assert_eq!(cluster.json(&["snapshot", "verify", &name])?["intact"], true, "{name}");
    }
    Ok(())
}
