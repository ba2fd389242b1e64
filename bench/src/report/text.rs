//! A report for a terminal.

use std::fmt;

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table as Grid};

use super::{Bound, Claim, Report, Row, Table};
use crate::spread::Spread;

/// Three digits that matter, and no more.
pub(super) fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// The median, the ends where there is more than one value, and the ratio.
pub(super) fn cell(table: &Table, row: &Row, subject: usize) -> String {
    let Some(Spread { median, least, most, samples }) = row.spread(subject) else {
        return "–".to_owned();
    };
    let ends = match samples {
        1 => String::new(),
        _ => format!(" ({}–{})", short(least), short(most)),
    };
    let ratio = match row.ratio(subject) {
        Some(ratio) if table.compared && subject > 0 && ratio.is_finite() => {
            format!(" {}×", ratio_text(ratio))
        }
        _ => String::new(),
    };
    format!("{}{ends}{ratio}", short(median))
}

fn ratio_text(ratio: f64) -> String {
    if ratio >= 100.0 { format!("{ratio:.0}") } else { format!("{ratio:.2}") }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, bound) = match self.bound {
            Bound::AtLeast(bound) => ("at least", bound),
            Bound::AtMost(bound) => ("at most", bound),
        };
        let (verdict, unit) = (if self.met() { "met" } else { "NOT MET" }, &self.unit);
        let (measured, bound) = (short(self.measured), short(bound));
        write!(f, "{verdict}: {}: {measured} {unit} (target: {word} {bound})", self.what)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let better = if self.more_is_better { "more" } else { "less" };
        let ratio = if self.compared { "; N× = ours / theirs" } else { "" };
        writeln!(f, "{}: {}, {better} is better{ratio}", self.title, self.unit)?;
        let mut grid = Grid::new();
        grid.load_style(UTF8_HORIZONTAL_ONLY);
        grid.set_header(std::iter::once("").chain(self.subjects.iter().map(String::as_str)));
        for row in &self.rows {
            let cells = (0..self.subjects.len()).map(|subject| cell(self, row, subject));
            grid.add_row(std::iter::once(row.label.clone()).chain(cells));
        }
        for column in grid.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        writeln!(f, "{grid}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.name, self.title)?;
        for line in &self.setup {
            writeln!(f, "  {line}")?;
        }
        for table in &self.tables {
            write!(f, "\n{table}")?;
        }
        for claim in &self.claims {
            writeln!(f, "{claim}")?;
        }
        Ok(())
    }
}
