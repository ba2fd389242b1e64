//! `blobcr pool`: sets of nodes with one redundancy policy.

use blobcr_proto::v1;

use crate::args::PoolCommand;
use crate::output::{Column, Output, table};
use crate::session::Session;
use crate::view::PoolView;

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: PoolCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    let catalog = repository.catalog();
    match command {
        PoolCommand::Create { pool, policy, compression } => {
            let request = v1::CreatePoolRequest { name: pool.into(), policy, compression };
            let made = catalog.create_pool(request).await?;
            output.data(&PoolView::from(made), |view| format!("{}\n", view.pool))
        }
        PoolCommand::List => {
            let pools = catalog.list_pools(v1::ListPoolsRequest {}).await?.pools;
            let views: Vec<_> = pools.into_iter().map(PoolView::from).collect();
            output.data(&views, |views| pool_table(views))
        }
    }
}

/// Pools as a table.
pub(super) fn pool_table(views: &[PoolView]) -> String {
    let columns = [
        Column::Text("POOL"),
        Column::Text("POLICY"),
        Column::Text("COMPRESSION"),
        Column::Number("PARTITIONS"),
    ];
    table(
        &columns,
        views.iter().map(|view| {
            vec![
                view.pool.clone(),
                view.policy.clone(),
                view.compression.clone(),
                view.partitions.to_string(),
            ]
        }),
    )
}
