//! Scrub over real nodes.

use blobcr_proto::Hash;
use blobcr_proto::v1::ScrubProgress;
use blobcr_steward::{Scrub, ScrubError, ScrubOptions, scrub};

use crate::fixture::{Fixture, disk};

async fn scrub_all(fixture: &Fixture) -> Result<Scrub, ScrubError> {
    let begin = ScrubProgress::default();
    scrub(&fixture.repository(), ScrubOptions::default(), begin, &|_| ()).await
}

#[tokio::test]
async fn a_missing_replica_is_copied_again_and_a_lost_one_is_left_alone() {
    let fixture = Fixture::new(3, "replica:2").await;
    fixture.import("image", &disk(b"abcdefgh\0klmnopq")).await;
    let whole = fixture.held();
    let found = scrub_all(&fixture).await.unwrap();
    let copies: usize = whole.iter().map(std::collections::BTreeSet::len).sum();
    assert_eq!(found.nodes.iter().map(|node| node.found.records).sum::<u64>(), copies as u64);
    assert_eq!(found.nodes.iter().map(|node| node.found.mended).sum::<u64>(), 0);
    assert_eq!(fixture.held(), whole);

    // One node loses everything, its directory perhaps.
    fixture.lose(0, whole[0].iter().copied()).await;
    // And of one record no copy is left.
    let gone = *whole[1].difference(&whole[0]).next().unwrap();
    for node in 0..3 {
        fixture.lose(node, [gone]).await;
    }
    let found = scrub_all(&fixture).await.unwrap();
    assert_eq!(found.nodes[position(&fixture, &found)].found.missing, whole[0].len() as u64);
    let expected: Vec<_> = whole
        .iter()
        .map(|of_node| of_node.iter().copied().filter(|id| *id != gone).collect())
        .collect::<Vec<std::collections::BTreeSet<Hash>>>();
    assert_eq!(fixture.held(), expected);
}

/// Where the first store is in the result, which is in order of id.
fn position(fixture: &Fixture, found: &blobcr_steward::Scrub) -> usize {
    let id = fixture.stores[0].node_id();
    found.nodes.iter().position(|node| node.node == id).unwrap()
}

/// A shard that its node holds for right, and that does not fit the others; and one that is gone.
#[tokio::test]
async fn a_shard_that_lies_is_replaced() {
    let fixture = Fixture::new(6, "ec:4+2").await;
    fixture.import("image", &disk(b"abcdefgh")).await;
    let whole = fixture.all_shards();
    let (node, key) = *whole.iter().find(|(_, key)| key.shard == 2).unwrap();
    fixture.replace_shard(node, key).await;
    let (gone_at, gone) = *whole.iter().find(|(_, key)| key.shard == 5).unwrap();
    fixture.lose_shard(gone_at, gone).await;
    let found = scrub_all(&fixture).await.unwrap();
    let sum = |of: fn(&blobcr_steward::Tally) -> u64| -> u64 {
        found.nodes.iter().map(|node| of(&node.found)).sum()
    };
    assert_eq!((sum(|t| t.damaged), found.lost), (1, 0), "{found:?}");
    assert!(sum(|t| t.mended) >= 2);
    assert_eq!(fixture.all_shards(), whole);
    let again = scrub_all(&fixture).await.unwrap();
    assert_eq!(again.nodes.iter().map(|node| node.found.mended).sum::<u64>(), 0);
    assert!(fixture.read("image", 1).await == disk(b"abcdefgh"));
}
