//! What a repair that cannot see all nodes may take for granted.

use std::collections::BTreeSet;

use blobcr_proto::policy::Policy;
use blobcr_proto::v1::{self, RecordKind};

/// Whether every object that was acknowledged is whole on the nodes that answered, of all that have
/// held the partition. An object that nobody is owed for is on every node of its row. One that is
/// owed for is on as many as a write needs at least, and lacks at most on those that the debt names.
pub(super) fn is_visible(
    policy: Policy,
    silent: &BTreeSet<String>,
    debt: Option<&v1::Debt>,
) -> bool {
    let kinds = [RecordKind::Chunk, RecordKind::TreeNode].map(|kind| policy.of(kind));
    kinds.iter().all(|policy| {
        let needed = match policy {
            Policy::Replica(_) => 1,
            Policy::Erasure { data, .. } => usize::from(*data),
        };
        let whole = policy.nodes().saturating_sub(silent.len());
        let Some(debt) = debt else { return whole >= needed };
        let least = policy.write_least().saturating_sub(silent.len());
        let named = !debt.missed_nodes.is_empty();
        let without = silent.iter().chain(&debt.missed_nodes).collect::<BTreeSet<_>>().len();
        let beside = policy.nodes().saturating_sub(without);
        least >= needed || (named && beside >= needed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn owes(missed: &[&str]) -> Option<v1::Debt> {
        let missed_nodes = missed.iter().map(|id| (*id).to_owned()).collect();
        Some(v1::Debt { objects: 1, missed_nodes, ..v1::Debt::default() })
    }

    #[test]
    fn what_cannot_be_seen_is_not_given_up() {
        let two = "replica:2".parse().unwrap();
        let three = "replica:3".parse().unwrap();
        let shards = "ec:4+2".parse().unwrap();
        for (policy, silent, debt, visible) in [
            (two, &["a"][..], None, true),
            (two, &["a", "b"], None, false),
            // It was away while others wrote, and is lost: the others have everything.
            (two, &["a"], owes(&["a"]), true),
            // The others were away: what was written then may be on the lost ones alone.
            (three, &["a", "b"], owes(&["c"]), false),
            (three, &["a"], owes(&["c"]), true),
            (three, &["a"], owes(&[]), true),
            (three, &["a", "b"], owes(&[]), false),
            (three, &["a", "b"], owes(&["a", "b"]), true),
            (shards, &["a", "b"], None, true),
            (shards, &["a", "b", "c"], None, false),
            (shards, &["a"], owes(&["b"]), true),
            (shards, &["a", "b"], owes(&["a"]), true),
            (shards, &["a", "b"], owes(&["c"]), false),
            (shards, &[], owes(&[]), true),
        ] {
            assert_eq!(
                is_visible(policy, &nodes(silent), debt.as_ref()),
                visible,
                "{policy} {silent:?}"
            );
        }
    }
}
