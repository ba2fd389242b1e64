//! Every request of a run of fio: when it ended and how long it took.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};

use crate::fio::{Load, Span};

/// The requests of a run.
#[derive(Debug)]
pub struct Requests {
    /// Millisecond of its end since 1970, and nanoseconds.
    log: Vec<(u64, u64)>,
}

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretch {
    /// Requests a second.
    pub iops: f64,
    /// Half of the requests took no longer.
    pub p50: Duration,
    /// 999 of 1000 took no longer.
    pub p999: Duration,
    /// The slowest.
    pub slowest: Duration,
}

impl Requests {
    /// Runs a load for `lead` and `span.time`, and calls `event` after `lead`. Returns the requests and the
    /// moment of the call.
    ///
    /// # Errors
    /// When fio is not there or fails, or the event does.
    pub fn around(
        load: Load,
        path: &Path,
        lead: Duration,
        span: Span,
        event: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<(Self, SystemTime)> {
        let dir = tempfile::tempdir()?;
        // The disk is warmed up a little before, and fio takes its time to start.
        let whole = Span { time: lead + span.time + STARTS, ..span };
        let mut command = load.command(path, whole);
        command
            .args(["--log_unix_epoch=1", "--disable_slat=1", "--disable_clat=1"])
            .arg(format!("--write_lat_log={}", dir.path().join("log").display()))
            .stdout(Stdio::null());
        let mut fio = command.spawn().context("run fio (Debian: fio)")?;
        std::thread::sleep(STARTS + lead);
        let at = SystemTime::now();
        let happened = event();
        let ended = fio.wait()?;
        happened?;
        ensure!(ended.success(), "fio {load:?} on {} ended with {ended}", path.display());
        let log = std::fs::read_to_string(dir.path().join("log_lat.1.log"))
            .context("fio's log of latencies")?;
        Ok((Self { log: parsed(&log)? }, at))
    }

    /// Those that ended within so long before (`false`) or after (`true`) a moment.
    ///
    /// # Errors
    /// When there is none.
    pub fn beside(&self, at: SystemTime, len: Duration, after: bool) -> anyhow::Result<Stretch> {
        let at = at.duration_since(UNIX_EPOCH)?.as_millis() as u64;
        let len_ms = len.as_millis() as u64;
        let range = if after { at..at + len_ms } else { at - len_ms..at };
        let within = self.log.iter().filter(|(ms, _)| range.contains(ms));
        let mut took: Vec<u64> = within.map(|(_, ns)| *ns).collect();
        took.sort_unstable();
        ensure!(!took.is_empty(), "fio made no request within {range:?}");
        let at = |part: usize| Duration::from_nanos(took[(took.len() - 1) * part / 1000]);
        Ok(Stretch {
            iops: took.len() as f64 / len.as_secs_f64(),
            p50: at(500),
            p999: at(999),
            slowest: at(1000),
        })
    }
}

/// What fio may take until it makes requests.
const STARTS: Duration = Duration::from_millis(500);

/// Lines are: millisecond, nanoseconds, direction, size, …
fn parsed(log: &str) -> anyhow::Result<Vec<(u64, u64)>> {
    let line = |line: &str| {
        let mut fields = line.split(',').map(|field| field.trim().parse().ok());
        Some((fields.next()??, fields.next()??))
    };
    let parse = |text| line(text).with_context(|| format!("fio's log has the line {text}"));
    log.lines().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_cut_at_a_moment() {
        let log = parsed("1000, 50, 1, 4096, 0, 0\n1500, 10, 1, 4096, 0, 0\n1600, 70, 1, 4096\n");
        let requests = Requests { log: log.unwrap() };
        let at = UNIX_EPOCH + Duration::from_millis(1500);
        let second = Duration::from_secs(1);
        let before = requests.beside(at, second, false).unwrap();
        assert_eq!((before.iops, before.slowest.as_nanos()), (1.0, 50));
        let after = requests.beside(at, second, true).unwrap();
        assert_eq!((after.iops, after.p50.as_nanos(), after.slowest.as_nanos()), (2.0, 10, 70));
        assert!(parsed("nothing").is_err());
    }
}
