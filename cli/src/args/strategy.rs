//! How a mirror keeps snapshots.

use blobcr_mirror_fuse::disk::Strategy;
use clap::ValueEnum;

/// How a snapshot is kept as it was while the guest writes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StrategyArg {
    /// Chunks that it still needs are copied before they are overwritten: recommended
    Selective,
    /// All its chunks are copied before they are overwritten; for comparison
    Cow,
    /// All its chunks are copied while writes wait; for comparison
    Precopy,
    /// It is persisted while writes wait; for comparison
    Offline,
}

impl From<StrategyArg> for Strategy {
    fn from(arg: StrategyArg) -> Self {
        match arg {
            StrategyArg::Selective => Self::Selective,
            StrategyArg::Cow => Self::Cow,
            StrategyArg::Precopy => Self::Precopy,
            StrategyArg::Offline => Self::Offline,
        }
    }
}
