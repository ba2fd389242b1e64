//! What happened in a run, in order: enough to compare two runs, and to see why one failed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

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
}

/// The trace; clones are the same one.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Mutex<State>>);

/// FNV-1a: no more is asked of it than to differ.
pub(crate) fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}

/// The hash of nothing.
pub(crate) const FNV_BEGIN: u64 = 0xCBF2_9CE4_8422_2325;

impl Trace {
    /// An empty one, which keeps its end, or all of it.
    #[must_use]
    pub fn new(whole: bool) -> Self {
        let keep = if whole { usize::MAX } else { LINES_KEPT };
        let (begin, lines) = (None, VecDeque::new());
        Self(Arc::new(Mutex::new(State { begin, hash: FNV_BEGIN, count: 0, lines, keep })))
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
