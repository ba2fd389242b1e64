//! `blobcr disk`: disks on a real mount, through stops, kills and signals.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};
use blobcr_tests::cluster::{Cluster, mounts_below};
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::{noise, same, sparse};
use rustix::process::Signal;
use serde_json::Value;

const SIZE: u64 = 16 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

/// A cluster with the image `base`, which holds some noise at 1 MiB.
fn with_base(args: &[&str]) -> Result<Cluster> {
    let cluster = Cluster::start(args)?;
    let raw = sparse(&cluster.scratch().join("base.raw"), SIZE, &[(1 << 20, &noise(1, 600_000))])?;
    cluster.import(&raw, "base")?;
    Ok(cluster)
}

fn write(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    file.write_all_at(bytes, offset)?;
    Ok(file.sync_all()?)
}

fn read(path: &Path, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    File::open(path)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default()
}

#[test]
fn a_disk_is_attached_written_checkpointed_and_rolled_back() -> Result<()> {
    let cluster = with_base(&[])?;
    let plain = cluster.run(&["disk", "attach", "base@1", "d1"])?;
    let path = Path::new(plain.stdout.trim());
    assert_eq!(path, cluster.mount().join("disks/d1.raw"));
    assert_eq!(fs::metadata(path)?.len(), SIZE);
    assert!(read(path, 1 << 20, 600_000)? == noise(1, 600_000));

    let disk = cluster.json(&["disk", "info", "d1"])?;
    for key in ["disk", "image", "snapshot", "checkpoint_image", "path", "size_bytes"] {
        assert!(keys(&disk).contains(&key), "{key} in {disk}");
    }
    assert_eq!((&disk["image"], &disk["snapshot"]), (&"base".into(), &1.into()));
    assert!(disk["checkpoint_image"].is_null() && disk["last_stable"].is_null());

    write(path, 0, b"first")?;
    let first = cluster.json(&["disk", "checkpoint", "d1", "--wait"])?;
    assert_eq!(first["state"], "stable");
    assert!(first["dirty_bytes"].as_u64().unwrap() >= 4096, "{first}");
    assert!(first["downtime_us"].as_u64().unwrap() > 0);
    write(path, 0, b"second")?;
    let second = cluster.json(&["disk", "checkpoint", "d1"])?;
    assert_eq!(second["image"], first["image"]);
    assert!(second["snapshot"].as_u64() > first["snapshot"].as_u64());
    let name = format!("{}@{}", second["image"].as_str().unwrap(), second["snapshot"]);
    assert_eq!(cluster.json(&["snapshot", "wait", &name])?["state"], "stable");
    assert_eq!(cluster.json(&["disk", "info", "d1"])?["checkpoint_image"], first["image"]);

    // Each snapshot is the disk as it was; the image that was attached is as it was.
    for (snapshot, start) in [(&first, &b"first\0"[..]), (&second, b"second")] {
        let name = format!("{}@{}", snapshot["image"].as_str().unwrap(), snapshot["snapshot"]);
        let out = cluster.scratch().join(format!("out-{}", snapshot["snapshot"]));
        cluster.json(&["image", "export", &name, text(&out)])?;
        assert_eq!(read(&out, 0, 6)?, start);
        assert!(read(&out, 1 << 20, 600_000)? == noise(1, 600_000));
    }
    let out = cluster.scratch().join("base-out");
    cluster.json(&["image", "export", "base", text(&out)])?;
    same(&cluster.scratch().join("base.raw"), &out)?;

    write(path, 0, b"third!")?;
    let at = format!("@{}", first["snapshot"]);
    cluster.json(&["disk", "rollback", "d1", &at])?;
    assert_eq!(read(path, 0, 6)?, b"first\0");
    cluster.json(&["disk", "rollback", "d1"])?;
    assert_eq!(read(path, 0, 6)?, b"second");
    Ok(())
}

