//! `blobcr snapshot prune`: removes the snapshots that a policy does not keep.

use std::collections::HashSet;

use blobcr_proto::{ImageName, v1};
use blobcr_repository::{CatalogError, Repository};
use blobcr_steward::retention::decide;
use blobcr_steward::{Candidate, Policy};
use serde::Serialize;

use super::{image_ref, pins};
use crate::args::Keep;
use crate::exit::{Exit, Refusal};
use crate::output::{Column, Output, or_dash, table};
use crate::view::rfc3339;

/// Snapshots in one answer.
const PAGE: u32 = 500;

#[derive(Debug, Serialize)]
struct PruneView {
    image: String,
    snapshot: u64,
    stable_at: Option<String>,
    /// "kept", "removed", or "would be removed".
    action: &'static str,
    /// Why it is kept.
    reasons: Vec<String>,
}

/// Runs the verb.
///
/// # Errors
/// When the policy is empty, there is no such image, or the metadata service does not answer.
pub(super) async fn run(
    repository: &Repository,
    image: &ImageName,
    keep: &Keep,
    dry_run: bool,
    output: Output,
) -> anyhow::Result<()> {
    let policy = policy(keep);
    if policy.is_empty() {
        let message = "say what to keep, for example --keep-last 3 or --keep-daily 7";
        return Err(Refusal::new(Exit::Usage, message).into());
    }
    let found = repository.catalog().get_image(image_ref(image)).await?;
    let snapshots = candidates(repository, &found).await?;
    let mut views = Vec::new();
    for verdict in decide(&policy, &snapshots, found.latest) {
        let stable = snapshots.iter().find(|snapshot| snapshot.number == verdict.number);
        let mut view = PruneView {
            image: found.name.clone(),
            snapshot: verdict.number,
            stable_at: stable.and_then(|snapshot| rfc3339(snapshot.stable_unix_ms)),
            action: "kept",
            reasons: verdict.reasons.iter().map(|reason| reason.word().to_owned()).collect(),
        };
        if !verdict.is_kept() {
            view.action = if dry_run { "would be removed" } else { "removed" };
        }
        if !verdict.is_kept() && !dry_run {
            remove(repository, found.id, &mut view).await?;
        }
        views.push(view);
    }
    output.data(&views, |views| human(views))
}

fn policy(keep: &Keep) -> Policy {
    Policy {
        last: keep.keep_last,
        hourly: keep.keep_hourly,
        daily: keep.keep_daily,
        weekly: keep.keep_weekly,
        monthly: keep.keep_monthly,
        yearly: keep.keep_yearly,
    }
}

/// The stable snapshots of an image.
async fn candidates(
    repository: &Repository,
    image: &v1::Image,
) -> Result<Vec<Candidate>, CatalogError> {
    let pinned = pinned(repository, image.id).await?;
    let by_id = v1::ImageRef { id: image.id, name: String::new() };
    let mut found = Vec::new();
    let mut after_number = 0;
    loop {
        let request =
            v1::ListSnapshotsRequest { image: Some(by_id.clone()), after_number, limit: PAGE };
        let page = repository.catalog().list_snapshots(request).await?;
        let stable = page.snapshots.iter().filter(|s| s.state() == v1::SnapshotState::Stable);
        found.extend(stable.map(|snapshot| Candidate {
            number: snapshot.number,
            stable_unix_ms: snapshot.stable_unix_ms,
            pinned: pinned.contains(&snapshot.number),
        }));
        match page.snapshots.last() {
            Some(last) if page.more => after_number = last.number,
            _ => return Ok(found),
        }
    }
}

async fn pinned(repository: &Repository, image_id: u64) -> Result<HashSet<u64>, CatalogError> {
    let pins = pins::all(repository).await?;
    Ok(pins.iter().filter(|pin| pin.image_id == image_id).map(|pin| pin.number).collect())
}

async fn remove(
    repository: &Repository,
    image_id: u64,
    view: &mut PruneView,
) -> Result<(), CatalogError> {
    let image = Some(v1::ImageRef { id: image_id, name: String::new() });
    let request = v1::SnapshotRef { image, number: view.snapshot };
    match repository.catalog().remove_snapshot(request).await {
        // Pinned in this very moment.
        Err(CatalogError::Precondition(reason)) => {
            view.action = "kept";
            view.reasons.push(reason);
            Ok(())
        }
        done => done.map(|_| ()),
    }
}

fn human(views: &[PruneView]) -> String {
    let columns = [
        Column::Text("SNAPSHOT"),
        Column::Text("STABLE"),
        Column::Text("ACTION"),
        Column::Text("BECAUSE"),
    ];
    let row = |view: &PruneView| {
        vec![
            format!("{}@{}", view.image, view.snapshot),
            or_dash(view.stable_at.clone()),
            view.action.to_owned(),
            view.reasons.join(", "),
        ]
    };
    table(&columns, views.iter().map(row))
}
