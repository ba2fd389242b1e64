//! Whether a chunk is compressed.

use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blobcr_proto::codec;
use blobcr_proto::v1::Codec;
use bytes::Bytes;

use crate::clock::Clock;

/// A pool's `compression`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Never.
    Off,
    /// Always with LZ4.
    Lz4,
    /// Always with zstd.
    Zstd,
    /// With LZ4, while that is quicker than sending plain bytes.
    #[default]
    Adaptive,
}

/// A text that is no compression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no compression; write off, lz4, zstd or adaptive")]
pub struct CompressionError(pub String);

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, CompressionError> {
        match text {
            "off" => Ok(Self::Off),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            // A record of a pool that was made without naming one.
            "adaptive" | "" => Ok(Self::Adaptive),
            other => Err(CompressionError(other.to_owned())),
        }
    }
}

/// A result that saves less than a tenth is thrown away: every later read would pay for decoding.
const KEEP_SAVING_PART: usize = 10;

/// While chunks are sent plain, every sixteenth is compressed all the same, to see whether the
/// data has changed. It costs 6 % of what compressing always would.
const PROBE_EVERY: u32 = 16;

/// Weight of the newest measurement in a running estimate: the last dozen or so count.
const NEWEST_WEIGHT: f64 = 0.15;

/// Sends are measured over so many bytes at least: a single small one measures latency only.
const SEND_WINDOW_BYTES: u64 = 1 << 20;

/// A running mean that starts with its first value.
#[derive(Debug, Clone, Copy, Default)]
struct Estimate(Option<f64>);

impl Estimate {
    fn add(&mut self, value: f64) {
        let old = self.0.unwrap_or(value);
        self.0 = Some(old + (value - old) * NEWEST_WEIGHT);
    }
}

/// What has been measured: the running estimates of equation 1 (compress when
/// `t_compress + t_upload_compressed < t_upload_plain`), each by plain or sent byte.
#[derive(Debug, Clone, Default)]
struct Estimates {
    /// Seconds to compress one plain byte.
    compress: Estimate,
    /// Bytes sent for each plain byte of what was compressed (1 where that was thrown away).
    ratio: Estimate,
    /// Seconds to send one byte, with as many sends at once as there are.
    send: Estimate,
    since_probe: u32,
    sends: Sends,
}

/// The busy time of the network: while several sends are under way their time counts once.
#[derive(Debug, Clone, Default)]
struct Sends {
    under_way: u32,
    busy_since: Duration,
    busy: Duration,
    bytes: u64,
}

impl Estimates {
    /// Equation 1. While something is not known yet, compress: it is how one comes to know.
    fn pays(&self) -> bool {
        match (self.compress.0, self.ratio.0, self.send.0) {
            (Some(compress), Some(ratio), Some(send)) => compress + ratio * send < send,
            _ => true,
        }
    }

    /// Whether to compress the next chunk.
    fn decide(&mut self) -> bool {
        if self.pays() {
            self.since_probe = 0;
            return true;
        }
        self.since_probe += 1;
        let probe = self.since_probe >= PROBE_EVERY;
        if probe {
            self.since_probe = 0;
        }
        probe
    }

    fn compressed(&mut self, plain: usize, kept: usize, took: Duration) {
        if plain > 0 {
            self.compress.add(took.as_secs_f64() / plain as f64);
            self.ratio.add(kept as f64 / plain as f64);
        }
    }

    fn send_began(&mut self, now: Duration) {
        if self.sends.under_way == 0 {
            self.sends.busy_since = now;
        }
        self.sends.under_way += 1;
    }

    /// A send ended; `bytes` is 0 when it failed, and its time then does not count.
    fn send_ended(&mut self, now: Duration, bytes: u64) {
        let sends = &mut self.sends;
        sends.under_way = sends.under_way.saturating_sub(1);
        let took = now.saturating_sub(sends.busy_since);
        sends.busy_since = now;
        if bytes == 0 {
            return;
        }
        sends.busy += took;
        sends.bytes += bytes;
        if sends.bytes >= SEND_WINDOW_BYTES {
            let by_byte = sends.busy.as_secs_f64() / sends.bytes as f64;
            sends.busy = Duration::ZERO;
            sends.bytes = 0;
            self.send.add(by_byte);
        }
    }
}

/// Applies a pool's compression, and keeps the estimates that `adaptive` goes by.
pub struct Compressor {
    policy: Compression,
    clock: Arc<dyn Clock>,
    estimates: Mutex<Estimates>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Compressor {
    /// A compressor that knows nothing of the data or the network yet.
    #[must_use]
    pub fn new(policy: Compression, clock: Arc<dyn Clock>) -> Self {
        Self { policy, clock, estimates: Mutex::default() }
    }

    fn estimates(&self) -> MutexGuard<'_, Estimates> {
        self.estimates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The payload of `plain` and its codec. Takes a core for as long as it takes: not to be
    /// called on a thread of the asynchronous runtime for more than a few KiB.
    #[must_use]
    pub fn encode(&self, plain: Bytes) -> (Codec, Bytes) {
        let codec = match self.policy {
            Compression::Off => return (Codec::Plain, plain),
            Compression::Lz4 => Codec::Lz4,
            Compression::Zstd => Codec::Zstd,
            Compression::Adaptive if self.estimates().decide() => Codec::Lz4,
            Compression::Adaptive => return (Codec::Plain, plain),
        };
        let begin = self.clock.now();
        let limit = plain.len() - plain.len() / KEEP_SAVING_PART;
        let payload = codec::compress(codec, &plain).filter(|payload| payload.len() <= limit);
        let took = self.clock.now().saturating_sub(begin);
        let kept = payload.as_ref().map_or(plain.len(), Vec::len);
        self.estimates().compressed(plain.len(), kept, took);
        payload.map_or((Codec::Plain, plain), |payload| (codec, payload.into()))
    }

    /// Begins to measure one send. Dropping the result without [`Sending::done`] says it failed.
    #[must_use]
    pub fn sending(&self) -> Sending<'_> {
        self.estimates().send_began(self.clock.now());
        Sending { compressor: self, bytes: 0 }
    }
}

/// A send under way.
#[derive(Debug)]
pub struct Sending<'a> {
    compressor: &'a Compressor,
    bytes: u64,
}

impl Sending<'_> {
    /// The send succeeded and carried `bytes` bytes of payload.
    pub fn done(mut self, bytes: u64) {
        self.bytes = bytes;
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let now = self.compressor.clock.now();
        self.compressor.estimates().send_ended(now, self.bytes);
    }
}
