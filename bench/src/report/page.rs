//! A page of all reports of a directory, for a browser.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::text::cell;
use super::{Report, Table};

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}\
table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-size:13px}\
td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}\
td:first-child,th:first-child{text-align:left}\
td:nth-child(2){font-weight:bold}.met{color:#176b2c}.missed{color:#b00020}\
img{max-width:100%}nav a{margin-right:1rem}section{border-top:2px solid #222;margin-top:2rem}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn table_html(table: &Table, out: &mut String) {
    out.push_str("<table><tr><th></th>");
    for subject in &table.subjects {
        let _ = write!(out, "<th>{}</th>", escaped(subject));
    }
    out.push_str("</tr>");
    for row in &table.rows {
        let _ = write!(out, "<tr><td>{}</td>", escaped(&row.label));
        for subject in 0..table.subjects.len() {
            let _ = write!(out, "<td>{}</td>", escaped(&cell(table, row, subject)));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
}

fn report_html(report: &Report, out: &mut String) {
    let (name, title) = (escaped(&report.name), escaped(&report.title));
    let _ = write!(out, "<section id=\"{name}\"><h2>{title}</h2><p>");
    for line in &report.setup {
        let _ = write!(out, "{} ", escaped(line));
    }
    out.push_str("</p><ul>");
    for claim in &report.claims {
        let class = if claim.met() { "met" } else { "missed" };
        let _ = write!(out, "<li class=\"{class}\">{}</li>", escaped(&claim.to_string()));
    }
    out.push_str("</ul>");
    for (number, table) in report.tables.iter().enumerate() {
        let better = if table.more_is_better { "more" } else { "less" };
        let ratio = if table.compared { ", and ours in units of theirs" } else { "" };
        let (plot, title) = (escaped(&report.plot_name(number)), escaped(&table.title));
        let _ = write!(
            out,
            "<h3>{title}</h3><p>{}, {better} is better; median (least–most){ratio}.</p><img src=\"{plot}\" alt=\"{title}\">",
            escaped(&table.unit)
        );
        table_html(table, out);
    }
    out.push_str("</section>");
}

/// Writes `index.html`: every report whose JSON is in the directory.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write_page(dir: &Path) -> anyhow::Result<()> {
    let mut reports = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let report: Report = serde_json::from_slice(&std::fs::read(&path)?)
                .with_context(|| format!("{} is no report", path.display()))?;
            reports.push(report);
        }
    }
    reports.sort_by(|a, b| a.name.cmp(&b.name));
    let mut out = String::from("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">");
    let _ = write!(out, "<title>blobcr: benchmarks</title><style>{STYLE}</style>");
    out.push_str("<h1>blobcr beside the alternatives</h1><nav>");
    for report in &reports {
        let name = escaped(&report.name);
        let _ = write!(out, "<a href=\"#{name}\">{name}</a>");
    }
    out.push_str("</nav>");
    for report in &reports {
        report_html(report, &mut out);
    }
    out.push_str("</html>\n");
    let page = dir.join("index.html");
    std::fs::write(&page, out).with_context(|| format!("write {}", page.display()))
}
