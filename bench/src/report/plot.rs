//! A table as a plot: lines where its rows have places on an axis, bars otherwise.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::text::short;
use super::{Row, Table};

const SIZE: (u32, u32) = (900, 420);
/// Told apart by those who see no red or green, too.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 90, 160),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(120, 120, 120),
    RGBColor(86, 180, 233),
];
/// From where on the greatest value would hide the least on a linear axis.
const LOG_FROM: f64 = 30.0;

fn colour(subject: usize) -> RGBColor {
    COLOURS[subject % COLOURS.len()]
}

/// The least and the greatest median that can be drawn on any axis.
fn ends(table: &Table) -> Option<(f64, f64)> {
    let subjects = 0..table.subjects.len();
    let medians = table.rows.iter().flat_map(|row| {
        subjects.clone().filter_map(|s| Some(row.spread(s)?.median)).filter(|m| *m > 0.0)
    });
    let (least, most) = medians.fold((f64::MAX, 0.0_f64), |(a, b), m| (a.min(m), b.max(m)));
    (most > 0.0).then_some((least, most))
}

/// An axis: as it is, or logarithmic.
#[derive(Clone, Copy)]
struct Axis {
    log: bool,
}

impl Axis {
    /// For values from `least` to `most`.
    fn of(least: f64, most: f64) -> Self {
        Self { log: least > 0.0 && most / least > LOG_FROM }
    }

    fn place(self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }

    fn label(self, place: f64) -> String {
        short(if self.log { 10_f64.powf(place) } else { place })
    }
}

/// What is drawn on: x as it is, y as its axis places it.
type Chart<'a> = ChartContext<
    'a,
    SVGBackend<'a>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// Draws the table into an SVG file.
pub(super) fn draw(table: &Table, path: &Path) -> anyhow::Result<()> {
    let Some((least, most)) = ends(table) else {
        return Ok(());
    };
    let y = Axis::of(least, most);
    let (bottom, top) =
        if y.log { (y.place(least / 1.6), y.place(most * 1.6)) } else { (0.0, most * 1.15) };
    draw_on(table, path, y, bottom..top)
        .map_err(|error| anyhow!("draw {}: {error}", path.display()))
}

fn draw_on(
    table: &Table,
    path: &Path,
    y: Axis,
    y_range: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let xs: Option<Vec<f64>> = table.rows.iter().map(|row| row.x).collect();
    let xs = xs.filter(|xs| xs.len() > 1);
    let (x, x_range) = match &xs {
        Some(xs) => {
            let least = xs.iter().copied().fold(f64::MAX, f64::min);
            let most = xs.iter().copied().fold(f64::MIN, f64::max);
            let x = Axis::of(least, most);
            (x, x.place(least)..x.place(most))
        }
        None => (Axis { log: false }, 0.0..table.rows.len() as f64),
    };
    let mut chart = ChartBuilder::on(&area)
        .caption(&table.title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(if xs.is_some() { 32 } else { 46 })
        .y_label_area_size(64)
        .build_cartesian_2d(x_range, y_range.clone())?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().light_line_style(WHITE).y_desc(table.unit.as_str());
    let (y_label, x_label) = (|place: &f64| y.label(*place), |place: &f64| x.label(*place));
    mesh.y_label_formatter(&y_label).x_label_formatter(&x_label);
    if xs.is_none() {
        mesh.x_labels(0);
    }
    mesh.draw()?;
    let xs_are_places = xs.is_some();
    match xs {
        Some(_) => lines(&mut chart, table, x, y)?,
        None => {
            bars(&mut chart, table, y, y_range.start)?;
            row_names(&chart, &area, table)?;
        }
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        // Lines mostly grow.
        .position(if xs_are_places {
            SeriesLabelPosition::UpperLeft
        } else {
            SeriesLabelPosition::UpperRight
        })
        .draw()?;
    Ok(area.present()?)
}

/// The whole picture.
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn legend(chart: &mut Chart<'_>, table: &Table, subject: usize, marks: Vec<Rect>) -> Drawn {
    let colour = colour(subject);
    let marks = marks.into_iter().map(|corners| Rectangle::new(corners, colour.filled()));
    chart
        .draw_series(marks)?
        .label(table.subjects[subject].as_str())
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
    Ok(())
}

/// Two opposite corners.
type Rect = [(f64, f64); 2];

/// A group of bars for each row, with the ends of the rounds on each.
fn bars(chart: &mut Chart<'_>, table: &Table, y: Axis, bottom: f64) -> Drawn {
    let width = 0.8 / table.subjects.len() as f64;
    for subject in 0..table.subjects.len() {
        let (mut marks, mut ends) = (Vec::new(), Vec::new());
        for (number, row) in table.rows.iter().enumerate() {
            let Some(spread) = row.spread(subject).filter(|spread| spread.median > 0.0) else {
                continue;
            };
            let left = number as f64 + 0.1 + subject as f64 * width;
            marks.push([(left, bottom), (left + width * 0.92, y.place(spread.median))]);
            let middle = left + width * 0.46;
            let least = y.place(spread.least).max(bottom);
            ends.push(vec![(middle, least), (middle, y.place(spread.most))]);
        }
        legend(chart, table, subject, marks)?;
        chart.draw_series(ends.into_iter().map(|line| PathElement::new(line, BLACK)))?;
    }
    Ok(())
}

/// Below each group, in two heights by turns so that long names do not run into each other.
fn row_names(chart: &Chart<'_>, area: &Area<'_>, table: &Table) -> Drawn {
    let (xs, ys) = chart.plotting_area().get_pixel_range();
    let step = f64::from(xs.end - xs.start) / table.rows.len() as f64;
    let style = ("sans-serif", 12).into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
    for (number, row) in table.rows.iter().enumerate() {
        let x = f64::from(xs.start) + (number as f64 + 0.5) * step;
        let y = ys.end + 6 + if number % 2 == 1 { 16 } else { 0 };
        area.draw_text(&row.label, &style, (x as i32, y))?;
    }
    Ok(())
}

/// A line for each subject.
fn lines(chart: &mut Chart<'_>, table: &Table, x: Axis, y: Axis) -> Drawn {
    for subject in 0..table.subjects.len() {
        let mut points: Vec<(f64, f64)> = table
            .rows
            .iter()
            .filter_map(|row: &Row| {
                let median = row.spread(subject)?.median;
                (median > 0.0).then_some((x.place(row.x?), y.place(median)))
            })
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let colour = colour(subject);
        chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
        chart
            .draw_series(points.into_iter().map(|point| Circle::new(point, 3, colour.filled())))?;
        legend(chart, table, subject, Vec::new())?;
    }
    Ok(())
}
