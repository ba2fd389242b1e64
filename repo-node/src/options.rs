//! Settings of a store.

use std::time::Duration;

/// Settings of a store; [`Options::default`] is right but for tests.
#[derive(Clone, Debug)]
pub struct Options {
    /// A segment that has reached this many bytes is closed and another one begun. 256 MiB: small
    /// enough to compact in a second, large enough that ten terabytes are forty thousand files.
    pub segment_bytes: u64,
    /// Free bytes of the file system below which no new records are taken, so that deletes and
    /// compaction have room. `None`: a twentieth of the file system, 1 GiB at the most.
    pub reserve_bytes: Option<u64>,
    /// Compact a segment when at least this part of it is of no use. One half: a byte is then
    /// copied at most once for each byte that is won.
    pub compact_dead_fraction: f64,
    /// How fast compaction may copy, in bytes a second, so that it leaves the disk to the guests.
    pub compact_bytes_per_second: u64,
    /// How often to look whether something wants compaction. `None`: only when asked to.
    pub maintenance_interval: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            reserve_bytes: None,
            compact_dead_fraction: 0.5,
            compact_bytes_per_second: 64 << 20,
            maintenance_interval: Some(Duration::from_secs(10)),
        }
    }
}

/// The largest reserve that is chosen by itself: four segments.
const RESERVE_BYTES_MAX: u64 = 1 << 30;

impl Options {
    /// The reserve on a file system of `capacity` bytes.
    pub(crate) fn reserve(&self, capacity: u64) -> u64 {
        self.reserve_bytes.unwrap_or((capacity / 20).min(RESERVE_BYTES_MAX))
    }
}
