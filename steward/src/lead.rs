//! Which of several stewards works, and what it says of itself while it does.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repository::Catalog;
use tokio::sync::watch;
use tokio::time::sleep;

/// How often a steward says that it is there: several such messages are lost before another leads.
const BEAT: Duration = Duration::from_secs(4);

/// What a leader tells.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) repair: watch::Receiver<v1::RepairProgress>,
    /// Absent until it is known where the last scrub was.
    pub(crate) scrub: watch::Sender<Option<v1::ScrubProgress>>,
}

/// Takes part in the choice of a leader for ever, and says in `leads` whether it is this steward.
pub(crate) async fn take_part(
    catalog: Arc<dyn Catalog>,
    holder: String,
    told: &Told,
    leads: &watch::Sender<bool>,
) {
    loop {
        let request = v1::LeadStewardRequest {
            holder: holder.clone(),
            repair: Some(told.repair.borrow().clone()),
            scrub: *told.scrub.borrow(),
            resign: false,
        };
        match catalog.lead_steward(request).await {
            Ok(leader) if leader.holder == holder => {
                told.scrub.send_if_modified(|known| {
                    let unknown = known.is_none();
                    known.get_or_insert(leader.scrub.unwrap_or_default());
                    unknown
                });
                leads.send_if_modified(|leads| !std::mem::replace(leads, true));
            }
            Ok(_) => {
                // Whoever leads now moves on: what is known here grows old.
                told.scrub.send_replace(None);
                leads.send_if_modified(|leads| std::mem::replace(leads, false));
            }
            // To go on is safe, and another may not be able to ask either.
            Err(error) => tracing::debug!(%error, "the lead of the stewards is not known"),
        }
        sleep(BEAT).await;
    }
}

/// Lets another one lead at once.
pub(crate) async fn resign(catalog: &dyn Catalog, holder: String) {
    let request = v1::LeadStewardRequest { holder, resign: true, ..Default::default() };
    if let Err(error) = catalog.lead_steward(request).await {
        tracing::debug!(%error, "another steward leads when this one was not heard of for a while");
    }
}
