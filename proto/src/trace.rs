//! [`v1::ReadTrace`]: the chunks of a snapshot that its disks waited for first, in order.

use std::collections::HashSet;

use crate::units::{ChunkSize, IMAGE_SIZE_MAX};
use crate::v1;

/// Chunks of one trace at most: 4 GiB of 256 KiB chunks, more than a guest reads while it starts.
pub const TRACE_CHUNKS_MAX: u64 = 16 << 10;
/// Runs of one trace at most: with the longest numbers they fit one record of the metadata service.
pub const TRACE_RUNS_MAX: usize = 4 << 10;

/// Chunks that any image has at most.
const IMAGE_CHUNKS_MAX: u64 = IMAGE_SIZE_MAX / ChunkSize::MIN.bytes();

impl v1::ReadTrace {
    /// A trace of `chunks` in their order, each once: as many of the first as it may have.
    #[must_use]
    pub fn of(chunks: impl IntoIterator<Item = u64>) -> Self {
        let (mut trace, mut seen, mut end) = (Self::default(), HashSet::new(), 0);
        for chunk in chunks {
            if chunk >= IMAGE_CHUNKS_MAX || !seen.insert(chunk) {
                continue;
            }
            let runs = trace.lengths.len();
            match trace.lengths.last_mut() {
                Some(length) if chunk == end => *length += 1,
                _ if runs == TRACE_RUNS_MAX => break,
                _ => {
                    // Both are far below the sign bit.
                    trace.jumps.push(chunk as i64 - end as i64);
                    trace.lengths.push(1);
                }
            }
            end = chunk + 1;
            if seen.len() as u64 == TRACE_CHUNKS_MAX {
                break;
            }
        }
        trace
    }

    /// How many chunks it names, if it keeps to the rules.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.lengths.iter().map(|length| u64::from(*length)).sum()
    }

    /// Its chunks, in order. Of one that breaks the rules, those before it does.
    pub fn chunks(&self) -> impl Iterator<Item = u64> {
        let mut end = 0;
        let runs = self.jumps.iter().zip(&self.lengths).map_while(move |(jump, length)| {
            let run = run(end, *jump, *length)?;
            end = run.end;
            Some(run)
        });
        runs.flatten().take(TRACE_CHUNKS_MAX as usize)
    }

    /// Checks that it keeps to the rules.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.jumps.len() != self.lengths.len() {
            return Err("a trace has as many jumps as lengths");
        }
        if !(1..=TRACE_RUNS_MAX).contains(&self.lengths.len()) || self.count() > TRACE_CHUNKS_MAX {
            return Err("a trace has no chunks, or too many");
        }
        let mut end = 0;
        for (jump, length) in self.jumps.iter().zip(&self.lengths) {
            end = run(end, *jump, *length).ok_or("a trace leads out of every image")?.end;
        }
        Ok(())
    }
}

/// The run that begins `jump` behind `end`; `None` when it is empty or in no image.
fn run(end: u64, jump: i64, length: u32) -> Option<std::ops::Range<u64>> {
    let first = end.checked_add_signed(jump)?;
    let run = first..first.checked_add(u64::from(length))?;
    (length > 0 && run.end <= IMAGE_CHUNKS_MAX).then_some(run)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn chunks_come_back_in_their_order_each_once() {
        let trace = v1::ReadTrace::of([7, 8, 9, 3, 4, 8, 9, 100, 0]);
        assert_eq!(trace.chunks().collect::<Vec<_>>(), [7, 8, 9, 3, 4, 100, 0]);
        assert_eq!((trace.jumps.len(), trace.count()), (4, 7));
        assert_eq!(trace.check(), Ok(()));
        assert!(v1::ReadTrace::of([]).check().is_err());
    }

    #[test]
    fn the_longest_traces_fit_a_record() {
        // Far apart, so that the numbers are long.
        let jumpy = (0..2 * TRACE_RUNS_MAX as u64).map(|n| n % 2 * (1 << 26) + n * 3);
        let trace = v1::ReadTrace::of(jumpy);
        assert_eq!((trace.jumps.len(), trace.check()), (TRACE_RUNS_MAX, Ok(())));
        assert!(trace.encode_to_vec().len() < 40 << 10, "{}", trace.encode_to_vec().len());
        let straight = v1::ReadTrace::of(5..);
        assert_eq!((straight.count(), straight.check()), (TRACE_CHUNKS_MAX, Ok(())));
    }

    proptest::proptest! {
        #[test]
        fn whatever_it_says_it_stays_in_bounds(
            jumps in proptest::collection::vec(proptest::num::i64::ANY, 0..9),
            near in proptest::collection::vec(-20i64..20, 0..9),
            lengths in proptest::collection::vec(proptest::num::u32::ANY, 0..9),
            short in proptest::collection::vec(0u32..9, 0..9),
        ) {
            for jumps in [&jumps, &near] {
                for lengths in [&lengths, &short] {
                    let trace = v1::ReadTrace { jumps: jumps.clone(), lengths: lengths.clone() };
                    let chunks: Vec<u64> = trace.chunks().collect();
                    proptest::prop_assert!(chunks.len() as u64 <= TRACE_CHUNKS_MAX);
                    proptest::prop_assert!(chunks.iter().all(|chunk| *chunk < IMAGE_CHUNKS_MAX));
                    if trace.check().is_ok() {
                        proptest::prop_assert_eq!(chunks.len() as u64, trace.count());
                    }
                }
            }
        }

        #[test]
        fn a_trace_of_any_chunks_keeps_to_the_rules(
            chunks in proptest::collection::vec(0u64..1 << 28, 1..200)
        ) {
            let trace = v1::ReadTrace::of(chunks.clone());
            let mut seen = HashSet::new();
            let expected: Vec<u64> = chunks
                .into_iter()
                .filter(|chunk| *chunk < IMAGE_CHUNKS_MAX && seen.insert(*chunk))
                .collect();
            proptest::prop_assert_eq!(trace.chunks().collect::<Vec<_>>(), expected.clone());
            proptest::prop_assert_eq!(trace.check().is_ok(), !expected.is_empty());
        }
    }
}
