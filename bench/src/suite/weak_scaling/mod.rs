//! The paper's figure 6: an application whose ranks compute on the same amount each, however many
//! they are, and take three global checkpoints, by strategy.

mod job;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use job::{Program, Rank, Size, Way};

use super::Settings;
use super::strategies::{MIB, Mirror, STRATEGIES, claim_slowdowns, subjects};
use crate::mpi_job::{Times, times_to_stable};
use crate::processor_time;
use crate::report::{Report, Table};

/// The runs that no checkpoint is asked for in, beside the strategies.
const STATE: usize = STRATEGIES.len();
const NOTHING: usize = STATE + 1;
const GROUP: &str = "job";
const CHECKPOINTS: u64 = 3;

/// The figures.
struct Tables {
    run: Table,
    added: Table,
    persisting: Table,
    downtime: Table,
    stable: Table,
    processor: Table,
}

/// One run of the job.
struct Ran {
    times: Times,
    /// Of each set, until it was stable.
    stable: Vec<Duration>,
    /// Seconds of processor time that the mirror and all behind it took until then.
    processor: f64,
}

/// One strategy's runs, or those without checkpoints.
struct Subject {
    /// Their places in the tables, and what they do.
    ways: Vec<(usize, Way)>,
    mirror: Mirror,
    ranks: Vec<Rank>,
    /// Taken so far.
    sets: u64,
}

impl Subject {
    fn start(
        settings: &Settings,
        strategy: &str,
        ways: Vec<(usize, Way)>,
        (ranks, mib): (usize, u64),
    ) -> anyhow::Result<Self> {
        let mirror = Mirror::start(settings, strategy, ranks, mib)?;
        let rank = |(number, disk): (usize, &PathBuf)| {
            let name = Mirror::disk_name(number);
            let words = ["vm", "add", &name, "--disk", &name, "--group", GROUP];
            let added = mirror.cluster().json(&words)?;
            let channel = added["socket"].as_str().context("no socket in the new VM")?.into();
            anyhow::Ok(Rank { disk: disk.clone(), channel })
        };
        let ranks = mirror.disks().iter().enumerate().map(rank).collect::<Result<_, _>>()?;
        Ok(Self { ways, mirror, ranks, sets: 0 })
    }

    /// Runs the job of so many ranks; waits until its checkpoints are stable.
    fn run(&mut self, program: &Program, ranks: usize, tables: &mut Tables) -> anyhow::Result<()> {
        for &(subject, way) in &self.ways {
            let mirror = self.mirror.cluster().daemon()?.pid();
            let before = processor_time::of(mirror)?;
            let times = program.run(way, &self.ranks[..ranks])?;
            let mut stable = Vec::new();
            if way == Way::Checkpoint {
                let sets = self.sets + 1..=self.sets + CHECKPOINTS;
                stable = times_to_stable(self.mirror.cluster(), GROUP, sets)?;
                self.sets += CHECKPOINTS;
            }
            let processor = processor_time::of(mirror)? - before;
            tables.add(ranks, subject, &Ran { times, stable, processor });
        }
        Ok(())
    }
}

fn mean(times: &[Duration]) -> f64 {
    times.iter().map(Duration::as_secs_f64).sum::<f64>() / times.len() as f64
}

impl Tables {
    fn new() -> Self {
        let all = subjects(&["state written only", "nothing"]);
        let of = |title: &str, unit, subjects| Table::new(title, unit, false, &all[..subjects]);
        Self {
            run: of("Run time", "s", NOTHING + 1),
            added: of("Added run time, over a run that does nothing", "s", NOTHING),
            persisting: of("Added run time, over a run that writes its states only", "s", STATE),
            downtime: of("Downtime: a checkpoint, as a rank sees it", "ms", STATE),
            stable: of("From a checkpoint's begin until it is stable", "s", STATE),
            processor: of("Processor time of mirror and repository, for a run", "s", NOTHING + 1),
        }
    }

    fn add(&mut self, ranks: usize, subject: usize, ran: &Ran) {
        let (label, x) = (label(ranks), Some(ranks as f64));
        let Ran { times, stable, processor } = ran;
        self.processor.add_at(&label, x, subject, *processor);
        self.run.add_at(&label, x, subject, times.ran.as_secs_f64());
        if !stable.is_empty() {
            self.downtime.add_at(&label, x, subject, mean(&times.calls) * 1e3);
            self.stable.add_at(&label, x, subject, mean(stable));
        }
    }

