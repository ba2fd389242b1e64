use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

fn include_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/include")
}

/// The fields of a structure and where this file says they lie.
type Layout = (&'static str, usize, Vec<(&'static str, Range<usize>)>);

fn layouts() -> [Layout; 3] {
    let shared = |rest: Vec<(&'static str, Range<usize>)>| {
        let mut all =
            vec![("version", common::VERSION), ("size", common::SIZE), ("flags", common::FLAGS)];
        all.extend(rest);
        all
    };
    [
        (
            "blobcr_clone",
            clone::LEN,
            shared(vec![
                ("reserved", clone::RESERVED),
                ("image_id", clone::IMAGE_ID),
                ("image", clone::IMAGE),
            ]),
        ),
        (
            "blobcr_commit",
            commit::LEN,
            shared(vec![
                ("state", common::STATE),
                ("timeout_ms", commit::TIMEOUT_MS),
                ("number", commit::NUMBER),
                ("image_id", commit::IMAGE_ID),
                ("dirty_bytes", commit::DIRTY_BYTES),
                ("downtime_ns", commit::DOWNTIME_NS),
                ("image", commit::IMAGE),
            ]),
        ),
        (
            "blobcr_status",
            status::LEN,
            shared(vec![
                ("state", common::STATE),
                ("number", status::NUMBER),
                ("image_id", status::IMAGE_ID),
                ("last_stable", status::LAST_STABLE),
                ("pending", status::PENDING),
                ("disk_bytes", status::DISK_BYTES),
                ("dirty_bytes", status::DIRTY_BYTES),
                ("local_bytes", status::LOCAL_BYTES),
                ("image", status::IMAGE),
                ("reason", status::REASON),
            ]),
        ),
    ]
}

/// A C program that prints what the compiler makes of the header, and what we expect it to print.
fn program() -> (String, String) {
    let mut code = String::from(
        "#include <blobcr.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n\
         struct blobcr_commit commit;\nBLOBCR_INIT(&commit);\n",
    );
    let mut expected = String::new();
    let mut value = |c: &str, ours: u64| {
        writeln!(code, "printf(\"%llu {c}\\n\", (unsigned long long)({c}));").unwrap();
        writeln!(expected, "{ours} {c}").unwrap();
    };
    value("BLOBCR_IOC_CLONE", CLONE.into());
    value("BLOBCR_IOC_COMMIT", COMMIT.into());
    value("BLOBCR_IOC_STATUS", STATUS.into());
    value("BLOBCR_ABI_VERSION", ABI_VERSION.into());
    value("BLOBCR_COMMIT_WAIT", COMMIT_WAIT.into());
    value("BLOBCR_STATE_NONE", SnapshotState::Unspecified as u64);
    value("BLOBCR_STATE_PENDING", SnapshotState::Pending as u64);
    value("BLOBCR_STATE_STABLE", SnapshotState::Stable as u64);
    value("BLOBCR_STATE_FAILED", SnapshotState::Failed as u64);
    value("BLOBCR_STATE_OBSOLETE", SnapshotState::Obsolete as u64);
    value("commit.size", commit::LEN as u64);
    value("commit.version", ABI_VERSION.into());
    for (name, len, fields) in layouts() {
        value(&format!("sizeof(struct {name})"), len as u64);
        let mut end = 0;
        for (field, at) in fields {
            assert_eq!(at.start, end, "{name}.{field} leaves a gap");
            end = at.end;
            value(&format!("offsetof(struct {name}, {field})"), at.start as u64);
            value(&format!("sizeof(((struct {name} *)0)->{field})"), at.len() as u64);
        }
        assert_eq!(end, len, "{name} has a tail that nothing fills");
    }
    code.push_str("return 0;\n}\n");
    (code, expected)
}

fn compile_and_run(compiler: &str, suffix: &str, standard: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (code, expected) = program();
    let source = dir.path().join(format!("layout.{suffix}"));
    let binary = dir.path().join("layout");
    std::fs::write(&source, code).unwrap();
    let built = Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-o"])
        .args([&binary, &source])
        .arg("-I")
        .arg(include_dir())
        .output()
        .unwrap_or_else(|error| panic!("{compiler} does not run ({error}): install gcc and g++"));
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let printed = Command::new(&binary).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&printed.stdout), expected);
}

#[test]
fn the_header_says_the_same_in_c() {
    compile_and_run("cc", "c", "-std=c99");
}

#[test]
fn the_header_says_the_same_in_cxx() {
    compile_and_run("c++", "cc", "-std=c++11");
}

fn structure<const LEN: usize>(flags: u32) -> [u8; LEN] {
    let mut request = Structure::<LEN>::new();
    request.u32(common::FLAGS, flags);
    request.0
}

#[test]
fn good_requests_are_read() {
    assert_eq!(Request::parse(CLONE, &structure::<{ clone::LEN }>(0)), Ok(Request::Clone));
    let commit = Request::parse(COMMIT, &structure::<{ commit::LEN }>(0));
    assert_eq!(commit, Ok(Request::Commit { wait_ms: None }));
    let mut waiting = structure::<{ commit::LEN }>(COMMIT_WAIT);
    waiting[commit::TIMEOUT_MS].copy_from_slice(&1500u64.to_ne_bytes());
    assert_eq!(Request::parse(COMMIT, &waiting), Ok(Request::Commit { wait_ms: Some(1500) }));
    let mut status = structure::<{ status::LEN }>(0);
    status[status::NUMBER].copy_from_slice(&7u64.to_ne_bytes());
    assert_eq!(Request::parse(STATUS, &status), Ok(Request::Status { number: 7 }));
}

#[test]
fn requests_of_another_version_size_or_flag_are_refused() {
    let good = structure::<{ commit::LEN }>(0);
    for (at, value) in [(0, 2u32), (4, 191), (8, 2), (8, 1 << 31)] {
        let mut bad = good;
        bad[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        assert_eq!(Request::parse(COMMIT, &bad), Err(Refusal::Malformed));
    }
    assert_eq!(Request::parse(COMMIT, &good[..100]), Err(Refusal::Malformed));
    assert_eq!(Request::parse(COMMIT, &[]), Err(Refusal::Malformed));
    assert_eq!(Request::parse(CLONE, &structure::<{ clone::LEN }>(1)), Err(Refusal::Malformed));
    // BLKSSZGET and XFS_IOC_DIOINFO, with which QEMU probes every raw file.
    for probe in [0x1268, 0x800c_581e, 0] {
        assert_eq!(Request::parse(probe, &good), Err(Refusal::Unknown));
    }
}

#[test]
fn a_text_that_is_too_long_is_cut_at_a_character() {
    let long = "ä".repeat(200);
    let reply = StatusReply {
        state: SnapshotState::Pending,
        number: 3,
        image_id: 0,
        last_stable: 0,
        pending: 1,
        disk_bytes: 0,
        dirty_bytes: 0,
        local_bytes: 0,
        image: "vm",
        reason: &long,
    };
    let bytes = reply.encode();
    let reason = &bytes[status::REASON];
    let end = reason.iter().position(|byte| *byte == 0).expect("a NUL ends the text");
    assert_eq!(std::str::from_utf8(&reason[..end]).unwrap(), "ä".repeat(119));
    assert_eq!(&bytes[status::IMAGE][..3], b"vm\0");
}
