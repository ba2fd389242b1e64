//! `blobcr gc`: what nothing needs goes.

use blobcr_repository::Repository;
use blobcr_steward::{CollectOptions, NodeCollection, collect};
use serde::Serialize;

use crate::exit::{Exit, Refusal};
use crate::output::{Column, Output, or_dash, table};
use crate::progress::Progress;
use crate::session::Session;
use crate::size::human_size;

#[derive(Debug, Serialize)]
struct GcView {
    dry_run: bool,
    /// Records touched in this generation or later were spared.
    bound_generation: u64,
    roots: u64,
    passes: u64,
    records: u64,
    bytes: u64,
    nodes: Vec<GcNodeView>,
}

#[derive(Debug, Serialize)]
struct GcNodeView {
    node: String,
    address: String,
    examined: u64,
    chunks: u64,
    tree_nodes: u64,
    bytes: u64,
    /// Of those, what has moved to other nodes.
    misplaced: u64,
    /// Unreachable, but perhaps needed by a writer.
    spared: u64,
    error: Option<String>,
}

impl From<NodeCollection> for GcNodeView {
    fn from(of: NodeCollection) -> Self {
        let NodeCollection { node, address, examined, chunks, tree_nodes, bytes, .. } = of;
        let NodeCollection { misplaced, spared, failed, .. } = of;
        let error = failed.map(|error| error.to_string());
        Self { node, address, examined, chunks, tree_nodes, bytes, misplaced, spared, error }
    }
}

/// Runs the verb.
///
/// # Errors
/// When the repository does not answer, a live snapshot cannot be read, or a node was left out.
pub async fn run(session: &Session, dry_run: bool, output: Output) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    let view = gather(&repository, dry_run).await?;
    output.data(&view, human)?;
    match view.nodes.iter().find_map(|node| node.error.as_ref()) {
        None => Ok(()),
        Some(error) => {
            let message = format!("not all nodes were swept: {error}; run it again later");
            Err(Refusal::new(Exit::Unavailable, message).into())
        }
    }
}

async fn gather(repository: &Repository, dry_run: bool) -> anyhow::Result<GcView> {
    let progress = Progress::spinner("collecting");
    let options = CollectOptions { dry_run, ..CollectOptions::default() };
    let done = progress.during(collect(repository, options)).await?;
    Ok(GcView {
        dry_run,
        bound_generation: done.bound,
        roots: done.roots,
        passes: done.passes,
        records: done.records(),
        bytes: done.bytes(),
        nodes: done.nodes.into_iter().map(GcNodeView::from).collect(),
    })
}

fn human(view: &GcView) -> String {
    let columns = [
        Column::Text("NODE"),
        Column::Text("ADDRESS"),
        Column::Number("EXAMINED"),
        Column::Number("CHUNKS"),
        Column::Number("TREE NODES"),
        Column::Number("BYTES"),
        Column::Number("MOVED"),
        Column::Number("SPARED"),
        Column::Text("ERROR"),
    ];
    let row = |node: &GcNodeView| {
        vec![
            node.node.clone(),
            node.address.clone(),
            node.examined.to_string(),
            node.chunks.to_string(),
            node.tree_nodes.to_string(),
            human_size(node.bytes),
            node.misplaced.to_string(),
            node.spared.to_string(),
            or_dash(node.error.clone()),
        ]
    };
    let verb = if view.dry_run { "would go" } else { "are gone" };
    let records = view.records;
    let bytes = human_size(view.bytes);
    let nodes = table(&columns, view.nodes.iter().map(row));
    format!("{records} records of {bytes} {verb}; {} snapshots stay\n{nodes}", view.roots)
}
