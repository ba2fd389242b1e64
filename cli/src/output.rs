//! What the command says: data on stdout, everything else on stderr.

use std::io::{self, IsTerminal, Write};

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::exit::Exit;

/// Where a verb's results go.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    /// One JSON object or array when `json`, text for people otherwise.
    #[must_use]
    pub const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints one result.
    ///
    /// # Errors
    /// When stdout takes no more.
    pub fn data<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let mut text = if self.json { serde_json::to_string_pretty(value)? } else { human(value) };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        print(&text)
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // The reader (`head`, a pager) has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(anyhow::Error::new(e).context("cannot write to stdout")),
        Ok(()) => Ok(()),
    }
}

/// A line on stderr for the person who watches.
pub fn say(line: &str) {
    // Nobody is left to be told when stderr is closed.
    let _ = writeln!(io::stderr().lock(), "blobcr: {line}");
}

/// Prints why the command failed and gives the code to end with.
pub fn failed(failure: &anyhow::Error) -> Exit {
    let mut line = String::new();
    // A message that already ends with its cause's words is not said twice.
    for cause in failure.chain().map(ToString::to_string) {
        if !line.ends_with(&cause) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&cause);
        }
    }
    say(&line);
    crate::exit::code(failure)
}

/// Whether a person watches stderr, so that progress may be drawn on it.
#[must_use]
pub fn watched() -> bool {
    io::stderr().is_terminal()
}

/// Whether stderr may be coloured: a terminal, and no NO_COLOR (no-color.org).
#[must_use]
pub fn coloured() -> bool {
    watched() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub enum Column {
    /// Text, to the left.
    Text(&'static str),
    /// A number, to the right.
    Number(&'static str),
}

/// Rows under headings, aligned by spaces. Headings alone when there are no rows.
#[must_use]
pub fn table(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|column| match column {
        Column::Text(name) | Column::Number(name) => Cell::new(name),
    }));
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in columns.iter().enumerate() {
        let Some(settings) = table.column_mut(index) else { continue };
        settings.set_padding((0, 2));
        if let Column::Number(_) = column {
            settings.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `KEY  value` lines, aligned.
#[must_use]
pub fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let facts: Vec<_> = facts.into_iter().collect();
    let width = facts.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    facts.into_iter().map(|(key, value)| format!("{key:width$}  {value}\n")).collect()
}

/// The value, or `-` where there is none.
pub fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_by_column() {
        let text = table(
            &[Column::Text("NAME"), Column::Number("SIZE")],
            [vec!["a".into(), "10".into()], vec!["longer".into(), "5".into()]],
        );
        assert_eq!(text, "NAME    SIZE\na         10\nlonger     5\n");
    }

    #[test]
    fn an_empty_table_has_its_headings() {
        assert_eq!(table(&[Column::Text("NAME")], []), "NAME\n");
    }

    #[test]
    fn facts_line_up() {
        assert_eq!(facts([("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
