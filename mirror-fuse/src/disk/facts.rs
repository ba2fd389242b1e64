//! The volatile facts of a disk: what every COMMIT changes.
//!
//! They live in two slots in the head of the mapped map file, written by turns, so a COMMIT costs
//! a few stores to memory and no system call, and they survive the death of the daemon like the
//! rest of the page cache. They count only in the boot that they name, or after a clean stop;
//! after a host crash everything they tell is either rebuilt or given up.

use blobcr_proto::Hash;
use blobcr_proto::v1::TreeRoot;

use super::KEY_BYTES_MAX;
use super::frame::{self, COUNTER_MAX, Kind};

/// Bytes of a boot id at most: the kernel's have 36.
const BOOT_ID_BYTES_MAX: usize = 64;

/// Versions: 1, the first.
const KIND: Kind = Kind { magic: *b"BCDF", version: 1 };

/// A snapshot that is being persisted: the chunks whose mark is in `first..=last`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Pending {
    #[prost(uint64, tag = "1")]
    pub(super) number: u64,
    /// The oldest epoch whose changes it holds.
    #[prost(uint64, tag = "2")]
    pub(super) first: u64,
    /// The epoch that its COMMIT ended.
    #[prost(uint64, tag = "3")]
    pub(super) last: u64,
}

impl Pending {
    /// Whether a chunk with this mark was last changed for this snapshot.
    pub(super) const fn covers(&self, epoch: u64) -> bool {
        self.first <= epoch && epoch <= self.last
    }
}

/// The answer to the COMMIT that had an idempotency key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Answer {
    #[prost(string, tag = "1")]
    pub(super) key: String,
    #[prost(uint64, tag = "2")]
    pub(super) number: u64,
    #[prost(uint64, tag = "3")]
    pub(super) dirty_bytes: u64,
    #[prost(uint64, tag = "4")]
    pub(super) downtime_ns: u64,
}

/// The facts.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Facts {
    #[prost(uint64, tag = "1")]
    pub(super) seq: u64,
    #[prost(string, tag = "2")]
    pub(super) boot_id: String,
    /// The current epoch: what is written now gets this mark.
    #[prost(uint64, tag = "3")]
    pub(super) epoch: u64,
    /// The oldest epoch whose changes are in no snapshot yet.
    #[prost(uint64, tag = "4")]
    pub(super) first: u64,
    /// The number that the next COMMIT hands out.
    #[prost(uint64, tag = "5")]
    pub(super) next_number: u64,
    /// Oldest first.
    #[prost(message, repeated, tag = "6")]
    pub(super) pending: Vec<Pending>,
    #[prost(uint64, tag = "7")]
    pub(super) last_stable: u64,
    /// The tree that the oldest snapshot not yet stable is a change of; absent: the source's.
    #[prost(message, optional, tag = "8")]
    pub(super) stable_root: Option<TreeRoot>,
    #[prost(message, optional, tag = "9")]
    pub(super) answer: Option<Answer>,
}

pub(super) fn encode(facts: &Facts) -> Vec<u8> {
    frame::encode(KIND, facts)
}

pub(super) fn decode(bytes: &[u8]) -> Result<Facts, String> {
    let facts: Facts = frame::decode(KIND, bytes)?;
    let ordered = facts.first <= facts.epoch
        && facts.pending.len() <= super::PENDING_MAX
        && facts.pending.iter().all(|pending| pending.first <= pending.last)
        && facts.pending.windows(2).all(|pair| pair[0].last < pair[1].first)
        && facts.pending.last().is_none_or(|newest| newest.last < facts.first);
    if !ordered {
        return Err("its epochs are out of order".into());
    }
    // They are written again, into a page, and counted on.
    let counters = [facts.seq, facts.epoch, facts.next_number];
    let bounded = counters.iter().all(|counter| *counter <= COUNTER_MAX)
        && facts.boot_id.len() <= BOOT_ID_BYTES_MAX
        && facts.answer.as_ref().is_none_or(|answer| answer.key.len() <= KEY_BYTES_MAX)
        && facts.stable_root.as_ref().is_none_or(|root| root.node.len() <= Hash::LEN);
    if bounded { Ok(facts) } else { Err("it holds more than any disk comes to".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_facts_of_version_1() {
        let facts = Facts {
            seq: 9,
            boot_id: "b".into(),
            epoch: 7,
            first: 7,
            next_number: 5,
            pending: vec![
                Pending { number: 3, first: 3, last: 5 },
                Pending { number: 4, first: 6, last: 6 },
            ],
            last_stable: 2,
            stable_root: Some(TreeRoot {
                size_bytes: 1 << 30,
                chunk_size: 64 << 10,
                fan_out: 2,
                node: vec![9; 32].into(),
            }),
            answer: Some(Answer {
                key: "k".into(),
                number: 4,
                dirty_bytes: 8192,
                downtime_ns: 1000,
            }),
        };
        let bytes = encode(&facts);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/facts-v1.hex").trim());
        assert_eq!(decode(&bytes), Ok(facts));
    }

    #[test]
    fn facts_that_cannot_be_written_again_are_refused() {
        let answer = |len| Some(Answer { key: "k".repeat(len), ..Answer::default() });
        let root = |len| Some(TreeRoot { node: vec![7; len].into(), ..TreeRoot::default() });
        let most = Facts {
            seq: COUNTER_MAX,
            epoch: COUNTER_MAX,
            next_number: COUNTER_MAX,
            boot_id: "b".repeat(BOOT_ID_BYTES_MAX),
            stable_root: root(Hash::LEN),
            answer: answer(KEY_BYTES_MAX),
            ..Facts::default()
        };
        assert_eq!(decode(&encode(&most)).as_ref(), Ok(&most));
        for bad in [
            Facts { seq: u64::MAX, ..most.clone() },
            Facts { epoch: u64::MAX, ..most.clone() },
            Facts { next_number: u64::MAX, ..most.clone() },
            Facts { boot_id: "b".repeat(4000), ..most.clone() },
            Facts { stable_root: root(4000), ..most.clone() },
            Facts { answer: answer(4000), ..most.clone() },
        ] {
            assert!(decode(&encode(&bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn epochs_out_of_order_are_refused() {
        let pending = |first, last| Pending { number: 1, first, last };
        let facts = |pending| Facts { epoch: 9, first: 8, pending, ..Facts::default() };
        assert!(decode(&encode(&facts(vec![pending(1, 3), pending(4, 7)]))).is_ok());
        for bad in [
            vec![pending(3, 1)],
            vec![pending(1, 4), pending(4, 7)],
            vec![pending(1, 8)],
            vec![pending(1, 1), pending(2, 2), pending(3, 3)],
        ] {
            assert!(decode(&encode(&facts(bad))).is_err());
        }
    }
}
