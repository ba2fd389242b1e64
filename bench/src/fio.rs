//! fio, the benchmark program that storage people trust (Debian: fio).

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

/// What fio is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// As fio calls it: `randread`, `write`, `randrw`.
    pub pattern: &'static str,
    /// Of one request.
    pub block_bytes: u64,
    /// Requests under way.
    pub depth: u32,
    /// An fdatasync after every write.
    pub sync_each: bool,
}

/// How long and where.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The first so many bytes of the file.
    pub bytes: u64,
    /// How long.
    pub time: Duration,
    /// Let nothing count that is not on the disk at the end.
    pub sync_at_end: bool,
}

/// What it measured, reads and writes together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Latency that 999 of 1000 requests did not exceed; the worse of reads and writes.
    pub p999: Duration,
    /// The slowest request.
    pub slowest: Duration,
    /// From the first request to the end of the last, the sync at the end included.
    pub took: Duration,
}

impl Load {
    /// Requests of this many bytes at this depth.
    #[must_use]
    pub const fn new(pattern: &'static str, block_bytes: u64, depth: u32) -> Self {
        Self { pattern, block_bytes, depth, sync_each: false }
    }

    /// The command; what it prints is for [`measured`].
    #[must_use]
    pub fn command(&self, path: &Path, span: Span) -> Command {
        let mut command = Command::new("fio");
        command
            .args(["--name=load", "--ioengine=io_uring", "--direct=1", "--time_based=1"])
            .args([
                "--output-format=json",
                "--norandommap=1",
                "--randrepeat=0",
                "--group_reporting",
            ])
            .arg(format!("--rw={}", self.pattern))
            .arg(format!("--bs={}", self.block_bytes))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--size={}", span.bytes))
            .arg(format!("--runtime={}ms", span.time.as_millis()))
            .arg(format!("--fdatasync={}", u8::from(self.sync_each)))
            .arg(format!("--end_fsync={}", u8::from(span.sync_at_end)))
            .arg(format!("--filename={}", path.display()));
        command
    }

    /// Runs it.
    ///
    /// # Errors
    /// When fio is not there or reports an error.
    pub fn run(&self, path: &Path, span: Span) -> anyhow::Result<Measured> {
        let output = self.command(path, span).output().context("run fio (Debian: fio)")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "fio {self:?} on {}: {said}", path.display());
        measured(&output.stdout)
    }
}

/// Reads what fio printed.
///
/// # Errors
/// When it is no JSON of fio's.
pub fn measured(json: &[u8]) -> anyhow::Result<Measured> {
    // fio may print a note before.
    let start = json.iter().position(|byte| *byte == b'{').context("fio printed no JSON")?;
    let value: Value = serde_json::from_slice(&json[start..]).context("fio's JSON")?;
    let job = &value["jobs"][0];
    let sides = ["read", "write"].map(|side| &job[side]);
    let of = |side: &Value, name: &str| side[name].as_f64().unwrap_or(0.0);
    let requests: f64 = sides.iter().map(|side| of(side, "total_ios")).sum();
    let bytes: f64 = sides.iter().map(|side| of(side, "io_bytes")).sum();
    let took = of(job, "job_runtime").max(1.0) / 1e3;
    let latency = |pick: fn(&Value) -> f64| {
        let most = sides.iter().map(|side| pick(&side["clat_ns"])).fold(0.0, f64::max);
        Duration::from_nanos(most as u64)
    };
    ensure!(requests > 0.0, "fio made no request");
    Ok(Measured {
        iops: requests / took,
        bytes_per_second: bytes / took,
        p999: latency(|clat| clat["percentile"]["99.900000"].as_f64().unwrap_or(0.0)),
        slowest: latency(|clat| clat["max"].as_f64().unwrap_or(0.0)),
        took: Duration::from_secs_f64(took),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_count() {
        let json = br#"fio: a note
            {"jobs":[{"job_runtime":2000,
              "read":{"total_ios":100,"io_bytes":4000,
                      "clat_ns":{"max":900,"percentile":{"99.900000":800}}},
              "write":{"total_ios":300,"io_bytes":8000,
                       "clat_ns":{"max":2000,"percentile":{"99.900000":700}}}}]}"#;
        let measured = measured(json).unwrap();
        assert_eq!((measured.iops, measured.bytes_per_second), (200.0, 6000.0));
        assert_eq!((measured.p999.as_nanos(), measured.slowest.as_nanos()), (800, 2000));
        assert!(super::measured(b"fio: out of luck").is_err());
    }
}
