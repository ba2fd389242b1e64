//! What each verb costs in calls and in syncs: as docs/costs.md says, counted on real processes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::guest_image::repository_root;
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Plan, Roles, Which};
use rustix::process::{Pid, Signal, kill_process};

const MIB: usize = 1 << 20;
const WHO: [Which; 3] = [Which::Mirror(0), Which::Metadata(0), Which::Node(0)];
/// A verb is done so often.
const ROUNDS: u32 = 5;
/// What a verb leaves to be done behind its back is done by then.
const SETTLE: Duration = Duration::from_millis(250);
/// What one process tells another whether anything is done or not.
const BACKGROUND: [&str; 3] = ["/Heartbeat", "/RenewLease", "/GetTable"];

/// Calls that came and syncs that were made, of the mirror, the metadata server and the node.
#[derive(Debug, PartialEq, Eq)]
struct Costs {
    calls: [usize; 3],
    syncs: [usize; 3],
}

/// Counts a process's syncs. Ended on drop.
struct Strace {
    child: Child,
    log: PathBuf,
}

impl Strace {
    fn attach(pid: u32, log: PathBuf) -> Result<Self> {
        let said = log.with_extension("said");
        let child = Command::new("strace")
            .args(["-f", "-e", "trace=fsync,fdatasync", "-e", "signal=none", "-o"])
            .arg(&log)
            .args(["-p", &pid.to_string()])
            .stderr(File::create(&said)?)
            .spawn()
            .context("start strace (tests/setup.sh installs it)")?;
        let strace = Self { child, log };
        wait_until("strace watches", || Ok(fs::read_to_string(&said)?.contains("attached")))?;
        Ok(strace)
    }

    fn syncs(&self) -> Result<usize> {
        let text = fs::read_to_string(&self.log)?;
        // A call that another thread's interrupts has two lines.
        Ok(text.lines().filter(|line| line.contains("sync(")).count())
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::INT);
        let _ = self.child.wait();
    }
}

struct Counted {
    roles: Roles,
    straces: Vec<Strace>,
}

impl Counted {
    fn start() -> Result<Self> {
        let log = Some("info,blobcr::rpc=debug".to_owned());
        let roles = Roles::start(&Plan { log, ..Plan::default() }, |_| Ok(()))?;
        let attach = |which| {
            let log = roles.dir().join(format!("{which:?}.strace"));
            Strace::attach(roles.pid(which)?, log)
        };
        let straces = WHO.into_iter().map(attach).collect::<Result<_>>()?;
        Ok(Self { roles, straces })
    }

    fn now(&self) -> Result<Costs> {
        let mut costs = Costs { calls: [0; 3], syncs: [0; 3] };
        for (at, which) in WHO.into_iter().enumerate() {
            let log = self.roles.log_of(which)?;
            let counts = |line: &&str| {
                line.contains("blobcr::rpc") && !BACKGROUND.iter().any(|call| line.contains(call))
            };
            costs.calls[at] = log.lines().filter(counts).count();
            costs.syncs[at] = self.straces[at].syncs()?;
        }
        Ok(costs)
    }

    /// What most of several rounds cost: something may go on in the background of one of them.
    /// `prepare` is not counted.
    fn cost(
        &self,
        mut prepare: impl FnMut(u32) -> Result<()>,
        mut verb: impl FnMut(u32) -> Result<()>,
    ) -> Result<Costs> {
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            prepare(round)?;
            std::thread::sleep(SETTLE);
            let before = self.now()?;
            verb(round)?;
            std::thread::sleep(SETTLE);
            rounds.push((before, self.now()?));
        }
        let median = |kind: fn(&Costs) -> &[usize; 3]| {
            std::array::from_fn(|at| {
                let mut costs: Vec<usize> =
                    rounds.iter().map(|(a, b)| kind(b)[at] - kind(a)[at]).collect();
                costs.sort_unstable();
                costs[costs.len() / 2]
            })
        };
        Ok(Costs { calls: median(|c| &c.calls), syncs: median(|c| &c.syncs) })
    }
}

/// The rows of the page's table: verb, calls and syncs.
fn written_down() -> Result<BTreeMap<String, Costs>> {
    let page = fs::read_to_string(repository_root().join("docs/costs.md"))?;
    let mut costs = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [verb, numbers @ ..] = &cells[..] else { continue };
        let numbers = numbers.iter().map(|cell| cell.parse()).collect::<Result<Vec<usize>, _>>();
        let numbers = numbers.with_context(|| format!("docs/costs.md: {line}"))?;
        let [a, b, c, d, e, f] = numbers[..] else { anyhow::bail!("six numbers in {line}") };
        costs.insert(
            verb.trim_matches('`').to_owned(),
            Costs { calls: [a, b, c], syncs: [d, e, f] },
        );
    }
    Ok(costs)
}

