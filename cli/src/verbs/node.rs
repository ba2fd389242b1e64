//! `blobcr node`: the repository nodes.

use std::time::Duration;

use blobcr_proto::v1;
use blobcr_proto::v1::record_store_client::RecordStoreClient;
use blobcr_repository::Repository;
use futures::{StreamExt, stream};

use crate::args::NodeCommand;
use crate::channel::{lazy, within};
use crate::output::{Column, Output, or_dash, table};
use crate::session::Session;
use crate::size::human_size;
use crate::view::NodeView;

/// A node answers this from memory; one that takes longer is as good as down.
const STATUS_DEADLINE: Duration = Duration::from_secs(3);
/// Nodes asked at once.
const ASKED_AT_ONCE: usize = 32;

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: NodeCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    let node = match command {
        NodeCommand::List => {
            return output.data(&views(&repository).await?, |views| node_table(views));
        }
        NodeCommand::Drain { node, cancel } => {
            repository.catalog().drain_node(v1::DrainNodeRequest { id: node, cancel }).await?
        }
        NodeCommand::Remove { node } => {
            repository.catalog().remove_node(v1::RemoveNodeRequest { id: node }).await?
        }
    };
    let status = status(&node).await;
    let view = NodeView::new(node, status);
    output.data(&view, |view| node_table(std::slice::from_ref(view)))
}

/// Every registered node, and what it says of itself.
pub(super) async fn views(repository: &Repository) -> anyhow::Result<Vec<NodeView>> {
    let nodes = repository.catalog().list_nodes(v1::ListNodesRequest {}).await?.nodes;
    let views = stream::iter(nodes).map(|node| async {
        let status = status(&node).await;
        NodeView::new(node, status)
    });
    Ok(views.buffered(ASKED_AT_ONCE).collect().await)
}

/// `None` when the node does not answer, or another one answers at its address.
async fn status(node: &v1::Node) -> Option<v1::NodeStatus> {
    let mut client = RecordStoreClient::new(lazy(&node.address).ok()?);
    let asked = client.status(within(STATUS_DEADLINE, v1::NodeStatusRequest {}));
    // A deadline on our side too: a host without power does not keep one.
    let status = tokio::time::timeout(STATUS_DEADLINE, asked).await.ok()?.ok()?.into_inner();
    (status.node_id == node.id).then_some(status)
}

/// Nodes as a table.
pub(super) fn node_table(views: &[NodeView]) -> String {
    let columns = [
        Column::Text("NODE"),
        Column::Text("ADDRESS"),
        Column::Text("DOMAIN"),
        Column::Text("STATE"),
        Column::Text("HEALTH"),
        Column::Number("FREE"),
        Column::Number("LIVE"),
        Column::Number("RECORDS"),
        Column::Number("DAMAGED"),
    ];
    table(
        &columns,
        views.iter().map(|view| {
            vec![
                view.node.clone(),
                view.address.clone(),
                view.domain.clone(),
                view.state.to_owned(),
                view.health.to_owned(),
                or_dash(view.free_bytes.map(human_size)),
                or_dash(view.live_bytes.map(human_size)),
                or_dash(view.records),
                or_dash(view.damaged_records),
            ]
        }),
    )
}
