//! Many hosts at once: every mirror's disk commits at the same moment. What that costs each role is
//! measured here with as many real processes as fit on this machine; what it means for more hosts than
//! that follows from a model of the busiest part, which is checked against what was measured.

use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Plan, Roles, Which};
use rand::RngCore;

use super::Settings;
use crate::processor_time;
use crate::report::{Bound, Report, Table};
use crate::spread::Spread;

const MIB: usize = 1 << 20;
/// What each disk has changed.
const DIRTY: usize = 4 * MIB;
const DISK: u64 = 64 << 20;
/// The cores of a metadata server and of a repository node, and the hosts that share a node, in
/// clusters that are not here.
const CORES: f64 = 2.0;
const HOSTS_PER_NODE: f64 = 10.0;

/// Processor seconds by role.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    mirrors: f64,
    metadata: f64,
    nodes: f64,
}

/// What one checkpoint of all disks took.
#[derive(Debug, Clone, Copy)]
struct Measured {
    until_stable: Duration,
    work: Work,
}

impl Work {
    fn total(self) -> f64 {
        self.mirrors + self.metadata + self.nodes
    }

    fn since(self, before: Self) -> Self {
        Self {
            mirrors: self.mirrors - before.mirrors,
            metadata: self.metadata - before.metadata,
            nodes: self.nodes - before.nodes,
        }
    }
}

struct Hosts {
    roles: Roles,
    mirrors: usize,
    nodes: usize,
    disks: Vec<MountedDisk>,
}

impl Hosts {
    fn start(mirrors: usize, nodes: usize) -> Result<Self> {
        let plan = Plan { mirrors, nodes, ..Plan::default() };
        let roles = Roles::start(&plan, |_| Ok(()))?;
        let raw = roles.dir().join("empty.raw");
        std::fs::File::create(&raw)?.set_len(DISK)?;
        roles.json(&["image", "import", raw.to_str().context("a path in ASCII")?, "empty"])?;
        let open = |mirror| {
            let path = roles.attach(mirror, "empty", &format!("d{mirror}"))?;
            let disk = MountedDisk::open(&path, false)?;
            // The first one also makes the checkpoint image.
            disk.commit_stable()?;
            Ok(disk)
        };
        let disks = (0..mirrors).map(open).collect::<Result<_>>()?;
        Ok(Self { roles, mirrors, nodes, disks })
    }

    fn work(&self) -> Result<Work> {
        let sum = |which: fn(usize) -> Which, count: usize| -> Result<f64> {
            (0..count).map(|n| processor_time::of(self.roles.pid(which(n))?)).sum()
        };
        Ok(Work {
            mirrors: sum(Which::Mirror, self.mirrors)?,
            metadata: sum(Which::Metadata, 1)?,
            nodes: sum(Which::Node, self.nodes)?,
        })
    }

    /// Changes every disk, and lets all of them commit at once.
    fn checkpoint(&self) -> Result<Measured> {
        let mut bytes = vec![0; DIRTY];
        for disk in &self.disks {
            rand::rng().fill_bytes(&mut bytes);
            disk.file().write_all_at(&bytes, 0)?;
        }
        let (before, ready) = (self.work()?, Barrier::new(self.disks.len() + 1));
        let until_stable = std::thread::scope(|scope| -> Result<Duration> {
            let commit = |disk| {
                let ready = &ready;
                scope.spawn(move || {
                    ready.wait();
                    MountedDisk::commit_stable(disk).map(drop)
                })
            };
            let commits: Vec<_> = self.disks.iter().map(commit).collect();
            ready.wait();
            let began = Instant::now();
            for commit in commits {
                commit.join().expect("no thread panics")?;
            }
            Ok(began.elapsed())
        })?;
        Ok(Measured { until_stable, work: self.work()?.since(before) })
    }
}

/// Processor seconds of one COMMIT, by role: the median of what the largest run gave.
fn cost_of_one(measured: &[(usize, Measured)]) -> Work {
    let most = measured.iter().map(|(mirrors, _)| *mirrors).max().unwrap_or(1);
    let largest = measured.iter().filter(|(mirrors, _)| *mirrors == most);
    let median = |part: fn(&Work) -> f64| {
        let parts = Spread::of(largest.clone().map(|(_, m)| part(&m.work)));
        parts.map_or(0.0, |parts| parts.median) / most as f64
    };
    Work {
        mirrors: median(|w| w.mirrors),
        metadata: median(|w| w.metadata),
        nodes: median(|w| w.nodes),
    }
}

/// Seconds until so many disks are stable when all processes share `cores`: what one takes by itself,
/// or what all of them keep the processor busy.
fn shared(one: Duration, work: Work, mirrors: usize, cores: f64) -> f64 {
    one.as_secs_f64().max(work.total() * mirrors as f64 / cores)
}

