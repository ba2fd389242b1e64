//! From what was measured to the pick.

use std::io::Write;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{Measured, Options, SCATTERED_COMMIT};

/// The most that a tree may add to the data of scattered commits. Data compresses to about half;
/// with this the tree is at most a tenth of what such a snapshot adds to the repository.
const TREE_SHARE_MAX: f64 = 0.05;

/// For each fan-out, the mean over the operations of how many times the best one's cost it takes.
fn costs(measured: &[Measured], options: &Options) -> Vec<f64> {
    let operations = measured.first().map_or(0, |m| m.operations.len());
    let cost = |m: &Measured, at: usize| m.operations[at].1.modelled_us(options);
    let best: Vec<f64> = (0..operations)
        .map(|at| measured.iter().map(|m| cost(m, at)).fold(f64::MAX, f64::min))
        .collect();
    let mean = |m: &Measured| {
        (0..operations).map(|at| cost(m, at) / best[at]).sum::<f64>() / operations as f64
    };
    measured.iter().map(mean).collect()
}

fn scattered_share(measured: &Measured, options: &Options) -> f64 {
    let commits = measured.operations.iter().filter(|(name, _)| *name == SCATTERED_COMMIT);
    commits.map(|(_, cost)| cost.tree_share(options)).fold(0.0, f64::max)
}

/// How a fan-out does over all images.
#[derive(Serialize)]
struct Score {
    fan_out: u32,
    /// Mean cost, in times that of the best fan-out for each operation.
    cost: f64,
    /// The largest share of tree in scattered commits.
    tree_share: f64,
}

/// The whole result.
#[derive(Serialize)]
pub(crate) struct Report<'o> {
    options: &'o Options,
    /// By size in GiB.
    images: Vec<(u64, Vec<Measured>)>,
    scores: Vec<Score>,
    pick: u32,
}

impl<'o> Report<'o> {
    /// Scores what was measured, the same fan-outs for each image size.
    pub(crate) fn new(options: &'o Options, images: Vec<(u64, Vec<Measured>)>) -> Result<Self> {
        let (_, first) = images.first().context("no image size was given")?;
        let new_score = |m: &Measured| Score { fan_out: m.fan_out, cost: 0.0, tree_share: 0.0 };
        let mut scores: Vec<Score> = first.iter().map(new_score).collect();
        for (_, measured) in &images {
            for ((score, cost), measured) in
                scores.iter_mut().zip(costs(measured, options)).zip(measured)
            {
                score.cost += cost / images.len() as f64;
                score.tree_share = score.tree_share.max(scattered_share(measured, options));
            }
        }
        let small = scores.iter().filter(|score| score.tree_share <= TREE_SHARE_MAX);
        let best = small.min_by(|a, b| a.cost.total_cmp(&b.cost));
        let pick = best.context("every fan-out writes too much of tree")?.fan_out;
        Ok(Self { options, images, scores, pick })
    }

    /// The last table.
    pub(crate) fn print_pick(&self, out: &mut impl Write) -> Result<()> {
        let Options { round_trip_us, gbit, record_us, copies, .. } = self.options;
        writeln!(
            out,
            "\nmean cost, in times that of the best fan-out for each operation (round trip \
             {round_trip_us} us, {gbit} Gbit/s, {record_us} us a record, {copies} copies), and \
             the most that the tree adds to scattered commits (a pick: at most {} %)",
            TREE_SHARE_MAX * 100.0
        )?;
        for Score { fan_out, cost, tree_share } in &self.scores {
            let mark = if *fan_out == self.pick { "  <- pick" } else { "" };
            writeln!(out, "{fan_out:>7}  {cost:>6.2}  {:>6.2}%{mark}", tree_share * 100.0)?;
        }
        Ok(())
    }
}

/// All that was measured for one image size.
pub(crate) fn print_table(
    out: &mut impl Write,
    gib: u64,
    measured: &[Measured],
    options: &Options,
) -> Result<()> {
    writeln!(out, "\n{gib} GiB in chunks of {} KiB", options.chunk_kib)?;
    writeln!(out, "fan-out  levels  tree nodes  tree MB  of data  warm lookup")?;
    for m in measured {
        let share = m.tree_bytes as f64 / (gib << 30) as f64 * 100.0;
        writeln!(
            out,
            "{:>7}  {:>6}  {:>10}  {:>7.1}  {share:>6.3}%  {:>8.0} ns",
            m.fan_out,
            m.depth,
            m.tree_nodes,
            m.tree_bytes as f64 / 1e6,
            m.warm_lookup_ns
        )?;
    }
    let operations = measured.first().map_or(0, |m| m.operations.len());
    for at in 0..operations {
        writeln!(out, "\n  {}", measured[0].operations[at].0)?;
        writeln!(
            out,
            "  fan-out  requests  read: nodes       KB  written: nodes       KB  of data  processor us  \
             modelled us"
        )?;
        for m in measured {
            let cost = &m.operations[at].1;
            writeln!(
                out,
                "  {:>7}  {:>8}  {:>11}  {:>7.1}  {:>14}  {:>7.1}  {:>6.2}%  {:>12.0}  {:>11.0}",
                m.fan_out,
                cost.requests,
                cost.nodes_read,
                cost.bytes_read as f64 / 1e3,
                cost.nodes_written,
                cost.bytes_written as f64 / 1e3,
                cost.tree_share(options) * 100.0,
                cost.processor_us,
                cost.modelled_us(options)
            )?;
        }
    }
    Ok(())
}
