//! An image that is held open, and bare calls of librbd on it: what a command takes less the start of a
//! process and its connections.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::Ceph;

/// Through the binding of librbd that Debian installs with `rbd`, for Debian's own python3.
const PROGRAM: &str = include_str!("client.py");

/// An image that a process has open, as a virtual machine that runs on it would. Closed on drop; not to
/// outlive its cluster.
#[derive(Debug)]
pub struct OpenImage {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    said: PathBuf,
}

impl OpenImage {
    /// Opens an image that is there.
    ///
    /// # Errors
    /// When it does not open.
    pub fn open(ceph: &Ceph, image: &str) -> anyhow::Result<Self> {
        let said = ceph.dir.path().join(format!("client-{image}.said"));
        let mut child = ceph
            .command("/usr/bin/python3")
            .args(["-c", PROGRAM])
            .arg(ceph.conf())
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&said)?)
            .spawn()
            .context("start python3 (Debian: python3, python3-rbd)")?;
        let (Some(asks), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("no pipes to python3");
        };
        let mut open = Self { child, asks, answers: BufReader::new(answers), said };
        open.answer()?;
        Ok(open)
    }

    fn answer(&mut self) -> anyhow::Result<(Duration, u64)> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let said = || fs::read_to_string(&self.said).unwrap_or_default();
        ensure!(!line.is_empty(), "a call of librbd failed: {}", said());
        answer(&line)
    }

    fn ask(&mut self, line: &str) -> anyhow::Result<(Duration, u64)> {
        writeln!(self.asks, "{line}")?;
        self.answer().with_context(|| line.to_owned())
    }

    /// Writes `length` new bytes at each of `count` places, the starts of which are `stride` apart, and
    /// flushes.
    ///
    /// # Errors
    /// When librbd refuses.
    pub fn write(&mut self, length: u64, stride: u64, count: u64) -> anyhow::Result<()> {
        self.ask(&format!("write {length} {stride} {count}")).map(drop)
    }

    /// Takes a snapshot; returns how long the call took.
    ///
    /// # Errors
    /// When librbd refuses.
    pub fn snapshot(&mut self, name: &str) -> anyhow::Result<Duration> {
        Ok(self.ask(&format!("snapshot {name}"))?.0)
    }

    /// Lists the extents that differ; returns how long the call took, and how many there are.
    ///
    /// # Errors
    /// When librbd refuses.
    pub fn diff(&mut self, old: &str, new: &str) -> anyhow::Result<(Duration, u64)> {
        self.ask(&format!("diff {old} {new}"))
    }
}

/// Seconds and a count.
fn answer(line: &str) -> anyhow::Result<(Duration, u64)> {
    let (seconds, count) = line.trim().split_once(' ').with_context(|| format!("{line:?}"))?;
    Ok((Duration::try_from_secs_f64(seconds.parse()?)?, count.parse()?))
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_time_and_a_count() {
        assert_eq!(answer("0.25 26\n").unwrap(), (Duration::from_millis(250), 26));
        for wrong in ["", "0.25", "-1 2", "0.25 many"] {
            assert!(answer(wrong).is_err(), "{wrong:?}");
        }
    }
}
