//! The paper's figures 4 and 5: what a checkpoint of several disks costs an application that writes
//! on at once, by strategy, and what it leaves behind.

mod application;
mod subjects;

use subjects::{Mirror, Outcome, saved_vms};

use super::Settings;
use crate::report::{Bound, Report, Table};
use crate::spread::Spread;

/// Selective copy-on-write is ours; `full` is QEMU's savevm.
const SUBJECTS: [&str; 5] = ["selective", "cow", "precopy", "offline", "full"];
const FULL: usize = 4;
/// What the slowdown may be of theirs.
const TARGETS: [(usize, f64); 3] = [(1, 0.8), (2, 0.7), (3, 0.3)];

/// The figures.
struct Tables {
    downtime: Table,
    added: Table,
    longest: Table,
    stable: Table,
    copied: Table,
    extents: Table,
    stored: Table,
}

impl Tables {
    fn new() -> Self {
        let of = |title: &str, unit| Table::new(title, unit, false, &SUBJECTS);
        Self {
            downtime: of("Downtime: the checkpoint, as its caller sees it", "ms"),
            added: of("Added run time: checkpoint and second round, less a round before it", "ms"),
            longest: of("The longest write of the second round", "ms"),
            stable: of("From the checkpoint's call until it is stable", "ms"),
            copied: of("Most that spill files held, all disks together", "MiB"),
            extents: of("Pieces of a disk's local file", "extents"),
            stored: of("Stored of a disk and one checkpoint: local file and repository", "MiB"),
        }
    }

    fn add(&mut self, disks: usize, subject: usize, outcome: &Outcome) {
        let label = if disks == 1 { "1 disk".to_owned() } else { format!("{disks} disks") };
        let x = Some(disks as f64);
        let mean = |value: &dyn Fn(&application::Lived) -> f64| {
            outcome.lived.iter().map(value).sum::<f64>() / outcome.lived.len() as f64
        };
        let ms = 1e3;
        let values = [
            (&mut self.downtime, mean(&|lived| lived.downtime.as_secs_f64()) * ms),
            (&mut self.added, mean(&|lived| lived.added) * ms),
            (&mut self.longest, mean(&|lived| lived.longest_write.as_secs_f64()) * ms),
            (&mut self.stable, outcome.stable * ms),
            (&mut self.copied, outcome.copied_mib),
            (&mut self.extents, outcome.extents),
            (&mut self.stored, outcome.stored_mib),
        ];
        for (table, value) in values {
            table.add_at(&label, x, subject, value);
        }
    }
}

/// Our slowdown in units of the subject's: the median over the rounds, each with all its disks.
fn slowdown(added: &Table, subject: usize, rounds: u32) -> Option<f64> {
    let sum = |subject: usize, round: usize| -> f64 {
        added.rows.iter().filter_map(|row| row.samples[subject].get(round)).sum()
    };
    let ratios = (0..rounds as usize).map(|round| sum(0, round) / sum(subject, round));
    Some(Spread::of(ratios)?.median)
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let mib = settings.size(128, 8);
    let counts: &[usize] = if settings.quick { &[1, 2] } else { &[1, 2, 4, 8] };
    let most = counts.iter().copied().max().unwrap_or(1);
    let mirrors = SUBJECTS[..FULL]
        .iter()
        .map(|strategy| Mirror::start(settings, strategy, most, mib))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut tables = Tables::new();
    for _ in 0..settings.rounds {
        for &count in counts {
            for (subject, mirror) in mirrors.iter().enumerate() {
                tables.add(count, subject, &mirror.run(count)?);
            }
            tables.add(count, FULL, &saved_vms(&settings.disk_dir, count, mib)?);
        }
    }
    let mut report = Report::new("", "A checkpoint of several disks, by strategy");
    report.setup.push(format!(
        "An application on each disk fills it with {mib} MiB of random data by writes of 1 MiB, and syncs; \
         three times: the first makes the file, the second is what the third is compared with, \
         and the third begins with a checkpoint of all disks at once. Means over the disks."
    ));
    report.setup.push(
        "selective, cow, precopy and offline are one mirror each (--strategy), with one \
         repository node on the same disk; full is QEMU's savevm of a VM with as much memory as \
         data into its qcow2 file, written to through QEMU's FUSE export."
            .to_owned(),
    );
    report.setup.push(
        "cow copies what copy-on-write copies, but writes in place: see docs/mirror.md.".to_owned(),
    );
    for (subject, bound) in TARGETS {
        let what = format!("slowdown against {}", SUBJECTS[subject]);
        let ratio = slowdown(&tables.added, subject, settings.rounds);
        report.claim(&what, Bound::AtMost(bound), ratio, "×");
    }
    let Tables { downtime, added, longest, stable, copied, extents, stored } = tables;
    report.tables = vec![downtime, added, longest, stable, copied, extents, stored];
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slowdown_is_that_of_all_disks_of_a_round() {
        let mut added = Table::new("", "", false, &["ours", "theirs"]);
        for (label, ours, theirs) in [
            ("1", 1.0, 2.0),
            ("2", 2.0, 10.0),
            ("1", 9.0, 3.0),
            ("2", 0.0, 3.0),
            ("1", 1.0, 4.0),
            ("2", 1.0, 4.0),
        ] {
            added.add(label, 0, ours);
            added.add(label, 1, theirs);
        }
        assert_eq!(slowdown(&added, 1, 3), Some(0.25));
        assert_eq!(slowdown(&added, 1, 0), None);
    }
}
