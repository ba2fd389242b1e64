//! What a benchmark found, as data: printed, kept as JSON, drawn, and shown on a page.

mod page;
mod plot;
mod text;

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::spread::Spread;

pub use page::write_page;

/// What one benchmark found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// As the command line calls the benchmark.
    pub name: String,
    /// One line: what was measured.
    pub title: String,
    /// How: sizes, settings, the machine. A sentence each.
    pub setup: Vec<String>,
    /// The figures.
    pub tables: Vec<Table>,
    /// What the project promises of them.
    pub claims: Vec<Claim>,
}

/// Subjects (us and the alternatives) beside each other, in several situations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// One line.
    pub title: String,
    /// Of every cell.
    pub unit: String,
    /// Whether a greater value is better.
    pub more_is_better: bool,
    /// What is compared; the first one is ours.
    pub subjects: Vec<String>,
    /// Whether ours is to be told in units of the others'; not where they are parts of one thing.
    #[serde(default = "compared")]
    pub compared: bool,
    /// The situations.
    pub rows: Vec<Row>,
}

/// In reports that were kept before there was a choice.
const fn compared() -> bool {
    true
}

/// One situation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    pub label: String,
    /// Where it is on the axis of a line plot; bars are drawn where rows have none.
    pub x: Option<f64>,
    /// One value of each round, for each subject; none where the subject cannot do it.
    pub samples: Vec<Vec<f64>>,
}

/// What is promised, and what was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// In words.
    pub what: String,
    /// The limit.
    pub bound: Bound,
    /// The value.
    pub measured: f64,
    /// Of both; empty for a ratio.
    pub unit: String,
}

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Bound {
    /// The value should not be less.
    AtLeast(f64),
    /// The value should not be greater.
    AtMost(f64),
}

impl Claim {
    /// Whether it holds.
    #[must_use]
    pub fn met(&self) -> bool {
        match self.bound {
            Bound::AtLeast(bound) => self.measured >= bound,
            Bound::AtMost(bound) => self.measured <= bound,
        }
    }
}

impl Table {
    /// Without rows.
    #[must_use]
    pub fn new(title: &str, unit: &str, more_is_better: bool, subjects: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            unit: unit.to_owned(),
            more_is_better,
            subjects: subjects.iter().map(|&name| name.to_owned()).collect(),
            compared: true,
            rows: Vec::new(),
        }
    }

    /// The same table without ratios.
    #[must_use]
    pub fn of_parts(self) -> Self {
        Self { compared: false, ..self }
    }

    /// Adds a value of the subject in the situation `label`, which is made where it is new.
    pub fn add(&mut self, label: &str, subject: usize, value: f64) {
        self.add_at(label, None, subject, value);
    }

    /// The same for a situation that has a place on an axis.
    pub fn add_at(&mut self, label: &str, x: Option<f64>, subject: usize, value: f64) {
        let at = self.rows.iter().position(|row| row.label == label).unwrap_or_else(|| {
            let samples = vec![Vec::new(); self.subjects.len()];
            self.rows.push(Row { label: label.to_owned(), x, samples });
            self.rows.len() - 1
        });
        self.rows[at].samples[subject].push(value);
    }

    /// The row of this name.
    #[must_use]
    pub fn row(&self, label: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.label == label)
    }

    /// Ours in units of the subject's in that row; `None` where either was not measured.
    #[must_use]
    pub fn ratio(&self, label: &str, subject: usize) -> Option<f64> {
        self.row(label)?.ratio(subject)
    }

    /// The same of any subject of ours.
    #[must_use]
    pub fn ratio_of(&self, label: &str, ours: usize, subject: usize) -> Option<f64> {
        self.row(label)?.ratio_of(ours, subject)
    }
}

impl Row {
    /// What the rounds of a subject gave.
    #[must_use]
    pub fn spread(&self, subject: usize) -> Option<Spread> {
        Spread::of(self.samples.get(subject)?.iter().copied())
    }

    /// Ours in units of the subject's: the median of the ratios of the rounds, because what a
    /// machine does meanwhile changes from round to round.
    #[must_use]
    pub fn ratio(&self, subject: usize) -> Option<f64> {
        self.ratio_of(0, subject)
    }

    fn ratio_of(&self, ours: usize, subject: usize) -> Option<f64> {
        let rounds = self.samples.get(ours)?.iter().zip(self.samples.get(subject)?);
        Some(Spread::of(rounds.map(|(ours, theirs)| ours / theirs))?.median)
    }
}

impl Report {
    /// Without figures.
    #[must_use]
    pub fn new(name: &str, title: &str) -> Self {
        Self {
            name: name.to_owned(),
            title: title.to_owned(),
            setup: Vec::new(),
            tables: Vec::new(),
            claims: Vec::new(),
        }
    }

    /// Adds a promise about a value; nothing where it was not measured.
    pub fn claim(&mut self, what: &str, bound: Bound, measured: Option<f64>, unit: &str) {
        if let Some(measured) = measured {
            let (what, unit) = (what.to_owned(), unit.to_owned());
            self.claims.push(Claim { what, bound, measured, unit });
        }
    }

    /// Writes `NAME.json` and `NAME-N.svg` for each table into the directory, which is made.
    ///
    /// # Errors
    /// When a file cannot be written or a plot not be drawn.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let json = dir.join(format!("{}.json", self.name));
        std::fs::write(&json, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", json.display()))?;
        for (number, table) in self.tables.iter().enumerate() {
            plot::draw(table, &dir.join(self.plot_name(number)))?;
        }
        Ok(())
    }

    fn plot_name(&self, table: usize) -> String {
        format!("{}-{}.svg", self.name, table + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut table = Table::new("writes", "IOPS", true, &["ours", "theirs"]);
        for (ours, theirs) in [(2.0, 1.0), (9.0, 3.0), (8.0, 2.0)] {
            table.add("4 KiB", 0, ours);
            table.add("4 KiB", 1, theirs);
        }
        table.add("1 MiB", 0, 5.0);
        let mut report = Report::new("guest-io", "Guest I/O <beside> others");
        report.claim("fast", Bound::AtLeast(2.5), table.ratio("4 KiB", 1), "");
        report.claim("fast elsewhere", Bound::AtLeast(2.5), table.ratio("1 MiB", 1), "");
        report.claim("slow", Bound::AtMost(1.0), Some(2.0), "ms");
        report.tables.push(table);
        report
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds() {
        let report = report();
        assert_eq!(report.tables[0].ratio("4 KiB", 1), Some(3.0));
        assert_eq!(report.tables[0].ratio("1 MiB", 1), None);
        assert_eq!(report.claims.iter().map(Claim::met).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn it_is_kept_drawn_and_shown() {
        let dir = tempfile::tempdir().unwrap();
        let report = report();
        report.write(dir.path()).unwrap();
        write_page(dir.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let back: Report = serde_json::from_str(&read("guest-io.json")).unwrap();
        assert_eq!(back, report);
        assert!(read("guest-io-1.svg").contains("theirs"));
        let page = read("index.html");
        assert!(page.contains("guest-io-1.svg") && page.contains("&lt;beside&gt;"));
        let text = report.to_string();
        assert!(text.contains("3.00×") && text.contains("NOT MET"), "{text}");
    }
}
