//! Gives up the checkpoint sets that a group keeps no longer.

use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::{CatalogError, Repository};

/// From one look at the groups to the next: jobs checkpoint every few minutes, and a look is one
/// call where there is nothing to do.
pub(crate) const RETIRE_EVERY: Duration = Duration::from_secs(15);
/// Groups in one answer.
const PAGE: u32 = 500;

/// What was given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retired {
    /// Sets.
    pub sets: u64,
    /// Snapshots that nothing else needed.
    pub snapshots: u64,
}

/// Has every group keep what its policy says. Dropping the future at any point does no harm.
///
/// # Errors
/// When the metadata service does not answer; what was not done is left to the next time.
pub async fn retire(repository: &Repository) -> Result<Retired, CatalogError> {
    let catalog = repository.catalog();
    let mut done = Retired::default();
    let mut after = String::new();
    loop {
        let request = v1::ListGroupsRequest { after: after.clone(), limit: PAGE };
        let page = catalog.list_groups(request).await?;
        for group in page.groups.iter().filter(|group| group.keep_sets > 0) {
            loop {
                let request = v1::RetireSetsRequest {
                    group: group.name.clone(),
                    ..v1::RetireSetsRequest::default()
                };
                let retired = catalog.retire_sets(request).await?;
                done.sets += retired.sets.len() as u64;
                done.snapshots += retired.snapshots_removed;
                if retired.sets.is_empty() {
                    break;
                }
            }
        }
        match page.groups.last() {
            Some(last) if page.more => after.clone_from(&last.name),
            _ => return Ok(done),
        }
    }
}
