//! Runs `qemu-img`, which knows qcow2 better than we could.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::exit::{Exit, Refusal};

/// A path that `qemu-img` cannot take for an option or for one of its protocols (`nbd:`, `json:`).
pub(super) fn plain_path(path: &Path) -> io::Result<PathBuf> {
    std::path::absolute(path)
}

/// A path under which another process of this user can open an unnamed file of ours.
pub(super) fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

fn command(args: Vec<OsString>) -> Command {
    let mut command = Command::new("qemu-img");
    command
        .args(args)
        // Its words are shown to the operator, and matched by nobody; but numbers must parse.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

fn not_started(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::NotFound {
        let message = "qemu-img is not installed, and qcow2 files need it: install qemu-utils \
                       (`apt-get install qemu-utils`; on Fedora and RHEL qemu-img)";
        return Refusal::new(Exit::Other, message).into();
    }
    anyhow::Error::new(error).context("qemu-img does not start")
}

/// Runs it to its end; killed when the future is dropped.
pub(super) async fn run(args: Vec<OsString>) -> anyhow::Result<Output> {
    command(args).output().await.map_err(not_started)
}

/// Runs it and gives each line of its stdout to `each`. Returns what it said on stderr when it
/// failed.
pub(super) async fn lines(
    args: Vec<OsString>,
    mut each: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut child = command(args).spawn().map_err(not_started)?;
    let stdout = child.stdout.take().context("qemu-img has no stdout")?;
    let mut stdout = BufReader::new(stdout).lines();
    while let Some(line) = stdout.next_line().await? {
        each(&line)?;
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(());
    }
    Err(Refusal::new(Exit::Integrity, complaint(&output)).into())
}

/// The last thing that it said, without its name and our paths of no meaning to anybody.
pub(super) fn complaint(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr.lines().rev().find(|line| !line.trim().is_empty());
    line.map_or_else(
        || format!("qemu-img ended with {}", output.status),
        |line| line.trim().trim_start_matches("qemu-img: ").to_owned(),
    )
}

/// Arguments as `qemu-img` wants them.
pub(super) fn args<const N: usize>(words: [&str; N], paths: &[&Path]) -> Vec<OsString> {
    words.iter().map(OsString::from).chain(paths.iter().map(|path| path.into())).collect()
}
