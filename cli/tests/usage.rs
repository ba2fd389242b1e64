//! What the command says without a repository. (Having this test also makes cargo build the command
//! whenever it builds the tests, so that the end-to-end tests never run an old one.)

use std::process::{Command, Output};

fn blobcr(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blobcr"));
    command.args(args).env_remove("BLOBCR_ENDPOINT").output().expect("blobcr was built")
}

#[test]
fn help_and_version_go_to_stdout() {
    let version = blobcr(&["--version"]);
    assert_eq!(version.stdout, format!("blobcr {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
    for args in [&["--help"][..], &["image", "--help"], &["up", "--help"], &["help", "disk"]] {
        let ran = blobcr(args);
        assert!(ran.status.success() && ran.stderr.is_empty(), "{args:?}");
        assert!(String::from_utf8_lossy(&ran.stdout).contains("Usage: blobcr"), "{args:?}");
    }
}

#[test]
fn what_makes_no_sense_is_a_usage_error_on_stderr() {
    for args in [
        &[][..],
        &["no-such-verb"],
        &["image"],
        &["image", "import"],
        &["disk", "attach", "../base", "d1"],
        &["up", "--dir", "d", "--nodes", "0"],
        &["metadata", "--listen", "127.0.0.1:0", "--dir", "d", "--store", "csv"],
        &["status"],
        &["status", "--endpoint", "nonsense"],
        &["--log", "a=b=c", "status"],
    ] {
        let ran = blobcr(args);
        assert_eq!(ran.status.code(), Some(2), "{args:?}");
        assert!(ran.stdout.is_empty() && !ran.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn doctor_says_as_json_what_it_found() {
    let ran = blobcr(&["--json", "doctor", "--dir", env!("CARGO_TARGET_TMPDIR")]);
    let found: serde_json::Value =
        serde_json::from_slice(&ran.stdout).expect("one JSON object on stdout");
    assert_eq!(found["ok"], ran.status.success());
    assert!(found["checks"].as_array().is_some_and(|checks| checks.len() >= 9), "{found}");
}
