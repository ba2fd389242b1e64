//! What the command says to bad input: an exit code, and a message that says what to do.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::{Cluster, Ran, command, run};
use blobcr_tests::daemon::blobcr;
use blobcr_tests::disk_file::{noise, sparse};
use rustix::process::Signal;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

#[track_caller]
fn refused(ran: Ran, code: i32, says: &str) {
    assert!(ran.code == code && ran.stderr.contains(says), "not {code} {says:?}: {ran:?}");
    assert_eq!(ran.stdout, "");
}

#[test]
fn names_that_are_none_are_usage_errors() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("raw"), 4096, &[(0, b"x")])?;
    cluster.import(&raw, "base")?;
    let long = "n".repeat(300);
    for name in ["a/b", "..", ".", "/etc/passwd", "a\u{1}b", "a\nb", "", " ", "-x", long.as_str()] {
        refused(cluster.run(&["image", "import", text(&raw), "--", name])?, 2, "");
        refused(cluster.run(&["image", "clone", "base", "--", name])?, 2, "");
        refused(cluster.run(&["disk", "attach", "base", "--", name])?, 2, "");
        refused(cluster.run(&["vm", "add", "--disk", "d", "--", name])?, 2, "");
        refused(cluster.run(&["pool", "create", "--policy", "replica:1", "--", name])?, 2, "");
    }
    refused(cluster.run(&["image", "info", "a/b"])?, 2, "are allowed");
    refused(cluster.run(&["image", "export", "base@0", "x"])?, 2, "IMAGE@N");
    refused(cluster.run(&["snapshot", "wait", "base"])?, 2, "base@N");
    assert_eq!(cluster.json(&["image", "list"])?.as_array().map(Vec::len), Some(1));
    Ok(())
}

#[test]
fn a_damaged_qcow2_file_leaves_nothing() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let dir = cluster.scratch().to_owned();
    let raw = sparse(&dir.join("raw"), 8 << 20, &[(0, &noise(1, 3 << 20)), (5 << 20, b"end")])?;
    let good = dir.join("good.qcow2");
    let made = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&good)])
        .status()?;
    ensure!(made.success());
    let len = fs::metadata(&good)?.len();
    let bad = dir.join("bad.qcow2");
    for cut in [1, 100, 5000, 65_536, 1 << 20, len - 60, len - 3] {
        fs::copy(&good, &bad)?;
        File::options().write(true).open(&bad)?.set_len(len - cut)?;
        let args = ["image", "import", text(&bad), "image", "--format", "qcow2"];
        let ran = cluster.run(&args)?;
        assert_eq!(ran.code, 6, "{cut} bytes cut off: {ran:?}");
        assert!(ran.stderr.contains("bad.qcow2"), "{ran:?}");
    }
    // The tables behind the header: what `qemu-img check` finds.
    fs::copy(&good, &bad)?;
    File::options().write(true).open(&bad)?.write_all_at(&noise(9, 100_000), 65_536)?;
    refused(cluster.run(&["image", "import", text(&bad), "image"])?, 6, "qemu-img check -r all");
    assert_eq!(cluster.json(&["image", "list"])?, serde_json::json!([]));
    assert_eq!(cluster.run(&["snapshot", "list", "image"])?.code, 3);
    Ok(())
}

#[test]
fn a_qcow2_file_does_not_read_other_files_unasked() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let dir = cluster.scratch().to_owned();
    let secret = sparse(&dir.join("secret"), 1 << 20, &[(0, b"secret")])?;
    let overlay = dir.join("overlay.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-f", "qcow2", "-F", "raw", "-b", text(&secret), text(&overlay)])
        .output()?;
    ensure!(made.status.success());
    let import = ["image", "import", text(&overlay), "image"];
    refused(cluster.run(&import)?, 2, "--allow-backing-file");
    cluster.json(&[&import[..], &["--allow-backing-file"]].concat())?;
    let out = dir.join("out");
    cluster.json(&["image", "export", "image", text(&out)])?;
    blobcr_tests::disk_file::same(&secret, &out)
}

