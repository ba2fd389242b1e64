//! `blobcr doctor`: what this machine needs, and how to mend what it lacks.

mod fuse;
mod host;
mod storage;

pub(crate) use fuse::others_may_enter;
pub(crate) use storage::free_bytes;

use std::path::Path;

use serde::Serialize;

use crate::args::DoctorArgs;
use crate::exit::{Exit, Refusal};
use crate::output::{Column, Output, table};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// It works, but something is slower or missing.
    Warn,
    /// A role cannot run.
    Fail,
}

/// One check.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    state: State,
    detail: String,
    /// How to mend it; null when there is nothing to mend.
    mend: Option<String>,
}

impl Check {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, state: State::Ok, detail: detail.into(), mend: None }
    }

    fn warn(check: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, state: State::Warn, detail: detail.into(), mend: Some(mend.into()) }
    }

    fn fail(check: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, state: State::Fail, detail: detail.into(), mend: Some(mend.into()) }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Check>,
}

/// Runs every check and prints what it found.
///
/// # Errors
/// When a check that a role needs fails.
pub async fn run(args: &DoctorArgs, endpoint: Option<&str>, output: Output) -> anyhow::Result<()> {
    let checks = all(&args.dir, endpoint).await;
    let failed: Vec<_> =
        checks.iter().filter(|c| c.state == State::Fail).map(|c| c.check).collect();
    let report = Report { ok: failed.is_empty(), checks };
    output.data(&report, human)?;
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!("this machine cannot run every role yet: {}", failed.join(", "));
    Err(Refusal::new(Exit::Other, message).into())
}

async fn all(dir: &Path, endpoint: Option<&str>) -> Vec<Check> {
    let mut checks = vec![
        fuse::device(Path::new("/dev/fuse")),
        fuse::permission_to_mount(),
        fuse::other_users(Path::new("/etc/fuse.conf")),
        host::kernel(),
        storage::free_space(dir),
        storage::sparse_files(dir),
        host::clock(),
        host::open_files(),
        host::qemu_img(),
    ];
    if let Some(endpoint) = endpoint {
        checks.push(host::endpoint_clock(endpoint).await);
    }
    checks
}

fn human(report: &Report) -> String {
    let rows = report.checks.iter().map(|check| {
        let state = match check.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        vec![state.to_owned(), check.check.to_owned(), check.detail.clone()]
    });
    let mut text = table(&[Column::Text(""), Column::Text("CHECK"), Column::Text("FOUND")], rows);
    let mends: Vec<_> = report
        .checks
        .iter()
        .filter_map(|check| Some(format!("{}: {}\n", check.check, check.mend.as_ref()?)))
        .collect();
    if !mends.is_empty() {
        text.push_str("\nTo mend:\n");
        text.extend(mends);
    }
    text
}