    /// What the last round's runs of so many ranks took longer than those that do less.
    fn compare(&mut self, ranks: usize) {
        let (label, x) = (label(ranks), Some(ranks as f64));
        let last = |subject: usize| self.run.row(&label)?.samples[subject].last().copied();
        let runs: Vec<_> = (0..=NOTHING).filter_map(last).collect();
        for (added, less) in [(&mut self.added, NOTHING), (&mut self.persisting, STATE)] {
            for subject in 0..less {
                added.add_at(&label, x, subject, runs[subject] - runs[less]);
            }
        }
    }
}

fn label(ranks: usize) -> String {
    if ranks == 1 { "1 rank".to_owned() } else { format!("{ranks} ranks") }
}

/// One round: the job of each number of ranks, with all subjects by turns.
fn round(
    settings: &Settings,
    program: &Program,
    counts: &[usize],
    (mib, first): (u64, usize),
    tables: &mut Tables,
) -> anyhow::Result<()> {
    let most = counts.iter().copied().max().unwrap_or(1);
    let strategies = STRATEGIES.iter().enumerate();
    let strategies = strategies.map(|(at, name)| (*name, vec![(at, Way::Checkpoint)]));
    let none = (STRATEGIES[0], vec![(STATE, Way::State), (NOTHING, Way::Nothing)]);
    // Made anew each round: what checkpoints stored goes with their repository.
    let mut subjects = strategies
        .chain([none])
        .map(|(strategy, ways)| Subject::start(settings, strategy, ways, (most, mib)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let turn = first % subjects.len();
    subjects.rotate_left(turn);
    for &ranks in counts {
        for subject in &mut subjects {
            subject.run(program, ranks, tables)?;
        }
        tables.compare(ranks);
    }
    Ok(())
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let size = Size {
        row: 4096,
        rows: settings.size(2048, 128),
        steps: settings.size(160, 16),
        summary: settings.size(8, 2),
    };
    let counts: &[usize] = if settings.quick { &[1, 2] } else { &[1, 2, 4, 8] };
    let mib = (size.state_bytes() + size.summary_bytes()).div_ceil(MIB);
    let program = Program::compile(size)?;
    let mut tables = Tables::new();
    for number in 0..settings.rounds as usize {
        round(settings, &program, counts, (mib, number), &mut tables)?;
    }
    let mut report = Report::new("", "A weak-scaling application with three checkpoints");
    report.setup.extend(setup(size));
    claim_slowdowns(&mut report, &tables.persisting);
    let Tables { run, added, persisting, downtime, stable, processor } = tables;
    report.tables = vec![run, added, persisting, downtime, stable, processor];
    Ok(report)
}

fn setup(size: Size) -> Vec<String> {
    let Size { steps, summary, .. } = size;
    let (state, part) = (size.state_bytes() / MIB, size.summary_bytes() / MIB);
    vec![
        format!(
            "A stencil over MPI. Each rank has {state} MiB of points, a disk, and a channel to the \
             proxy, as a VM of its own; it makes {steps} steps, and writes {part} MiB to its disk \
             every {summary} of them. Three times, evenly spaced, it writes its {state} MiB, syncs, \
             and all take a global checkpoint by blobcr_mpi_checkpoint and go on at once."
        ),
        "Ranks share this machine's cores, disk and repository node: with more of them than \
         cores, the run time of ideal weak scaling is proportional to ranks / cores, and that of \
         everything else here too."
            .to_owned(),
        "A slowdown is what checkpoints add to a run that writes the same states; sums over all \
         numbers of ranks. Downtime is the mean over ranks and checkpoints, from the moment when \
         all ranks have written. QEMU's savevm is left out, as in the paper: ranks are no VMs here."
            .to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_told_within_a_round() {
        let mut tables = Tables::new();
        for (round, slower) in [(0, 1), (1, 3)] {
            for subject in 0..=NOTHING {
                let ran = Duration::from_secs([9, 10, 11, 12, 7, 5][subject] * slower + round);
                let calls = vec![Duration::from_secs(1), Duration::from_secs(3)];
                let stable = if subject < STATE { vec![Duration::from_secs(2)] } else { vec![] };
                let times = Times { calls, ran };
                tables.add(2, subject, &Ran { times, stable, processor: 1.5 });
            }
            tables.compare(2);
        }
        let row = |table: &Table| table.row("2 ranks").unwrap().samples.clone();
        assert_eq!(row(&tables.added)[0], [4.0, 12.0]);
        assert_eq!(row(&tables.added)[STATE], [2.0, 6.0]);
        assert_eq!(row(&tables.persisting)[3], [5.0, 15.0]);
        assert_eq!(row(&tables.downtime)[1], [2000.0, 2000.0]);
        assert_eq!(row(&tables.stable)[2], [2.0, 2.0]);
        assert_eq!(row(&tables.processor)[NOTHING], [1.5, 1.5]);
    }
}