#[test]
fn files_that_are_no_images_are_refused() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let dir = cluster.scratch().to_owned();
    refused(cluster.run(&["image", "import", text(&dir.join("none")), "i"])?, 3, "none");
    refused(cluster.run(&["image", "import", text(&dir), "i"])?, 2, "directory");
    refused(cluster.run(&["image", "import", "/dev/null", "i"])?, 2, "regular file");
    let raw = sparse(&dir.join("raw"), 9000, &[(0, b"no qcow2")])?;
    let as_qcow2 = ["image", "import", text(&raw), "i", "--format", "qcow2"];
    refused(cluster.run(&as_qcow2)?, 6, "--format raw");
    let huge = sparse(&dir.join("huge"), 9 << 40, &[])?;
    refused(cluster.run(&["image", "import", text(&huge), "i"])?, 2, "at most");
    refused(cluster.run(&["image", "import", text(&raw), "i", "--pool", "p"])?, 3, "pool create");
    assert_eq!(cluster.json(&["image", "list"])?, serde_json::json!([]));
    Ok(())
}

#[test]
fn a_missing_qemu_img_says_which_package_has_it() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let dir = cluster.scratch().to_owned();
    let qcow2 = dir.join("q");
    ensure!(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", text(&qcow2), "1M"])
            .status()?
            .success()
    );
    let output = cluster
        .command(&["image", "import", text(&qcow2), "i"])?
        .env("PATH", "/nonexistent")
        .output()?;
    refused(output.into(), 1, "qemu-utils");
    Ok(())
}

#[test]
fn what_exists_is_not_made_again_and_what_does_not_is_not_found() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("raw"), 1 << 20, &[(0, b"x")])?;
    cluster.import(&raw, "base")?;
    refused(cluster.run(&["image", "import", text(&raw), "base"])?, 4, "image remove base");
    refused(cluster.run(&["image", "clone", "base", "base"])?, 4, "base");
    cluster.attach("base", "disk")?;
    refused(cluster.run(&["disk", "attach", "base", "disk"])?, 4, "disk");
    let create = ["pool", "create", "default", "--policy", "replica:1"];
    refused(cluster.run(&create)?, 4, "default");
    refused(cluster.run(&["pool", "create", "p", "--policy", "raid:5"])?, 2, "replica:N");

    let out = cluster.scratch().join("out");
    for verb in [
        &["image", "info", "none"][..],
        &["image", "remove", "none"],
        &["image", "remove", "base@9"],
        &["image", "clone", "none", "new"],
        &["image", "export", "base@9", text(&out)],
        &["snapshot", "list", "none"],
        &["snapshot", "wait", "base@9"],
        &["snapshot", "verify", "base@9"],
        &["snapshot", "diff", "base@1", "base@9"],
        &["disk", "attach", "base@9", "new"],
        &["disk", "attach", "none", "new"],
        &["disk", "info", "none"],
        &["disk", "detach", "none"],
        &["disk", "checkpoint", "none"],
        &["disk", "rollback", "none"],
        &["disk", "rollback", "disk", "@9"],
        &["vm", "add", "vm", "--disk", "none"],
        &["vm", "remove", "none"],
    ] {
        let ran = cluster.run(verb)?;
        assert_eq!(ran.code, 3, "{verb:?}: {ran:?}");
        assert!(ran.stderr.starts_with("blobcr: ") && ran.stdout.is_empty(), "{ran:?}");
    }
    assert!(!out.exists());
    Ok(())
}

