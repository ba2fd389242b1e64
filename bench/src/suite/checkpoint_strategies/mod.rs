//! The paper's figures 4 and 5: what a checkpoint of several disks costs an application that writes
//! on at once, by strategy, and what it leaves behind.

mod application;
mod subjects;

use subjects::{Outcome, saved_vms};

use super::Settings;
use super::strategies::{Mirror, STRATEGIES, claim_slowdowns, subjects};
use crate::report::{Report, Table};

/// QEMU's savevm, beside the strategies.
const FULL: usize = STRATEGIES.len();

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
        let names = subjects(&["full"]);
        let of = |title: &str, unit| Table::new(title, unit, false, &names);
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

pub(super) fn run(settings: &Settings) -> anyhow::Result<Report> {
    let mib = settings.size(128, 8);
    let counts: &[usize] = if settings.quick { &[1, 2] } else { &[1, 2, 4, 8] };
    let most = counts.iter().copied().max().unwrap_or(1);
    let mirrors = STRATEGIES
        .iter()
        .map(|strategy| Mirror::start(settings, strategy, most, mib))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut tables = Tables::new();
    for _ in 0..settings.rounds {
        for &count in counts {
            for (subject, mirror) in mirrors.iter().enumerate() {
                tables.add(count, subject, &mirror.run_application(count)?);
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
    claim_slowdowns(&mut report, &tables.added);
    let Tables { downtime, added, longest, stable, copied, extents, stored } = tables;
    report.tables = vec![downtime, added, longest, stable, copied, extents, stored];
    Ok(report)
}
