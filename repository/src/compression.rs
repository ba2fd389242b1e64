//! Whether a chunk is compressed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blobcr_proto::codec;
use blobcr_proto::policy::Compression;
use blobcr_proto::v1::Codec;
use bytes::Bytes;

use crate::clock::Clock;

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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Every look at the clock takes a millisecond: so does every compression.
    #[derive(Default)]
    struct Ticking(AtomicU64);

    impl Clock for Ticking {
        fn now(&self) -> Duration {
            Duration::from_millis(self.0.fetch_add(1, Ordering::Relaxed))
        }
    }

    const MIB: usize = 1 << 20;

    /// Estimates of a network that sends a MiB in `send_ms`, and of data that compresses to
    /// `ratio` at a MiB in 2 ms.
    fn estimates(send_ms: u64, ratio: f64) -> Estimates {
        let mut estimates = Estimates::default();
        estimates.compressed(MIB, (MIB as f64 * ratio) as usize, Duration::from_millis(2));
        estimates.send_began(Duration::ZERO);
        estimates.send_ended(Duration::from_millis(send_ms), MIB as u64);
        estimates
    }

    #[test]
    fn equation_1_decides() {
        // 2 ms to compress; half of 10 ms is saved, but only half of 3 ms.
        assert!(estimates(10, 0.5).pays());
        assert!(!estimates(3, 0.5).pays());
        // Just on either side of 2 + 0.5 × 4 = 4.
        assert!(!estimates(4, 0.5).pays());
        assert!(estimates(5, 0.5).pays());
        // Nothing is saved, however slow the network is.
        assert!(!estimates(10_000, 1.0).pays());
        // Hardly anything is, but the network is very slow.
        assert!(estimates(10_000, 0.9).pays());
    }

    #[test]
    fn what_is_not_known_is_tried() {
        assert!(Estimates::default().pays());
        let mut data_only = Estimates::default();
        data_only.compressed(MIB, MIB, Duration::from_millis(2));
        assert!(data_only.pays());
    }

    #[test]
    fn while_it_does_not_pay_every_sixteenth_is_a_probe() {
        let mut plain = estimates(1, 0.5);
        let decisions: Vec<bool> = (0..48).map(|_| plain.decide()).collect();
        let probes: Vec<usize> = (0..48).filter(|at| decisions[*at]).collect();
        assert_eq!(probes, [15, 31, 47]);
    }

    #[test]
    fn data_that_changes_is_found_out_by_probes() {
        let mut estimates = estimates(100, 1.0);
        assert!(!estimates.pays());
        let mut chunks = 0;
        while !estimates.pays() {
            chunks += 1;
            assert!(chunks < 200, "never found out");
            if estimates.decide() {
                estimates.compressed(MIB, MIB / 4, Duration::from_millis(2));
            }
        }
        assert_eq!(chunks, 16, "the first probe shows it");
    }

    #[test]
    fn a_network_that_gets_slower_turns_compression_on() {
        let mut estimates = estimates(2, 0.5);
        assert!(!estimates.pays());
        for _ in 0..20 {
            estimates.send_began(Duration::ZERO);
            estimates.send_ended(Duration::from_millis(20), MIB as u64);
        }
        assert!(estimates.pays());
    }

    #[test]
    fn sends_side_by_side_share_their_time() {
        let mut estimates = Estimates::default();
        let at = Duration::from_millis;
        for _ in 0..4 {
            estimates.send_began(at(0));
        }
        for step in 1..=4 {
            estimates.send_ended(at(2 * step), MIB as u64 / 4);
        }
        let by_byte = estimates.send.0.unwrap();
        assert!((by_byte * MIB as f64 - 0.008).abs() < 1e-9, "8 ms for the MiB");
    }

    #[test]
    fn small_and_failed_sends_do_not_count_by_themselves() {
        let mut estimates = Estimates::default();
        estimates.send_began(Duration::ZERO);
        estimates.send_ended(Duration::from_secs(9), 0);
        estimates.send_began(Duration::from_secs(9));
        estimates.send_ended(Duration::from_secs(10), 1000);
        assert_eq!(estimates.send.0, None);
        assert_eq!(estimates.sends.under_way, 0);
    }

    fn encode(policy: Compression, plain: &Bytes) -> (Codec, Bytes) {
        Compressor::new(policy, Arc::new(Ticking::default())).encode(plain.clone())
    }

    /// Bytes of which so many are unlike all others.
    fn partly_random(random: usize, of: usize) -> Bytes {
        use rand::{RngCore, SeedableRng};
        let mut bytes = vec![7; of];
        rand::rngs::StdRng::seed_from_u64(1).fill_bytes(&mut bytes[..random]);
        bytes.into()
    }

    #[test]
    fn a_result_is_kept_when_it_saves_a_tenth() {
        let (codec, payload) = encode(Compression::Lz4, &partly_random(85_000, 100_000));
        assert_eq!(codec, Codec::Lz4);
        assert!(payload.len() <= 90_000);
        let plain = partly_random(95_000, 100_000);
        assert_eq!(encode(Compression::Lz4, &plain), (Codec::Plain, plain.clone()));
        assert_eq!(encode(Compression::Zstd, &plain), (Codec::Plain, plain));
    }

    #[test]
    fn every_policy_decodes_to_what_it_was() {
        let plain = partly_random(20_000, 100_000);
        for (policy, expected) in [
            (Compression::Off, Codec::Plain),
            (Compression::Lz4, Codec::Lz4),
            (Compression::Zstd, Codec::Zstd),
            (Compression::Adaptive, Codec::Lz4),
        ] {
            let (codec, payload) = encode(policy, &plain);
            assert_eq!(codec, expected);
            let mut decoded = vec![0; plain.len()];
            codec::decode_into(codec, &payload, &mut decoded).unwrap();
            assert_eq!(decoded, plain);
        }
    }

    #[test]
    fn adaptive_goes_by_what_its_own_calls_measured() {
        let compressor = Compressor::new(Compression::Adaptive, Arc::new(Ticking::default()));
        let plain = partly_random(0, 2 * MIB);
        // Compressing 2 MiB takes a tick; sending 2 MiB takes one as well: it does not pay.
        assert_eq!(compressor.encode(plain.clone()).0, Codec::Lz4);
        compressor.sending().done(plain.len() as u64);
        let codecs: Vec<Codec> = (0..16).map(|_| compressor.encode(plain.clone()).0).collect();
        assert_eq!(codecs[..15], [Codec::Plain; 15]);
        assert_eq!(codecs[15], Codec::Lz4, "a probe");
        drop(compressor.sending());
        assert_eq!(compressor.estimates().sends.under_way, 0, "a send that failed has ended");
    }
}
