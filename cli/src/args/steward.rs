//! `blobcr steward`.

use clap::Args;

use crate::size::parse_size;

/// When the steward does what.
#[derive(Debug, Clone, Args)]
pub struct StewardSchedule {
    /// From one garbage collection to the next
    #[arg(long, value_name = "SECONDS", default_value_t = COLLECT_EVERY_S, value_parser = parse_period)]
    pub collect_every: u64,
    /// From one scrub to the next
    #[arg(long, value_name = "SECONDS", default_value_t = SCRUB_EVERY_S, value_parser = parse_period)]
    pub scrub_every: u64,
    /// Bytes a second that a scrub reads at most; 0: as fast as it goes
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64M")]
    pub scrub_rate: u64,
    /// Bytes a second that a repair reads at most; 0: as fast as it goes
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "128M")]
    pub repair_rate: u64,
}

/// An hour: a collection reads all tree nodes, so it is not for every minute.
const COLLECT_EVERY_S: u64 = 3600;
/// A week: damage that is found within it seldom meets a second one.
const SCRUB_EVERY_S: u64 = 7 * 24 * 3600;
/// Ten years: what a clock can hold.
const PERIOD_S_MAX: u64 = 10 * 365 * 24 * 3600;

fn parse_period(text: &str) -> Result<u64, String> {
    let seconds = text.parse().ok().filter(|seconds| (1..=PERIOD_S_MAX).contains(seconds));
    seconds.ok_or_else(|| format!("write seconds, from 1 to {PERIOD_S_MAX}"))
}

#[derive(Debug, Args)]
pub struct StewardArgs {
    /// Metadata servers, comma-separated
    #[arg(long, value_name = "ADDRS", value_delimiter = ',', required = true)]
    pub metadata: Vec<String>,
    #[command(flatten)]
    pub schedule: StewardSchedule,
}
