//! What is owed to a pool's policy, until it is repaired.

use blobcr_metadata::records::{DebtRecord, KeyKind};
use blobcr_proto::v1;

use crate::fixture::{Fixture, Kind, START_MS, manager, refused};
use crate::flaky::flaky;

fn report(partitions: &[(u32, u64)]) -> v1::ReportDebtRequest {
    let debt = |&(partition, objects): &(u32, u64)| v1::PartitionDebt {
        partition,
        objects,
        missed_nodes: vec![node(0)],
    };
    v1::ReportDebtRequest { pool: 1, partitions: partitions.iter().map(debt).collect() }
}

fn node(n: usize) -> String {
    format!("{n:032x}")
}

async fn debts(f: &Fixture) -> Vec<v1::Debt> {
    let all = v1::ListDebtRequest { pool: 1, after: None, limit: 0 };
    f.manager.list_debt(all).await.unwrap().debts
}

async fn debts_left(f: &Fixture) -> Vec<u32> {
    debts(f).await.iter().map(|debt| debt.partition).collect()
}

async fn settle(f: &Fixture, debt: &v1::Debt) -> bool {
    let v1::Debt { pool, partition, revision, .. } = debt.clone();
    let debts = vec![v1::SettledDebt { partition, revision }];
    let r = v1::SettleDebtsRequest { pool, debts };
    f.manager.settle_debts(r).await.unwrap().kept.is_empty()
}

#[tokio::test]
async fn debt_adds_up_and_keeps_its_first_time() {
    let f = Fixture::new().await;
    f.manager.report_debt(report(&[(7, 2), (1023, 1), (7, 3)])).await.unwrap();
    f.clock.advance_ms(9);
    let before = debts(&f).await;
    f.manager.report_debt(report(&[(7, 10), (0, 4)])).await.unwrap();
    let after = debts(&f).await;
    let told = |debts: &[v1::Debt]| -> Vec<(u32, u64, u64)> {
        debts.iter().map(|d| (d.partition, d.objects, d.since_unix_ms - START_MS)).collect()
    };
    assert_eq!(told(&before), [(7, 5, 0), (1023, 1, 0)]);
    assert_eq!(told(&after), [(0, 4, 9), (7, 15, 0), (1023, 1, 0)]);
    assert!(after[1].revision > before[0].revision);
    assert_eq!(after[2].revision, before[1].revision, "nothing was reported of it");
    // In pages, and after a restart.
    let page = |after, limit| v1::ListDebtRequest { pool: 1, after, limit };
    let f = f.restarted();
    let first = f.manager.list_debt(page(None, 2)).await.unwrap();
    assert_eq!((first.debts.as_slice(), first.more), (&after[..2], true));
    let last = f.manager.list_debt(page(Some(7), 2)).await.unwrap();
    assert_eq!((last.debts.as_slice(), last.more), (&after[2..], false));
}

#[tokio::test]
async fn only_what_was_repaired_is_settled() {
    let f = Fixture::new().await;
    f.manager.report_debt(report(&[(1, 1), (2, 1)])).await.unwrap();
    let seen = debts(&f).await;
    f.manager.report_debt(report(&[(1, 1)])).await.unwrap();
    assert!(!settle(&f, &seen[0]).await, "more was reported meanwhile");
    assert!(settle(&f, &seen[1]).await);
    assert!(settle(&f, &seen[1]).await, "again");
    let left = debts(&f).await;
    assert_eq!((left.len(), left[0].objects), (1, 2));
    assert!(settle(&f, &left[0]).await);
    assert_eq!(debts(&f).await, []);
    // A debt that came again is another one.
    f.manager.report_debt(report(&[(1, 1)])).await.unwrap();
    assert!(!settle(&f, &seen[0]).await && !settle(&f, &left[0]).await);
}

#[tokio::test]
async fn a_whole_pool_can_owe_and_more_is_refused() {
    let f = Fixture::new().await;
    let all: Vec<(u32, u64)> = (0..1024).map(|partition| (partition, 1)).collect();
    f.manager.report_debt(report(&all)).await.unwrap();
    f.manager.report_debt(report(&[(0, u64::MAX)])).await.unwrap();
    let records: Vec<DebtRecord> = f.records(KeyKind::Debt).await;
    assert_eq!((records.len(), records[0].objects), (1024, u64::MAX));
    refused(f.manager.report_debt(report(&[(1024, 1)])).await, Kind::Invalid, &["1024"]);
    refused(f.manager.report_debt(report(&[(0, 0)])).await, Kind::Invalid, &["1 object"]);
    let none = v1::ReportDebtRequest { pool: 9, ..report(&[(0, 1)]) };
    refused(f.manager.report_debt(none).await, Kind::NotFound, &["9"]);
    f.manager.report_debt(report(&[])).await.unwrap();
}

#[tokio::test]
async fn no_report_is_lost_in_a_race() {
    let f = Fixture::new().await;
    f.manager.report_debt(report(&[(3, 1)])).await.unwrap();
    let seen = debts(&f).await;
    let store = flaky(&f.store);
    let slow = manager(&store.as_store(), &f.clock, 7);
    // One report before another.
    let other = std::sync::Arc::clone(&f.manager);
    store.before_next_swap(async move {
        other.report_debt(report(&[(3, 10), (4, 1)])).await.unwrap();
    });
    slow.report_debt(report(&[(3, 100), (4, 100)])).await.unwrap();
    let now = debts(&f).await;
    assert_eq!((now[0].objects, now[1].objects), (111, 101));
    // One report before a settlement that has seen the debt.
    let other = std::sync::Arc::clone(&f.manager);
    store.before_next_swap(async move {
        other.report_debt(report(&[(3, 1)])).await.unwrap();
    });
    let v1::Debt { pool, partition, revision, .. } = now[0].clone();
    // With others at the same time, which are settled all the same.
    let settled = [&now[0], &now[1]].map(|debt| {
        let v1::Debt { partition, revision, .. } = *debt;
        v1::SettledDebt { partition, revision }
    });
    let r = v1::SettleDebtsRequest { pool, debts: settled.to_vec() };
    assert_eq!(slow.settle_debts(r).await.unwrap().kept, [partition]);
    assert_eq!(debts_left(&f).await, [partition]);
    assert_eq!(debts(&f).await[0].objects, 112);
    assert!(revision > seen[0].revision);
}

#[tokio::test]
async fn a_debt_names_who_missed_it_or_says_that_any_may_have() {
    let f = Fixture::new().await;
    let missed = |nodes: std::ops::Range<usize>| v1::ReportDebtRequest {
        pool: 1,
        partitions: vec![v1::PartitionDebt {
            partition: 5,
            objects: 1,
            missed_nodes: nodes.map(node).collect(),
        }],
    };
    f.manager.report_debt(missed(2..3)).await.unwrap();
    f.manager.report_debt(missed(1..3)).await.unwrap();
    let named = debts(&f).await;
    assert_eq!(named[0].missed_nodes, [node(1), node(2)]);
    // Too many to name.
    f.manager.report_debt(missed(0..49)).await.unwrap();
    assert!(debts(&f).await[0].missed_nodes.is_empty());
    f.manager.report_debt(missed(1..2)).await.unwrap();
    let unknown = debts(&f).await;
    assert_eq!((unknown[0].objects, unknown[0].missed_nodes.len()), (4, 0));
    let bad = v1::PartitionDebt { partition: 1, objects: 1, missed_nodes: vec!["a/b".into()] };
    let bad = v1::ReportDebtRequest { pool: 1, partitions: vec![bad] };
    refused(f.manager.report_debt(bad).await, Kind::Invalid, &["letters, digits"]);
}
