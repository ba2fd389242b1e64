//! A swap as one transaction of etcd.

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, GetResponse, Txn, TxnOp, TxnOpResponse, TxnResponse,
};

use super::marker::Marker;
use super::members::{Members, Repeat};
use super::{Area, revision, version};
use crate::store::{Action, Expect, Op, StoreError, Swap, Version};

/// A revision that no key ever has.
const NEVER: i64 = -1;
/// The `mod_revision` of a key that has no value.
const ABSENT: i64 = 0;

/// The revision that a key must have, when one is expected.
fn expected(op: &Op) -> Option<i64> {
    match op.expect {
        Expect::Any => None,
        Expect::Absent => Some(ABSENT),
        Expect::Version(Version(ours)) => {
            Some(i64::try_from(ours).ok().filter(|ours| *ours > ABSENT).unwrap_or(NEVER))
        }
    }
}

/// Whether it cannot happen twice: it changes a key whose version it expects.
fn happens_once(swap: &Swap) -> bool {
    swap.ops()
        .iter()
        .any(|op| matches!(op.expect, Expect::Version(_)) && !matches!(op.action, Action::Keep))
}

fn keys_only() -> Option<GetOptions> {
    Some(GetOptions::new().with_keys_only())
}

/// Reads of one key each: first the marker, then every key from which something is expected. They
/// tell why a transaction was refused.
fn reads(area: &Area, swap: &Swap) -> Vec<TxnOp> {
    let keys = swap.ops().iter().filter(|op| expected(op).is_some());
    std::iter::once(area.marker())
        .chain(keys.map(|op| area.outer(op.key.as_slice())))
        .map(|key| TxnOp::get(key, keys_only()))
        .collect()
}

fn transaction(area: &Area, marker: &Marker, swap: &Swap) -> Txn {
    let is = |key: Vec<u8>, revision| Compare::mod_revision(key, CompareOp::Equal, revision);
    let mut when = vec![is(area.marker(), marker.revision)];
    let mut then = Vec::new();
    for op in swap.ops() {
        let key = area.outer(op.key.as_slice());
        when.extend(expected(op).map(|revision| is(key.clone(), revision)));
        match &op.action {
            Action::Keep => {}
            Action::Put(value) => then.push(TxnOp::put(key, value.to_vec(), None)),
            Action::Delete => then.push(TxnOp::delete(key, None)),
        }
    }
    if then.is_empty() {
        // Without a read that must be linearizable, etcd would answer from what the member has.
        then.push(TxnOp::get(area.marker(), keys_only()));
    }
    Txn::new().when(when).and_then(then).or_else(reads(area, swap))
}

/// The revision of the only key of a read.
fn seen(read: &GetResponse) -> i64 {
    read.kvs().first().map_or(ABSENT, etcd_client::KeyValue::mod_revision)
}

/// Why a transaction was refused.
fn refusal(marker: &Marker, swap: &Swap, answer: &TxnResponse) -> StoreError {
    let mut seen = answer.op_responses().into_iter().map(|read| match read {
        TxnOpResponse::Get(read) => seen(&read),
        _ => NEVER,
    });
    if seen.next() != Some(marker.revision) {
        return marker.gone();
    }
    let expecting = swap.ops().iter().filter_map(|op| Some((op, expected(op)?)));
    let lost = expecting.zip(seen).find(|((_, expected), seen)| expected != seen);
    match lost {
        Some(((op, _), _)) => StoreError::Conflict { key: op.key.clone() },
        None => StoreError::Damaged {
            detail: "etcd refused a transaction whose expectations all hold".to_owned(),
        },
    }
}

pub(super) async fn run(
    members: &Members,
    area: &Area,
    marker: &Marker,
    swap: &Swap,
) -> Result<Version, StoreError> {
    let repeat = if happens_once(swap) { Repeat::Safe } else { Repeat::Unsafe };
    let transaction = transaction(area, marker, swap);
    let ask = |mut client: Client| {
        let transaction = transaction.clone();
        async move { client.txn(transaction).await }
    };
    let answer = members.ask(repeat, ask).await?;
    if answer.value.succeeded() {
        return Ok(version(revision(answer.value.header())?));
    }
    match refusal(marker, swap, &answer.value) {
        StoreError::Conflict { key } if answer.in_doubt => Err(StoreError::Unavailable {
            detail: format!(
                "the answer about a change of key {key:?} was lost, and the key has changed since"
            ),
        }),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Key;

    fn key(name: &str) -> Key {
        Key::new(name.to_owned())
    }

    #[test]
    fn only_a_swap_that_uses_up_a_version_is_repeated() {
        let version = Expect::Version(Version(7));
        let once = [
            Swap::new().put(key("a"), Expect::Absent, "1").put(key("b"), version, "2"),
            Swap::new().delete(key("a"), version),
        ];
        assert!(once.iter().all(happens_once));
        let perhaps_twice = [
            Swap::new().put(key("a"), Expect::Any, "1"),
            // It may be deleted before a first attempt that is late.
            Swap::new().put(key("a"), Expect::Absent, "1"),
            Swap::new().keep(key("a"), version).put(key("b"), Expect::Any, "1"),
        ];
        assert!(!perhaps_twice.iter().any(happens_once));
    }

    #[test]
    fn a_version_that_etcd_never_gives_is_never_met() {
        let of = |version| {
            let swap = Swap::new().keep(key("a"), Expect::Version(Version(version)));
            swap.ops().first().and_then(expected)
        };
        // Zero is how etcd calls a key that has no value.
        assert_eq!((of(0), of(u64::MAX), of(5)), (Some(NEVER), Some(NEVER), Some(5)));
    }
}
