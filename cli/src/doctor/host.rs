//! Kernel, clock, limits and tools of this machine.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit};

use super::Check;
use super::fuse::in_path;
use crate::session;

/// Older ones lack SEEK_HOLE and fallocate through FUSE, which hypervisors use.
const KERNEL_MIN: (u32, u32) = (4, 20);
/// What a newer kernel adds, and what happens without it.
const FEATURES: [((u32, u32), &str); 2] = [
    ((6, 2), "writes to one disk go one at a time (parallel direct writes came with 6.2)"),
    ((6, 6), "a guest's memory cannot be kept in a disk (direct I/O mmap came with 6.6)"),
];

/// The kernel's version and what its FUSE can do.
pub(super) fn kernel() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    judge_kernel(&release)
}

fn judge_kernel(release: &str) -> Check {
    const NAME: &str = "kernel";
    let Some(version) = parse_release(release) else {
        return Check::warn(
            NAME,
            format!("{release}: no version number"),
            "use Linux 6.6 or later",
        );
    };
    if version < KERNEL_MIN {
        let (major, minor) = KERNEL_MIN;
        return Check::fail(NAME, release, format!("use Linux {major}.{minor} or later"));
    }
    let missing: Vec<_> =
        FEATURES.iter().filter(|(since, _)| version < *since).map(|(_, loss)| *loss).collect();
    if missing.is_empty() {
        Check::ok(NAME, release)
    } else {
        Check::warn(NAME, format!("{release}: {}", missing.join("; ")), "use Linux 6.6 or later")
    }
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// 2026-01-01: this program is younger, so no clock that is right shows less.
const BUILT_AFTER_UNIX_S: u64 = 1_767_225_600;
/// Ten years later: a clock that shows more was never set.
const BELIEVED_UNTIL_UNIX_S: u64 = BUILT_AFTER_UNIX_S + 10 * 365 * 86_400;

/// Whether the clock can be right at all.
pub(super) fn clock() -> Check {
    const NAME: &str = "clock";
    let now = now_unix_ms() / 1000;
    let shown = crate::view::rfc3339(now * 1000).unwrap_or_else(|| format!("{now} s"));
    if (BUILT_AFTER_UNIX_S..BELIEVED_UNTIL_UNIX_S).contains(&now) {
        Check::ok(NAME, shown)
    } else {
        Check::fail(
            NAME,
            shown,
            "set the clock, and keep it right with chrony or systemd-timesyncd",
        )
    }
}

fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

/// Leases are measured on each side's own clock, so only people are misled by a skew: records
/// show times that did not happen.
const SKEW_MS_MAX: u64 = 2_000;

/// How far this clock is from the endpoint's.
pub(super) async fn endpoint_clock(endpoint: &str) -> Check {
    const NAME: &str = "endpoint";
    let asked = now_unix_ms();
    let addresses = match crate::endpoint::resolve_all(Some(endpoint)) {
        Ok(addresses) => addresses,
        Err(e) => return Check::warn(NAME, e.to_string(), "start it, or name another --endpoint"),
    };
    let (address, description) = match session::describe_first(&addresses).await {
        Ok(described) => described,
        Err(e) => return Check::warn(NAME, e.to_string(), "start it, or name another --endpoint"),
    };
    let answered = now_unix_ms();
    let middle = asked + (answered.saturating_sub(asked)) / 2;
    let skew = middle.abs_diff(description.now_unix_ms);
    let found = format!(
        "{} {} at {address}, clocks {skew} ms apart",
        description.role, description.version
    );
    if skew > SKEW_MS_MAX {
        Check::warn(NAME, found, "keep both clocks right with chrony or systemd-timesyncd")
    } else {
        Check::ok(NAME, found)
    }
}

/// A mirror of a thousand disks keeps some files of each open, and a socket per peer.
const OPEN_FILES_GOOD: u64 = 65_536;
/// One disk and its peers.
const OPEN_FILES_MIN: u64 = 256;

/// The limit to which a role can raise its own.
pub(super) fn open_files() -> Check {
    const NAME: &str = "open files";
    let Some(limit) = getrlimit(Resource::Nofile).maximum else {
        return Check::ok(NAME, "no limit");
    };
    let mend = format!("raise it: `ulimit -Hn {OPEN_FILES_GOOD}`, or LimitNOFILE= of the unit");
    if limit < OPEN_FILES_MIN {
        Check::fail(NAME, limit.to_string(), mend)
    } else if limit < OPEN_FILES_GOOD {
        Check::warn(NAME, format!("{limit}: enough for a few hundred disks"), mend)
    } else {
        Check::ok(NAME, limit.to_string())
    }
}

/// Only qcow2 files need it.
pub(super) fn qemu_img() -> Check {
    const NAME: &str = "qemu-img";
    let missing = |found: String| {
        Check::warn(
            NAME,
            format!("{found}: qcow2 files cannot be imported or exported"),
            "install qemu-utils (`apt-get install qemu-utils`)",
        )
    };
    let Some(program) = in_path("qemu-img") else { return missing("is not there".into()) };
    match Command::new(&program).arg("--version").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            Check::ok(NAME, text.lines().next().unwrap_or_default())
        }
        Ok(output) => missing(format!("{} ended with {}", program.display(), output.status)),
        Err(e) => missing(format!("{} does not run: {e}", program.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn kernels_are_judged_by_their_features() {
        for (release, state) in [
            ("6.18.44-fc", State::Ok),
            ("6.6.0", State::Ok),
            ("6.5.9", State::Warn),
            ("6.1.0-28-amd64", State::Warn),
            ("4.19.0", State::Fail),
            ("rubbish", State::Warn),
        ] {
            assert_eq!(judge_kernel(release).state, state, "{release}");
        }
        assert!(judge_kernel("6.1.0").detail.contains("one at a time"));
    }
}
