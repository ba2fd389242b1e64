//! `blobcr snapshot pin`, `unpin`, `pins`: who needs which snapshot.

use blobcr_proto::{ImageSpec, v1};
use blobcr_repository::{CatalogError, Repository};

use super::snapshot_ref;
use crate::output::{Column, Output, or_dash, table};
use crate::view::PinView;

pub(super) async fn add(
    repository: &Repository,
    snapshot: &ImageSpec,
    holder: String,
    output: Output,
) -> anyhow::Result<()> {
    let request = v1::PinSnapshotRequest { snapshot: Some(snapshot_ref(snapshot)), holder };
    let pin = repository.catalog().pin_snapshot(request).await?;
    output.data(&PinView::from(pin), |pin| format!("{}@{} is pinned\n", pin.image, pin.snapshot))
}

/// What is pinned no more, at least not by this holder.
#[derive(Debug, serde::Serialize)]
struct UnpinnedView {
    image: String,
    snapshot: u64,
    holder: String,
    state: &'static str,
}

pub(super) async fn remove(
    repository: &Repository,
    snapshot: &ImageSpec,
    holder: String,
    output: Output,
) -> anyhow::Result<()> {
    let found = repository.catalog().get_snapshot(snapshot_ref(snapshot)).await?;
    let v1::Snapshot { image_id, image, number, .. } = found;
    let request = v1::UnpinSnapshotRequest { image_id, number, holder: holder.clone() };
    repository.catalog().unpin_snapshot(request).await?;
    let view = UnpinnedView { image, snapshot: number, holder, state: "unpinned" };
    output.data(&view, |_| String::new())
}

/// Every pin of the repository.
pub(super) async fn all(repository: &Repository) -> Result<Vec<v1::Pin>, CatalogError> {
    let mut pins = Vec::new();
    let mut after = None;
    loop {
        let request = v1::ListPinsRequest { after, ..v1::ListPinsRequest::default() };
        let page = repository.catalog().list_pins(request).await?;
        pins.extend(page.pins);
        after = page.next;
        if after.is_none() {
            return Ok(pins);
        }
    }
}

pub(super) async fn list(repository: &Repository, output: Output) -> anyhow::Result<()> {
    let views: Vec<PinView> = all(repository).await?.into_iter().map(PinView::from).collect();
    output.data(&views, |views| {
        let columns = [Column::Text("SNAPSHOT"), Column::Text("HOLDER"), Column::Text("SINCE")];
        let row = |view: &PinView| {
            let snapshot = format!("{}@{}", view.image, view.snapshot);
            vec![snapshot, view.holder.clone(), or_dash(view.created_at.clone())]
        };
        table(&columns, views.iter().map(row))
    })
}
