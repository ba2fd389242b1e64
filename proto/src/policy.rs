//! What a pool promises about its records: its redundancy and its compression.

use std::fmt;
use std::str::FromStr;

use crate::v1::RecordKind;

/// Copies at most: more than any failure of one site needs.
const REPLICAS_MAX: u8 = 8;
/// Data shards at most: wider stripes cost more reads to repair than they save space.
const DATA_SHARDS_MAX: u8 = 16;
/// Parity shards at most.
const PARITY_SHARDS_MAX: u8 = 8;

/// Nodes that one record is spread over at most, under any policy.
pub const POLICY_NODES_MAX: usize = (DATA_SHARDS_MAX + PARITY_SHARDS_MAX) as usize;

/// How many copies or shards of a record there are.
///
/// Tree nodes are kept by [`Self::of_tree_nodes`], whatever the policy of their pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// `replica:N`: N whole copies.
    Replica(u8),
    /// `ec:K+M`: K data and M parity shards.
    Erasure {
        /// K.
        data: u8,
        /// M.
        parity: u8,
    },
}

impl Policy {
    /// Nodes that one record needs.
    #[must_use]
    pub const fn nodes(self) -> usize {
        match self {
            Self::Replica(copies) => copies as usize,
            Self::Erasure { data, parity } => data as usize + parity as usize,
        }
    }

    /// Nodes that must hold a record before a write of it may be acknowledged. What the others
    /// lack is owed to the pool. Of the losses that the whole record survives, about half are
    /// still survived.
    #[must_use]
    pub const fn write_least(self) -> usize {
        match self {
            Self::Replica(copies) => (copies - (copies - 1) / 2) as usize,
            Self::Erasure { data, parity } => (data + parity.div_ceil(2)) as usize,
        }
    }

    /// How tree nodes are kept: as whole copies that survive as many losses. They are small, and
    /// reading one must not take several nodes.
    #[must_use]
    pub const fn of_tree_nodes(self) -> Self {
        match self {
            Self::Replica(copies) => Self::Replica(copies),
            Self::Erasure { parity, .. } => Self::Replica(parity + 1),
        }
    }

    /// How records of `kind` are kept.
    #[must_use]
    pub const fn of(self, kind: RecordKind) -> Self {
        match kind {
            RecordKind::TreeNode => self.of_tree_nodes(),
            RecordKind::Chunk | RecordKind::Unspecified => self,
        }
    }
}

/// A text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no pool policy; write replica:N (N from 1 to {REPLICAS_MAX}) or ec:K+M \
     (K from 2 to {DATA_SHARDS_MAX}, M from 1 to {PARITY_SHARDS_MAX})"
)]
pub struct PolicyError(pub String);

/// A decimal number without sign or leading zero.
fn number(text: &str, range: std::ops::RangeInclusive<u8>) -> Option<u8> {
    let number: u8 = text.parse().ok()?;
    (range.contains(&number) && number.to_string() == text).then_some(number)
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let parse = || {
            if let Some(copies) = text.strip_prefix("replica:") {
                return number(copies, 1..=REPLICAS_MAX).map(Self::Replica);
            }
            let (data, parity) = text.strip_prefix("ec:")?.split_once('+')?;
            Some(Self::Erasure {
                data: number(data, 2..=DATA_SHARDS_MAX)?,
                parity: number(parity, 1..=PARITY_SHARDS_MAX)?,
            })
        };
        parse().ok_or_else(|| PolicyError(text.to_owned()))
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replica(copies) => write!(f, "replica:{copies}"),
            Self::Erasure { data, parity } => write!(f, "ec:{data}+{parity}"),
        }
    }
}

/// Whether records are compressed before they are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Never.
    Off,
    /// With LZ4, when it saves enough.
    Lz4,
    /// With zstd, when it saves enough.
    Zstd,
    /// While it is quicker than to send the bytes plain.
    #[default]
    Adaptive,
}

/// A text that is no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no compression; write off, lz4, zstd or adaptive")]
pub struct CompressionError(pub String);

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, CompressionError> {
        match text {
            "off" => Ok(Self::Off),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            "adaptive" => Ok(Self::Adaptive),
            _ => Err(CompressionError(text.to_owned())),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Adaptive => "adaptive",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_read_back_as_they_are_written() {
        for text in ["replica:1", "replica:8", "ec:2+1", "ec:16+8"] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        assert_eq!("ec:4+2".parse::<Policy>().unwrap().nodes(), 6);
        for text in ["off", "lz4", "zstd", "adaptive"] {
            assert_eq!(text.parse::<Compression>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_degraded_write_still_survives_a_loss_where_two_were_promised() {
        for (text, least) in [
            ("replica:1", 1),
            ("replica:2", 2),
            ("replica:3", 2),
            ("replica:5", 3),
            ("ec:2+1", 3),
            ("ec:4+2", 5),
            ("ec:8+3", 10),
        ] {
            assert_eq!(text.parse::<Policy>().unwrap().write_least(), least, "{text}");
        }
        let nodes_of = |text: &str| text.parse::<Policy>().unwrap().of_tree_nodes().to_string();
        assert_eq!(nodes_of("ec:4+2"), "replica:3");
        assert_eq!(nodes_of("replica:2"), "replica:2");
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        for text in [
            "",
            "replica",
            "replica:",
            "replica:0",
            "replica:9",
            "replica:+1",
            "replica:01",
            "ec:4",
            "ec:1+1",
            "ec:4+0",
            "ec:17+1",
            "ec:4+9",
            "ec:4+2+1",
            "ec:300+1",
            "raid:1",
            "Replica:1",
        ] {
            assert!(text.parse::<Policy>().is_err(), "{text:?}");
        }
        assert!("gzip".parse::<Compression>().is_err());
    }
}