#[test]
fn a_disk_with_changes_is_not_thrown_away_unasked() -> Result<()> {
    let cluster = with_base(&[])?;
    let path = cluster.attach("base", "d1")?;
    write(&path, 0, b"precious")?;
    let refused = cluster.run(&["disk", "detach", "d1"])?;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("discard"), "{refused:?}");
    assert_eq!(read(&path, 0, 8)?, b"precious");
    // Checkpointed, nothing of it would be lost.
    cluster.json(&["disk", "checkpoint", "d1", "--wait"])?;
    let detached = cluster.json(&["disk", "detach", "d1"])?;
    assert_eq!((&detached["disk"], &detached["state"]), (&"d1".into(), &"detached".into()));
    assert!(!path.exists());

    let path = cluster.attach("base", "d2")?;
    write(&path, 0, b"junk")?;
    cluster.json(&["disk", "detach", "d2", "--discard-changes"])?;
    assert_eq!(cluster.json(&["disk", "list"])?, serde_json::json!([]));
    Ok(())
}

#[test]
fn what_a_disk_needs_is_pinned_and_not_removed_under_it() -> Result<()> {
    let cluster = with_base(&[])?;
    let disk = cluster.attach("base", "d1")?;
    let refused = cluster.run(&["image", "remove", "base"])?;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("base@1") && refused.stderr.contains("detach"), "{refused:?}");
    let pins = cluster.json(&["snapshot", "pins"])?;
    assert_eq!((&pins[0]["image"], &pins[0]["snapshot"]), (&"base".into(), &1.into()));
    assert!(pins[0]["holder"].as_str().unwrap().ends_with("/d1"), "{pins}");
    // So the first checkpoint finds its base, whoever tried to remove it.
    write(&disk, 0, b"first")?;
    let made = cluster.json(&["disk", "checkpoint", "d1", "--wait"])?;
    let own = made["image"].as_str().unwrap();
    assert_eq!(cluster.run(&["image", "remove", own])?.code, 4);
    cluster.json(&["disk", "detach", "d1"])?;
    assert_eq!(cluster.json(&["snapshot", "pins"])?.as_array().map(Vec::len), Some(0));

    // An operator's pin keeps a snapshot that could go otherwise.
    let made = format!("{own}@1");
    assert_eq!(cluster.json(&["snapshot", "pin", &made])?["holder"], "operator");
    assert_eq!(cluster.run(&["image", "remove", &made])?.code, 4);
    assert_eq!(cluster.json(&["snapshot", "unpin", &made])?["state"], "unpinned");
    for name in [&made, "base", own] {
        cluster.json(&["image", "remove", name])?;
    }
    Ok(())
}

#[test]
fn a_disk_grows_at_attach_and_is_never_cut() -> Result<()> {
    let cluster = with_base(&[])?;
    let args = ["disk", "attach", "base", "d1", "--size", "1G"];
    let disk = cluster.json(&args)?;
    assert_eq!(disk["size_bytes"], 1 << 30);
    let path = Path::new(disk["path"].as_str().unwrap());
    assert_eq!(fs::metadata(path)?.len(), 1 << 30);
    assert!(read(path, SIZE, 4096)? == [0; 4096]);
    write(path, (1 << 30) - 5, b"grown")?;
    let made = cluster.json(&["disk", "checkpoint", "d1", "--wait"])?;
    let image = made["image"].as_str().unwrap();
    assert_eq!(cluster.json(&["image", "info", image])?["size_bytes"], 1 << 30);
    let cut = cluster.run(&["disk", "attach", "base", "d2", "--size", "1M"])?;
    assert!(cut.code == 2 || cut.code == 4, "{cut:?}");
    Ok(())
}