/// Every verb, counted.
fn counted() -> Result<BTreeMap<String, Costs>> {
    let counted = Counted::start()?;
    let roles = &counted.roles;
    let verb = |args: &[&str]| roles.json_from(Which::Mirror(0), args).map(drop);
    let raw = sparse(&roles.dir().join("base.raw"), 8 * MIB as u64, &[(0, &noise(1, 8 * MIB))])?;
    verb(&["image", "import", raw.to_str().context("ASCII")?, "base"])?;
    let path = roles.attach(0, "base", "d")?;
    let disk = MountedDisk::open(&path, false)?;
    let nothing = |_: u32| Ok(());
    let mut costs = BTreeMap::new();
    let mut add = |name: &str, cost: Result<Costs>| -> Result<()> {
        costs.insert(name.to_owned(), cost.with_context(|| name.to_owned())?);
        Ok(())
    };
    let write =
        |round: u32| disk.file().write_all_at(&noise(u64::from(round) + 10, 4096), 4 * MIB as u64);

    disk.commit_stable()?;
    add(
        "COMMIT of one chunk, until stable",
        counted.cost(|round| Ok(write(round)?), |_| disk.commit_stable().map(drop)),
    )?;
    add(
        "COMMIT of no change, until stable",
        counted.cost(nothing, |_| disk.commit_stable().map(drop)),
    )?;
    add("write of 4 KiB", counted.cost(nothing, |round| Ok(write(round)?)))?;
    add(
        "flush after an overwrite",
        counted.cost(|round| Ok(write(round)?), |_| Ok(disk.file().sync_all()?)),
    )?;
    add("flush of nothing", counted.cost(nothing, |_| Ok(disk.file().sync_all()?)))?;
    // Nobody has the disk open when it is put back.
    drop(disk);
    add("disk rollback", counted.cost(nothing, |_| verb(&["disk", "rollback", "d"])))?;
    let disk = MountedDisk::open(&path, false)?;
    add(
        "read of 4 KiB, absent",
        counted.cost(nothing, |round| {
            let at = u64::from(round) * (MIB / 4) as u64;
            Ok(disk.file().read_exact_at(&mut [0; 4096], at)?)
        }),
    )?;
    add(
        "read of 4 KiB, here",
        counted.cost(nothing, |_| Ok(disk.file().read_exact_at(&mut [0; 4096], 0)?)),
    )?;
    add(
        "image clone",
        counted.cost(nothing, |round| verb(&["image", "clone", "base", &format!("clone{round}")])),
    )?;
    add(
        "disk attach",
        counted.cost(nothing, |round| verb(&["disk", "attach", "base", &format!("a{round}")])),
    )?;
    add(
        "disk detach",
        counted.cost(nothing, |round| verb(&["disk", "detach", &format!("a{round}")])),
    )?;
    drop(disk);
    Ok(costs)
}

#[test]
fn each_verb_costs_what_is_written_down() -> Result<()> {
    let (written, counted) = (written_down()?, counted()?);
    for (verb, costs) in &counted {
        let Costs { calls: [a, b, c], syncs: [d, e, f] } = costs;
        // As the page has it, to be copied when a change is meant.
        println!("| `{verb}` | {a} | {b} | {c} | {d} | {e} | {f} |");
    }
    for (verb, costs) in &counted {
        let written = written.get(verb).with_context(|| format!("docs/costs.md lacks {verb}"))?;
        ensure!(written == costs, "{verb}: written {written:?}, counted {costs:?}");
    }
    ensure!(written.len() == counted.len(), "docs/costs.md has verbs that nobody counts");
    Ok(())
}

/// Bytes that went through a process's system calls: read and written.
fn moved(roles: &Roles, which: Which) -> Result<[u64; 2]> {
    let io = fs::read_to_string(format!("/proc/{}/io", roles.pid(which)?))?;
    let of = |name: &str| -> Result<u64> {
        let line = io.lines().find_map(|line| line.strip_prefix(name)).context("/proc/PID/io")?;
        Ok(line.trim().parse()?)
    };
    Ok([of("rchar:")?, of("wchar:")?])
}

#[test]
fn a_changed_byte_is_read_and_sent_and_stored_once() -> Result<()> {
    const BYTES: usize = 64 * MIB;
    let roles = Roles::start(&Plan::default(), |_| Ok(()))?;
    let raw = roles.dir().join("empty.raw");
    File::create(&raw)?.set_len(BYTES as u64)?;
    roles.json(&["image", "import", raw.to_str().context("ASCII")?, "empty"])?;
    let disk = MountedDisk::open(&roles.attach(0, "empty", "d")?, false)?;
    disk.commit_stable()?;
    disk.file().write_all_at(&noise(2, BYTES), 0)?;
    let before = WHO.map(|which| moved(&roles, which));
    disk.commit_stable()?;
    for (which, before) in WHO.into_iter().zip(before) {
        let (before, after) = (before?, moved(&roles, which)?);
        let copies = [0, 1].map(|at| (after[at] - before[at]) as f64 / BYTES as f64);
        println!("{which:?}: {copies:.3?} bytes read and written per byte changed");
        let most = if matches!(which, Which::Metadata(_)) { 0.01 } else { 1.02 };
        ensure!(copies.iter().all(|copies| *copies < most), "{which:?}: {copies:?}");
    }
    Ok(())
}
