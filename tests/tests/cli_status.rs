//! What operators and their scripts look at: `status`, `doctor`, `node`, `pool`, `vm`, `--json`.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use blobcr_tests::cluster::{Cluster, Ran};
use blobcr_tests::daemon::blobcr;
use blobcr_tests::disk_file::sparse;
use serde_json::Value;

fn with_disk() -> Result<Cluster> {
    let cluster = Cluster::start(&["--nodes", "2"])?;
    let raw = sparse(&cluster.scratch().join("raw"), 1 << 20, &[(0, b"x")])?;
    cluster.import(&raw, "base")?;
    cluster.attach("base", "d1")?;
    Ok(cluster)
}

fn is_rfc_3339(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|text| text.len() >= 20 && text.ends_with('Z') && &text[10..11] == "T")
}

#[test]
fn status_tells_of_everything() -> Result<()> {
    let cluster = with_disk()?;
    let status = cluster.json(&["status"])?;
    assert_eq!(status["role"], "up");
    assert_eq!(status["degraded_chunks"], 0);
    assert!(status.as_object().context("no object")?.contains_key("repair"));
    assert!(status["repair"].is_null());
    assert_eq!(status["nodes"].as_array().map(Vec::len), Some(2));
    assert_eq!(status["pools"][0]["pool"], "default");
    assert_eq!(status["disks"][0]["disk"], "d1");
    assert_eq!(
        (&status["images"], &status["pending_snapshots"]),
        (&1.into(), &Value::Array(vec![]))
    );
    assert!(status["free_bytes"].as_u64() > Some(0));

    let nodes = cluster.json(&["node", "list"])?;
    let node = &nodes[0];
    assert!(node["node"].as_str().is_some_and(|id| id.len() == 32), "{node}");
    assert_eq!(
        (&node["state"], &node["health"], &node["damaged_records"]),
        (&"up".into(), &"ok".into(), &0.into())
    );
    assert!(is_rfc_3339(&node["registered_at"]));
    Ok(())
}

#[test]
fn every_verb_prints_one_json_value_or_a_table() -> Result<()> {
    let cluster = with_disk()?;
    let out = cluster.scratch().join("out");
    let out = out.to_str().context("path")?;
    for verb in [
        &["status"][..],
        &["image", "list"],
        &["image", "info", "base"],
        &["image", "export", "base", out, "--force"],
        &["snapshot", "list", "base"],
        &["snapshot", "wait", "base@1"],
        &["snapshot", "verify", "base@1"],
        &["snapshot", "diff", "base@1", "base@1"],
        &["disk", "list"],
        &["disk", "info", "d1"],
        &["disk", "checkpoint", "d1"],
        &["vm", "list"],
        &["pool", "list"],
        &["node", "list"],
        &["doctor"],
    ] {
        let value = cluster.json(verb).with_context(|| format!("{verb:?}"))?;
        assert!(value.is_object() || value.is_array());
        let ran = cluster.run(verb)?;
        assert_eq!(ran.code, 0, "{verb:?}: {ran:?}");
        // No colours, no progress, no chatter: nobody watches.
        assert!(!ran.stdout.contains('\u{1b}') && !ran.stderr.contains('\u{1b}'), "{ran:?}");
        assert_eq!(ran.stderr, "", "{verb:?}");
        assert!(!ran.stdout.starts_with('{') && !ran.stdout.starts_with('['), "{ran:?}");
    }
    let made = cluster.json(&["image", "info", "base"])?;
    assert!(is_rfc_3339(&made["created_at"]), "{made}");
    let tabled = cluster.run(&["image", "list"])?.stdout;
    let lines: Vec<_> = tabled.lines().collect();
    assert!(
        lines[0].starts_with("IMAGE") && lines.iter().any(|l| l.starts_with("base")),
        "{tabled}"
    );
    Ok(())
}

#[test]
fn vms_get_a_socket_each_and_keep_it_over_a_restart() -> Result<()> {
    let mut cluster = with_disk()?;
    cluster.attach("base", "d2")?;
    let vm = cluster.json(&["vm", "add", "vm1", "--disk", "d1", "d2"])?;
    assert_eq!((&vm["vm"], &vm["disks"]), (&"vm1".into(), &serde_json::json!(["d1", "d2"])));
    let socket = Path::new(vm["socket"].as_str().context("no socket")?).to_owned();
    assert_eq!(socket, cluster.dir().join("vms/vm1.sock"));
    assert!(fs::metadata(&socket)?.file_type().is_socket());
    let args = vm["qemu_args"].as_array().context("no arguments")?;
    assert!(args.iter().any(|a| a.as_str().is_some_and(|a| a.contains("vm1.sock"))), "{vm}");
    assert_eq!(cluster.run(&["vm", "add", "vm2", "--disk", "d1"])?.code, 4);

    cluster.stop(rustix::process::Signal::TERM)?;
    assert!(!socket.exists());
    cluster.restart()?;
    assert_eq!(cluster.json(&["vm", "list"])?[0]["disks"], vm["disks"]);
    assert!(fs::metadata(&socket)?.file_type().is_socket());
    cluster.json(&["vm", "remove", "vm1"])?;
    assert!(!socket.exists());
    assert_eq!(cluster.json(&["vm", "list"])?, serde_json::json!([]));
    Ok(())
}

#[test]
fn doctor_checks_the_machine_and_says_how_to_mend_it() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let report = cluster.json(&["doctor", "--dir", cluster.scratch().to_str().context("path")?])?;
    assert_eq!(report["ok"], true);
    let checks = report["checks"].as_array().context("no checks")?;
    let names: Vec<_> = checks.iter().filter_map(|check| check["check"].as_str()).collect();
    for name in ["/dev/fuse", "mount", "allow_other", "kernel", "free space", "clock", "endpoint"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    for check in checks {
        assert!(check["state"] == "ok" || check["mend"].is_string(), "{check}");
    }
    // A directory that no role can use.
    let bad: Ran = Command::new(blobcr()?)
        .args(["--json", "doctor", "--dir", "/proc"])
        .env_remove("BLOBCR_ENDPOINT")
        .output()?
        .into();
    assert_eq!(bad.code, 1, "{bad:?}");
    let report: Value = serde_json::from_str(&bad.stdout)?;
    assert_eq!(report["ok"], false);
    assert!(bad.stderr.contains("cannot run every role"), "{bad:?}");
    Ok(())
}