#[test]
fn disks_survive_a_kill_and_a_stop_of_the_daemon() -> Result<()> {
    let mut cluster = with_base(&["--nodes", "2", "--pool", "replica:2"])?;
    let path = cluster.attach("base", "d1")?;
    write(&path, 5000, b"synced before the kill")?;
    let made = cluster.json(&["disk", "checkpoint", "d1", "--wait"])?;
    write(&path, 9000, b"after the checkpoint")?;
    cluster.kill()?;
    // The mount of the dead daemon is still there, and so is its endpoint file.
    assert_eq!(mounts_below(cluster.scratch())?.len(), 1);
    assert!(cluster.dir().join("endpoint").exists());
    cluster.restart()?;
    for signal in [Signal::TERM, Signal::INT] {
        assert_eq!(read(&path, 5000, 22)?, b"synced before the kill");
        assert_eq!(read(&path, 9000, 20)?, b"after the checkpoint");
        assert!(read(&path, 1 << 20, 600_000)? == noise(1, 600_000));
        let disk = cluster.json(&["disk", "info", "d1"])?;
        assert_eq!(disk["last_stable"], made["snapshot"]);
        cluster.stop(signal)?;
        cluster.restart()?;
    }
    let again = cluster.json(&["disk", "checkpoint", "d1", "--wait"])?;
    assert_eq!(again["image"], made["image"]);
    assert!(again["snapshot"].as_u64() > made["snapshot"].as_u64());
    cluster.stop(Signal::TERM)
}

#[test]
fn a_stop_leaves_nothing_even_while_files_are_open() -> Result<()> {
    for signal in [Signal::TERM, Signal::INT] {
        let mut cluster = with_base(&[])?;
        let path = cluster.attach("base", "d1")?;
        let open = File::options().read(true).write(true).open(&path)?;
        open.write_all_at(b"x", 0)?;
        cluster.stop(signal)?;
        assert!(open.write_all_at(b"y", 0).is_err());
        assert!(mounts_below(cluster.scratch())?.is_empty());
    }
    Ok(())
}

#[test]
fn an_unmount_from_outside_ends_the_daemon_in_order() -> Result<()> {
    let mut cluster = with_base(&[])?;
    cluster.attach("base", "d1")?;
    let status =
        std::process::Command::new("fusermount3").arg("-u").arg(cluster.mount()).status()?;
    ensure!(status.success());
    wait_until("the endpoint file is gone", || Ok(!cluster.dir().join("endpoint").exists()))?;
    // It ends by itself; the signal finds it ended, or stopping.
    let _ = cluster.stop(Signal::TERM);
    cluster.check_nothing_left()?;
    cluster.restart()?;
    assert_eq!(cluster.json(&["disk", "list"])?[0]["disk"], "d1");
    Ok(())
}

#[test]
fn snapshots_of_images_show_in_the_mount_and_are_read_only() -> Result<()> {
    let cluster = with_base(&[])?;
    let image = cluster.mount().join("images/base");
    same(&cluster.scratch().join("base.raw"), &image.join("1.raw"))?;
    assert_eq!(fs::read_link(image.join("latest.raw"))?, Path::new("1.raw"));
    assert!(File::options().write(true).open(image.join("1.raw")).is_err());
    assert!(fs::write(cluster.mount().join("images/new"), "x").is_err());
    Ok(())
}

#[test]
fn a_snapshot_is_forked_into_many_disks() -> Result<()> {
    let cluster = with_base(&[])?;
    let made = cluster.run(&["disk", "fork", "base@1", "agent", "--count", "3"])?;
    let paths: Vec<&Path> = made.stdout.lines().map(Path::new).collect();
    let expected = [1, 2, 3].map(|n| cluster.mount().join(format!("disks/agent-{n}.raw")));
    assert_eq!(paths, expected, "{}", made.stderr);
    write(paths[1], 0, b"mine")?;
    assert_eq!(read(paths[0], 0, 4)?, [0; 4]);
    assert!(read(paths[2], 1 << 20, 600_000)? == noise(1, 600_000));
    let again = cluster.run(&["disk", "fork", "base", "agent", "--count", "4"])?;
    assert_eq!(again.code, 4, "{}", again.stderr);
    let disks = cluster.json(&["disk", "list"])?;
    assert_eq!(disks.as_array().map(Vec::len), Some(3), "{disks}");
    let none = cluster.run(&["disk", "fork", "base", "other", "--count", "0"])?;
    assert_eq!(none.code, 2, "{}", none.stderr);
    let larger = cluster.json(&["disk", "fork", "base", "x", "--count", "1", "--size", "32M"])?;
    assert_eq!(larger[0]["size_bytes"], 32 << 20, "{larger}");
    Ok(())
}