/// Seconds until so many disks are stable when each host is a machine of its own: what one takes by
/// itself, or what the metadata server or the nodes take for all, whichever is longest.
fn apart(one: Duration, work: Work, hosts: f64) -> [f64; 3] {
    let metadata = work.metadata * hosts / CORES;
    let nodes = work.nodes * HOSTS_PER_NODE / CORES;
    [one.as_secs_f64().max(metadata).max(nodes), metadata, nodes]
}

pub(super) fn run(settings: &Settings) -> Result<Report> {
    let counts: &[usize] = if settings.quick { &[1, 2] } else { &[1, 2, 4, 8, 16, 32, 64] };
    let nodes: &[usize] = if settings.quick { &[3] } else { &[3, 6, 12] };
    let cores = std::thread::available_parallelism()?.get() as f64;
    let mut took = Table::new(
        "All disks commit at once, until all are stable (3 nodes)",
        "s",
        false,
        &["measured", "the model"],
    );
    let mut work = Table::new(
        "Processor time of one of these COMMITs",
        "ms",
        false,
        &["mirror", "metadata server", "nodes"],
    )
    .of_parts();
    let mut by_nodes = Table::new("The same for 8 disks, by nodes", "s", false, &["measured"]);
    let mut measured = Vec::new();
    for &mirrors in counts {
        let hosts = Hosts::start(mirrors, 3)?;
        for _ in 0..settings.rounds {
            let checkpoint = hosts.checkpoint()?;
            measured.push((mirrors, checkpoint));
            let (label, x) = (format!("{mirrors} disks"), Some(mirrors as f64));
            took.add_at(&label, x, 0, checkpoint.until_stable.as_secs_f64());
            let Work { mirrors: own, metadata, nodes } = checkpoint.work;
            for (subject, seconds) in [own, metadata, nodes].into_iter().enumerate() {
                work.add_at(&label, x, subject, seconds * 1e3 / mirrors as f64);
            }
        }
    }
    for &nodes in nodes {
        let hosts = Hosts::start(counts[counts.len().min(4) - 1], nodes)?;
        for _ in 0..settings.rounds {
            let seconds = hosts.checkpoint()?.until_stable.as_secs_f64();
            by_nodes.add_at(&format!("{nodes} nodes"), Some(nodes as f64), 0, seconds);
        }
    }
    let one = measured.iter().filter(|(mirrors, _)| *mirrors == 1).map(|(_, m)| m.until_stable);
    let (one, cost) = (one.min().context("nothing was measured")?, cost_of_one(&measured));
    for (mirrors, _) in &measured {
        let (label, seconds) = (format!("{mirrors} disks"), shared(one, cost, *mirrors, cores));
        took.add(&label, 1, seconds);
    }
    let mut report = Report::new("", "Many hosts at once");
    report.setup.push(format!(
        "Each mirror is a process with one disk of which {} MiB of random bytes changed; pool replica:1; \
         all processes share this machine's cores.",
        DIRTY / MIB
    ));
    let largest = format!("{} disks", counts[counts.len() - 1]);
    let off = took.ratio(&largest, 1).map(|ratio| ratio.max(1.0 / ratio));
    report.claim("the model and what was measured differ", Bound::AtMost(1.25), off, "×");
    report.tables = vec![took, work, by_nodes, model(&mut report, one, cost)];
    Ok(report)
}

fn model(report: &mut Report, one: Duration, cost: Work) -> Table {
    report.setup.push(format!(
        "The model of more hosts: each a machine of its own, {HOSTS_PER_NODE} of them to a node, one \
         metadata server; servers and nodes have {CORES} cores; the network and the disks are not in it."
    ));
    let subjects = ["until all are stable", "the metadata server alone", "the nodes alone"];
    let mut table =
        Table::new("The model, for hosts that are machines", "s", false, &subjects).of_parts();
    for hosts in [64, 256, 1000, 4000, 10_000] {
        let seconds = apart(one, cost, f64::from(hosts));
        for (subject, seconds) in seconds.into_iter().enumerate() {
            table.add_at(&format!("{hosts} hosts"), Some(f64::from(hosts)), subject, seconds);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_part_sets_the_time() {
        let work = Work { mirrors: 0.5, metadata: 0.25, nodes: 0.25 };
        let one = Duration::from_secs(3);
        assert_eq!((shared(one, work, 4, 2.0), shared(one, work, 40, 2.0)), (3.0, 20.0));
        let seconds = apart(one, work, 100.0);
        assert_eq!(seconds, [12.5, 12.5, 1.25]);
        assert_eq!(apart(one, work, 10.0)[0], 3.0);
    }

    #[test]
    fn the_largest_run_says_what_one_costs() {
        let run = |metadata| Measured {
            until_stable: Duration::from_secs(1),
            work: Work { metadata, ..Work::default() },
        };
        let measured = [(1, run(9.0)), (4, run(4.0)), (4, run(8.0)), (4, run(40.0))];
        assert_eq!(cost_of_one(&measured).metadata, 2.0);
    }
}
