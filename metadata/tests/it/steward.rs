//! Which steward works.

use blobcr_proto::v1;

use crate::fixture::{Fixture, Kind, manager, refused};
use crate::flaky::flaky;

fn beat(holder: &str) -> v1::LeadStewardRequest {
    v1::LeadStewardRequest { holder: holder.to_owned(), ..Default::default() }
}

#[tokio::test]
async fn one_leads_as_long_as_it_is_heard_of_and_the_next_goes_on_where_it_was() {
    let f = Fixture::new().await;
    let lead = |r: v1::LeadStewardRequest| f.manager.lead_steward(r);
    let nobody = f.manager.get_steward(v1::GetStewardRequest {}).await.unwrap();
    assert_eq!(nobody, v1::Steward::default());
    assert_eq!(lead(beat("a")).await.unwrap().holder, "a");
    let scrub = v1::ScrubProgress { pool: 1, partition: 7, ..Default::default() };
    let repair = v1::RepairProgress { partitions_total: 3, ..Default::default() };
    let told =
        v1::LeadStewardRequest { repair: Some(repair.clone()), scrub: Some(scrub), ..beat("a") };
    lead(told).await.unwrap();
    f.clock.advance_ms(14_000);
    let other = lead(beat("b")).await.unwrap();
    assert_eq!((other.holder.as_str(), other.alive), ("a", true));
    lead(beat("a")).await.unwrap();
    f.clock.advance_ms(14_000);
    let other = lead(beat("b")).await.unwrap();
    assert_eq!(other.holder, "a", "it was heard of since");
    f.clock.advance_ms(1_000);
    let shown = f.manager.get_steward(v1::GetStewardRequest {}).await.unwrap();
    assert!(!shown.alive, "it is late");
    let next = lead(beat("b")).await.unwrap();
    assert_eq!((next.holder.as_str(), next.alive, next.scrub), ("b", true, Some(scrub)));
    assert_eq!(next.repair, None);
    assert_eq!(lead(beat("a")).await.unwrap().holder, "b");
    // Who resigns is followed at once, and nobody resigns for another.
    let resign = |holder| v1::LeadStewardRequest { resign: true, ..beat(holder) };
    assert_eq!(lead(resign("a")).await.unwrap().holder, "b");
    lead(resign("b")).await.unwrap();
    assert_eq!(lead(beat("a")).await.unwrap().holder, "a");
    refused(lead(beat("")).await, Kind::Invalid, &["name"]);
}

#[tokio::test]
async fn of_two_that_ask_at_the_same_time_one_leads() {
    let f = Fixture::new().await;
    let store = flaky(&f.store);
    let slow = manager(&store.as_store(), &f.clock, 7);
    let other = std::sync::Arc::clone(&f.manager);
    store.before_next_swap(async move {
        other.lead_steward(beat("a")).await.unwrap();
    });
    assert_eq!(slow.lead_steward(beat("b")).await.unwrap().holder, "a");
}
