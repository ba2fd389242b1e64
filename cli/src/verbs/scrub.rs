//! `blobcr scrub`: reads every copy, and mends what is damaged or missing.

use blobcr_proto::v1::ScrubProgress;
use blobcr_steward::{NodeScrub, ScrubOptions, Tally};
use serde::Serialize;

use crate::exit::{Exit, Refusal};
use crate::output::{Column, Output, or_dash, table};
use crate::progress::Progress;
use crate::session::Session;
use crate::size::human_size;

#[derive(Debug, Serialize)]
struct ScrubView {
    lost: u64,
    /// The first of those.
    lost_ids: Vec<String>,
    skipped_pools: Vec<String>,
    nodes: Vec<ScrubNodeView>,
}

#[derive(Debug, Serialize)]
struct ScrubNodeView {
    node: String,
    address: String,
    records: u64,
    bytes: u64,
    damaged: u64,
    missing: u64,
    mended: u64,
    error: Option<String>,
}

impl From<NodeScrub> for ScrubNodeView {
    fn from(of: NodeScrub) -> Self {
        let NodeScrub { node, address, found, failed } = of;
        let Tally { records, bytes, damaged, missing, mended, .. } = found;
        let error = failed.map(|error| error.to_string());
        Self { node, address, records, bytes, damaged, missing, mended, error }
    }
}

/// Runs the verb.
///
/// # Errors
/// When something is lost, the metadata service does not answer, or a node was left out.
pub async fn run(session: &Session, options: ScrubOptions, output: Output) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    let progress = Progress::spinner("scrubbing");
    let scrub = blobcr_steward::scrub(&repository, options, ScrubProgress::default(), &|_| ());
    let done = progress.during(scrub).await?;
    let view = ScrubView {
        lost: done.lost,
        lost_ids: done.lost_ids.iter().map(ToString::to_string).collect(),
        skipped_pools: done.skipped_pools,
        nodes: done.nodes.into_iter().map(ScrubNodeView::from).collect(),
    };
    output.data(&view, human)?;
    if view.lost > 0 {
        let message = format!(
            "no good copy was found of {} records; `blobcr snapshot verify` tells which \
             snapshots they belong to",
            view.lost
        );
        return Err(Refusal::new(Exit::Integrity, message).into());
    }
    match view.nodes.iter().find_map(|node| node.error.as_ref()) {
        None => Ok(()),
        Some(error) => {
            let message = format!("not all nodes were scrubbed: {error}; run it again later");
            Err(Refusal::new(Exit::Unavailable, message).into())
        }
    }
}

fn human(view: &ScrubView) -> String {
    let columns = [
        Column::Text("NODE"),
        Column::Text("ADDRESS"),
        Column::Number("COPIES"),
        Column::Number("BYTES"),
        Column::Number("DAMAGED"),
        Column::Number("MISSING"),
        Column::Number("MENDED"),
        Column::Text("ERROR"),
    ];
    let row = |node: &ScrubNodeView| {
        vec![
            node.node.clone(),
            node.address.clone(),
            node.records.to_string(),
            human_size(node.bytes),
            node.damaged.to_string(),
            node.missing.to_string(),
            node.mended.to_string(),
            or_dash(node.error.clone()),
        ]
    };
    let mut text = table(&columns, view.nodes.iter().map(row));
    for pool in &view.skipped_pools {
        text += &format!("pool {pool} was left out: it has no nodes yet\n");
    }
    for id in &view.lost_ids {
        text += &format!("no good copy of {id}\n");
    }
    text
}
