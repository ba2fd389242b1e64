//! Nodes that die under load, and one that loses its disk: `./do node-soak`, and a short form in the
//! tests.
//!
//! A mounted disk is written and verified by fio and committed all the time, while nodes are killed at
//! random and come back; then one comes back without its directory. No call on the disk may fail, every
//! snapshot must be intact, and what is owed must be paid.

use std::collections::BTreeSet;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::daemon::wait_until;
use crate::disk_file::{noise, same, sparse};
use crate::integrity::tools::{Engine, fio};
use crate::integrity::with_commits;
use crate::mounted::Committed;
use crate::roles::{Outage, Plan, Roles, Which};

/// Small, so that less is written to the disk of the machine for the same number of chunks.
const CHUNK: &str = "64K";
/// What fio writes each second: hours of it must fit on a disk.
const RATE: u64 = 4 << 20;
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// From one death to the next.
const KILL_EVERY: Duration = Duration::from_secs(10);
/// For how long a node is away.
const AWAY: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(7);
/// Soon, so that a wiped node is given up while one watches.
const DOWN_AFTER: u64 = 20;
/// The load goes on for so long after the last death: a node is wiped, given up, and replaced.
const WIPE_TIME: Duration = Duration::from_secs(DOWN_AFTER + 10);
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What a soak does.
#[derive(Clone, Debug)]
pub struct Options {
    /// The policy of the pool.
    pub pool: String,
    /// How many nodes there are, and how many of them are killed at once.
    pub nodes: (usize, usize),
    /// For how long nodes are killed.
    pub time: Duration,
    /// How long repair may take after that.
    pub repair: Duration,
    /// Decides what is killed when, and what is written.
    pub seed: u64,
    /// Bytes of the disk.
    pub size: u64,
}

/// Bytes of the disk, unless one says otherwise.
const SIZE: u64 = 64 << 20;

impl Options {
    /// The soak of a pool: as many nodes as the policy wants and one or two more, of which as many
    /// die at once as it stands while writes go on, or reads at least.
    ///
    /// # Errors
    /// When there is no soak of this policy.
    pub fn new(pool: &str, time: Duration, repair: Duration, seed: u64) -> Result<Self> {
        let nodes = match pool {
            "replica:3" => (5, 1),
            "ec:4+2" => (7, 2),
            _ => bail!("there is a soak of replica:3 and of ec:4+2, and none of {pool}"),
        };
        Ok(Self { pool: pool.to_owned(), nodes, time, repair, seed, size: SIZE })
    }
}

/// What happened.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Nodes that were killed.
    pub kills: usize,
    /// Snapshots that were accepted. All of them were verified.
    pub snapshots: usize,
    /// The most chunks that were seen to lack a copy at a time.
    pub degraded_max: u64,
    /// How long it took from the wiped node's return until nothing was owed and its old self was let go.
    pub repaired_after: Duration,
}

/// Does all of it. `say` is told what goes on.
///
/// # Errors
/// What must not be.
pub fn soak(options: &Options, say: &dyn Fn(String)) -> Result<Report> {
    let plan = Plan {
        nodes: options.nodes.0,
        steward: true,
        pool: options.pool.clone(),
        node_down_after: DOWN_AFTER,
        ..Plan::default()
    };
    let mut roles = Roles::start(&plan, |_| Ok(()))?;
    let data = noise(options.seed, options.size as usize / 2);
    let raw = sparse(&roles.dir().join("base.raw"), options.size, &[(0, &data)])?;
    let raw = raw.to_str().context("ASCII")?;
    roles.json(&["image", "import", raw, "base", "--chunk-size", CHUNK])?;
    let path = roles.attach(0, "base", "d")?;

    let mut report = Report::default();
    let (mut wiped, time) = (None, options.time + WIPE_TIME);
    let made = with_commits(&path, COMMIT_EVERY, || {
        std::thread::scope(|scope| {
            let fio = || fio(&path, options.size, Engine::Libaio, time, options.seed, Some(RATE));
            let fio = scope.spawn(fio);
            let deaths = kill(&mut roles, options, &mut report, || fio.is_finished(), say)
                .and_then(|()| wipe(&mut roles, options, say));
            fio.join().expect("fio's thread does not panic")?;
            wiped = Some(deaths?);
            Ok(())
        })
    })
    .with_context(|| roles.log())?;
    say(format!("{} snapshots were accepted, fio found every byte", made.len()));

    let (old, since) = wiped.context("a node was wiped")?;
    let paid = repaired(&roles, &old, options.repair, &mut report).map(|()| since.elapsed());
    if let Ok(after) = paid {
        say(format!("nothing is owed any more, {} s after it came back", after.as_secs()));
    }
    report.snapshots = made.len();
    // Also when repair took too long: nothing may be lost meanwhile.
    verify(&roles, &path, &made, say)?;
    report.repaired_after = paid?;
    roles.stop()?;
    Ok(report)
}

