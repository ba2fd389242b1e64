//! What a mirror fetches before it is asked for.

use blobcr_mirror_fuse::prefetch::Prefetch;
use clap::ValueEnum;

/// What is fetched before a guest asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrefetchArg {
    /// Nothing; nor is recorded what is read
    Off,
    /// What disks of the same snapshot, or of one before it, read when they started
    Trace,
}

impl From<PrefetchArg> for Prefetch {
    fn from(arg: PrefetchArg) -> Self {
        match arg {
            PrefetchArg::Off => Self::Off,
            PrefetchArg::Trace => Self::Trace,
        }
    }
}