#[test]
fn a_repository_that_is_down_is_unavailable() -> Result<()> {
    let mut cluster = Cluster::start(&[])?;
    let address = cluster.daemon()?.address().to_owned();
    let dir = cluster.dir();
    cluster.stop(Signal::TERM)?;
    refused(cluster.run(&["status"])?, 5, "blobcr up --dir");
    refused(run(address.as_ref(), &["status"])?, 5, &address);
    refused(run("127.0.0.1:1".as_ref(), &["image", "list"])?, 5, "start it");
    let none = dir.join("none");
    refused(run(none.as_os_str(), &["disk", "list"])?, 5, "blobcr up --dir");

    // A daemon that was killed leaves its endpoint file.
    cluster.restart()?;
    cluster.kill()?;
    ensure!(dir.join("endpoint").exists());
    refused(cluster.run(&["image", "list"])?, 5, "start it again");

    refused(command("".as_ref(), &["status"])?.output()?.into(), 2, "BLOBCR_ENDPOINT");
    refused(run("nonsense".as_ref(), &["status"])?, 2, "host:port");
    Ok(())
}

#[test]
fn a_directory_or_mount_point_is_used_once() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let dir = cluster.dir();
    let scratch = cluster.scratch();
    let none = "127.0.0.1:1";
    let start = |args: &[&str]| -> Result<Ran> {
        Ok(Command::new(blobcr()?).args(args).output().context("start blobcr")?.into())
    };
    let up = start(&["up", "--dir", text(&dir)])?;
    refused(up, 4, &cluster.daemon()?.pid().to_string());
    let at = ["--listen", "127.0.0.1:0"];
    let mirror_dir = dir.join("mirror");
    let other = scratch.join("other");
    fs::create_dir(&other)?;
    let mirror = |dir: &Path, mount: &Path| {
        let args = ["mirror", "--metadata", none, "--dir", text(dir), "--mount", text(mount)];
        start(&[&args[..], &at].concat())
    };
    refused(mirror(&mirror_dir, &other)?, 4, "another mirror");
    let fresh = scratch.join("fresh");
    refused(mirror(&fresh, &cluster.mount())?, 4, "already mounted");
    refused(mirror(&fresh, scratch)?, 4, "not empty");
    refused(mirror(&fresh, &scratch.join("no/mount"))?, 3, "does not exist");
    let metadata = dir.join("metadata");
    let args = ["metadata", "--dir", text(&metadata)];
    refused(start(&[&args[..], &at].concat())?, 4, "in use");
    let node = dir.join("nodes/1");
    let args = ["repo-node", "--metadata", none, "--dir", text(&node)];
    refused(start(&[&args[..], &at].concat())?, 4, "in use");
    let vms = dir.join("vms");
    refused(start(&["proxy", "--mirror", none, "--sockets", text(&vms)])?, 4, "another proxy");

    // An address that is taken, and one that is none of this host.
    let taken = cluster.daemon()?.address().to_owned();
    let busy = start(&["metadata", "--dir", text(&fresh), "--listen", &taken])?;
    refused(busy, 1, "--listen");
    Ok(())
}

#[test]
fn a_snapshot_whose_root_is_gone_is_an_integrity_error() -> Result<()> {
    let mut cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("raw"), 1 << 20, &[(0, &noise(1, 500_000))])?;
    cluster.import(&raw, "base")?;
    cluster.stop(Signal::TERM)?;
    // The node's disk was replaced by an empty one: it comes back with its identity and nothing
    // else.
    for entry in fs::read_dir(cluster.dir().join("nodes/1"))? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".seg") || name.ends_with(".idx") {
            fs::remove_file(entry.path())?;
        }
    }
    cluster.restart()?;
    let out = cluster.scratch().join("out");
    refused(cluster.run(&["image", "export", "base", text(&out)])?, 6, "base@1");
    assert!(!out.exists());
    let verify = cluster.run(&["--json", "snapshot", "verify", "base@1"])?;
    assert_eq!(verify.code, 6, "{verify:?}");
    let report: serde_json::Value = serde_json::from_str(&verify.stdout)?;
    assert_eq!(report["intact"], false);
    assert_eq!(report["damage"][0]["offset_bytes"], 0);
    Ok(())
}
