//! What happened in a run, in order: enough to compare two runs, and to see why one failed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use blobcr_proto::Hash;
use tokio::time::Instant;

/// Lines that are kept unless all are wanted.
const LINES_KEPT: usize = 400;

#[derive(Debug)]
struct State {
    begin: Option<Instant>,
    hash: u64,
    count: u64,
    lines: VecDeque<String>,
    keep: usize,
    /// The first digits of the identity that is followed.
    follows: Option<String>,
}

/// The trace; clones are the same one.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Mutex<State>>);

/// As FNV-1a, but of eight bytes at a time: no more is asked of it than to differ.
pub(crate) fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(hash, |hash, some| {
        let mut word = [0; 8];
        word[..some.len()].copy_from_slice(some);
        (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01B3).rotate_left(29)
    })
}

/// The hash of nothing.
pub(crate) const FNV_BEGIN: u64 = 0xCBF2_9CE4_8422_2325;

impl Trace {
    /// An empty one, which keeps its end, or all of it.
    #[must_use]
    pub fn new(whole: bool, follows: Option<String>) -> Self {
        let keep = if whole { usize::MAX } else { LINES_KEPT };
        let (begin, lines) = (None, VecDeque::new());
        Self(Arc::new(Mutex::new(State { begin, hash: FNV_BEGIN, count: 0, lines, keep, follows })))
    }

    /// Adds a line, with the time since the first one.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let since = now - *state.begin.get_or_insert(now);
        let line = format!("{:>9.3} {what}", since.as_secs_f64());
        state.hash = fnv(state.hash, line.as_bytes());
        state.count += 1;
        if state.lines.len() >= state.keep {
            state.lines.pop_front();
        }
        state.lines.push_back(line);
    }

    /// Adds a line about an object, if that is followed: one that does not count.
    pub fn about(&self, id: &Hash, what: fmt::Arguments<'_>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(follows) = &state.follows else { return };
        if id.to_string().starts_with(follows) {
            let since = Instant::now() - state.begin.unwrap_or_else(Instant::now);
            state.lines.push_back(format!("{:>9.3} >>> {what}", since.as_secs_f64()));
        }
    }

    /// A hash of all lines so far, and how many there were.
    #[must_use]
    pub fn sum(&self) -> (u64, u64) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (state.hash, state.count)
    }

    /// The lines that were kept.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).lines.iter().cloned().collect()
    }
}