/// Kills nodes and brings them back, for the time of the soak.
fn kill(
    roles: &mut Roles,
    options: &Options,
    report: &mut Report,
    ended: impl Fn() -> bool,
    say: &dyn Fn(String),
) -> Result<()> {
    let mut random = StdRng::seed_from_u64(options.seed);
    let (nodes, at_once) = options.nodes;
    let start = Instant::now();
    let mut round = 0;
    while start.elapsed() < options.time {
        round += 1;
        let mut some = BTreeSet::new();
        while some.len() < at_once {
            some.insert(random.random_range(0..nodes));
        }
        for node in &some {
            roles.take_away(Which::Node(*node), Outage::Killed)?;
            report.kills += 1;
        }
        sleep(random.random_range(AWAY));
        degraded(roles, report)?;
        for node in &some {
            roles.bring_back(Which::Node(*node))?;
        }
        ensure!(!ended(), "fio ended before its time");
        say(format!("{} s: killed {some:?}, back again", start.elapsed().as_secs()));
        sleep((KILL_EVERY * round).saturating_sub(start.elapsed()));
    }
    Ok(())
}

/// Takes everything from a node, and starts it again when its old self is given up. Returns the old id,
/// and when the new one was there.
fn wipe(roles: &mut Roles, options: &Options, say: &dyn Fn(String)) -> Result<(String, Instant)> {
    let node = StdRng::seed_from_u64(!options.seed).random_range(0..options.nodes.0);
    let old = roles.node_id(node)?;
    roles.take_away(Which::Node(node), Outage::Killed)?;
    roles.wipe(node)?;
    wait_until("the node is down", || {
        let listed = roles.json_from(Which::Metadata(0), &["node", "list"])?;
        let is_old = |one: &&Value| one["node"] == *old;
        let found = listed.as_array().context("no list")?.iter().find(is_old).cloned();
        Ok(found.context("it is not listed")?["state"] == "down")
    })?;
    roles.bring_back(Which::Node(node))?;
    let new = roles.node_id(node)?;
    ensure!(new != old, "a wiped node has its old identity");
    say(format!("node {node} lost its directory: {old} came back as {new}"));
    Ok((old, Instant::now()))
}

/// How many chunks lack a copy, null while it cannot be told, and the repair of them.
fn degraded(roles: &Roles, report: &mut Report) -> Result<(Value, Value)> {
    let ran = roles.run(Which::Metadata(0), &["--json", "status"])?;
    if ran.code == 5 {
        // A node died while it was asked.
        return Ok((Value::Null, Value::Null));
    }
    ensure!(ran.code == 0, "status: {ran:?}");
    let mut status: Value = serde_json::from_str(&ran.stdout)?;
    let now = status["degraded_chunks"].take();
    report.degraded_max = report.degraded_max.max(now.as_u64().unwrap_or_default());
    Ok((now, status["repair"].take()))
}

/// Waits until nothing is owed and the node that was lost may be removed.
fn repaired(roles: &Roles, old: &str, limit: Duration, report: &mut Report) -> Result<()> {
    let (start, mut removed) = (Instant::now(), false);
    loop {
        let (owed, repair) = degraded(roles, report)?;
        let mut said = String::new();
        if !removed {
            let ran = roles.run(Which::Metadata(0), &["node", "remove", old])?;
            removed = ran.code == 0;
            said = ran.stderr;
        }
        if removed && owed == 0 {
            return Ok(());
        }
        let late = start.elapsed() > limit;
        ensure!(!late, "{owed} chunks lack a copy after {limit:?}; node remove: {said}; {repair}");
        sleep(ASK_EVERY);
    }
}

/// Asserts that every snapshot that was accepted is stable, that every stable one is intact, and that the
/// last is what the disk holds.
fn verify(roles: &Roles, path: &Path, made: &[Committed], say: &dyn Fn(String)) -> Result<()> {
    let last = made.last().context("there was no COMMIT")?;
    let asked = |args: &[&str]| roles.json_from(Which::Metadata(0), args);
    let listed = asked(&["snapshot", "list", &last.image])?;
    let listed = listed.as_array().context("no list")?;
    let stable = listed.iter().filter(|one| one["state"] == "stable");
    let stable: BTreeSet<u64> = stable.filter_map(|one| one["snapshot"].as_u64()).collect();
    let lost: Vec<_> = made.iter().filter(|one| !stable.contains(&one.number)).collect();
    ensure!(lost.is_empty(), "accepted, and not stable: {lost:?}");
    for number in &stable {
        let name = format!("{}@{number}", last.image);
        let verified = asked(&["snapshot", "verify", &name])?;
        ensure!(verified["intact"] == true, "{name}: {verified}");
    }
    let out = roles.dir().join("last.raw");
    asked(&["image", "export", &last.name(), out.to_str().context("ASCII")?])?;
    same(path, &out).with_context(|| format!("the disk and {}", last.name()))?;
    say(format!("{} stable snapshots are intact, the last is the disk", stable.len()));
    Ok(())
}
