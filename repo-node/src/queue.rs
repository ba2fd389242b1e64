//! What waits for the writer: a bounded queue of jobs, and the promises of their answers.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

use blobcr_proto::v1::Codec;
use bytes::Bytes;
use tokio::sync::{Notify, oneshot};

use crate::error::StoreError;
use crate::format::segment::RecordHeader;
use crate::format::{Key, Location};

/// Payload bytes that wait at the most; whoever brings more waits before the queue. Two groups: one
/// is being written while the next gathers.
const QUEUE_BYTES_MAX: usize = 2 * GROUP_BYTES_MAX;

/// Payload bytes that one write and one sync take together. At a disk's 2 GB/s this is 16 ms: more
/// would only make the first of a group wait longer for the last.
pub(crate) const GROUP_BYTES_MAX: usize = 32 << 20;

/// A record that has been checked down to its identity.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) key: Key,
    pub(crate) codec: Codec,
    pub(crate) plain_len: u32,
    pub(crate) payload_crc: u32,
    pub(crate) payload: Bytes,
}

/// Something that compaction moves to the end of the log.
#[derive(Clone, Debug)]
pub(crate) enum Carried {
    /// A record: moved if the index still points to `from`.
    Record { from: Location, header: RecordHeader, payload: Bytes },
    /// A touch: copied if the record still has that generation.
    Touch { key: Key, generation: u64 },
    /// A tombstone that still hides something.
    Tombstone { key: Key, target: Location },
}

/// What the writer is asked to do. Each job is done as a whole or not at all.
#[derive(Debug)]
pub(crate) enum Work {
    Put { generation: u64, records: Vec<Checked> },
    Touch { generation: u64, keys: Vec<Key> },
    Delete { before_generation: u64, keys: Vec<Key> },
    Carry(Vec<Carried>),
}

impl Work {
    fn bytes(&self) -> usize {
        match self {
            Self::Put { records, .. } => records.iter().map(|record| record.payload.len()).sum(),
            Self::Carry(items) => items
                .iter()
                .map(|item| match item {
                    Carried::Record { payload, .. } => payload.len(),
                    Carried::Touch { .. } | Carried::Tombstone { .. } => 0,
                })
                .sum(),
            Self::Touch { .. } | Self::Delete { .. } => 0,
        }
    }
}

/// How many records a put added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutOutcome {
    /// Records that were new to the store.
    pub stored: u32,
    /// Bytes that these take in its segments.
    pub stored_bytes: u64,
}

/// What a delete did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeleteOutcome {
    /// Records that are gone now.
    pub deleted: u32,
    /// Records that had been touched too lately.
    pub kept: u32,
}

/// The answer to a job, once it is durable.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Put(PutOutcome),
    Touch(Vec<bool>),
    Delete(DeleteOutcome),
    Carried,
}

/// A job and whom to tell.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) work: Work,
    answer: oneshot::Sender<Result<Outcome, StoreError>>,
}

impl Job {
    pub(crate) fn answer(self, result: Result<Outcome, StoreError>) {
        // Who no longer waits has lost interest, not the record.
        let _ = self.answer.send(result);
    }
}

/// An answer that will come once the job is durable, or has failed.
#[derive(Debug)]
pub(crate) struct Pending(oneshot::Receiver<Result<Outcome, StoreError>>);

impl Pending {
    /// Waits on a thread that may block.
    pub(crate) fn wait(self) -> Result<Outcome, StoreError> {
        self.0.blocking_recv().unwrap_or(Err(StoreError::Closed))
    }

    /// The answer, when it is there.
    pub(crate) fn now(mut self) -> Result<Outcome, StoreError> {
        self.0.try_recv().unwrap_or(Err(StoreError::Closed))
    }

    /// Waits in a task.
    pub(crate) async fn wait_async(self) -> Result<Outcome, StoreError> {
        self.0.await.unwrap_or(Err(StoreError::Closed))
    }
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    bytes: usize,
    closed: bool,
}

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
    taken: Condvar,
    /// Tells a [`crate::Stepper`] of jobs, when there is no thread.
    stepper: OnceLock<Arc<Notify>>,
}

impl Queue {
    /// Adds a job; waits while the queue is full.
    pub(crate) fn push(&self, work: Work) -> Pending {
        let (answer, pending) = oneshot::channel();
        let job = Job { work, answer };
        let bytes = job.work.bytes();
        let state = self.state.lock().expect("no holder of this lock panics");
        let full = |state: &mut State| {
            !state.closed && !state.jobs.is_empty() && state.bytes + bytes > QUEUE_BYTES_MAX
        };
        let mut state = self.taken.wait_while(state, full).expect("no holder panics");
        if state.closed {
            drop(state);
            job.answer(Err(StoreError::Closed));
        } else {
            state.bytes += bytes;
            state.jobs.push_back(job);
            drop(state);
            self.arrived.notify_one();
            if let Some(stepper) = self.stepper.get() {
                stepper.notify_one();
            }
        }
        Pending(pending)
    }

    /// From now on jobs are announced to a task as well.
    pub(crate) fn announce(&self) -> Arc<Notify> {
        Arc::clone(self.stepper.get_or_init(Arc::default))
    }

    /// Whether a task takes the jobs, and not a thread.
    pub(crate) fn is_stepped(&self) -> bool {
        self.stepper.get().is_some()
    }

    /// Waits for jobs and takes as many as make one group. `None` once the queue is closed and
    /// empty.
    pub(crate) fn take(&self) -> Option<Vec<Job>> {
        let state = self.state.lock().expect("no holder of this lock panics");
        let idle = |state: &mut State| state.jobs.is_empty() && !state.closed;
        let state = self.arrived.wait_while(state, idle).expect("no holder panics");
        self.take_group(state)
    }

    /// Takes as many of the jobs that are there as make one group; `None` when there are none.
    pub(crate) fn take_now(&self) -> Option<Vec<Job>> {
        self.take_group(self.state.lock().expect("no holder of this lock panics"))
    }

    fn take_group(&self, mut state: MutexGuard<'_, State>) -> Option<Vec<Job>> {
        let (mut jobs, mut bytes) = (Vec::new(), 0);
        while let Some(job) = state.jobs.front() {
            let more = job.work.bytes();
            if !jobs.is_empty() && bytes + more > GROUP_BYTES_MAX {
                break;
            }
            bytes += more;
            jobs.extend(state.jobs.pop_front());
        }
        state.bytes -= bytes;
        drop(state);
        self.taken.notify_all();
        (!jobs.is_empty()).then_some(jobs)
    }

    /// How many jobs wait.
    pub(crate) fn waiting(&self) -> usize {
        self.state.lock().expect("no holder of this lock panics").jobs.len()
    }

    /// Takes no more jobs. Those that are there are still done.
    pub(crate) fn close(&self) {
        self.state.lock().expect("no holder of this lock panics").closed = true;
        self.arrived.notify_all();
        self.taken.notify_all();
    }

    /// Drops what is there: whoever waits for it is told that the store is closed.
    pub(crate) fn abandon(&self) {
        self.close();
        self.state.lock().expect("no holder of this lock panics").jobs.clear();
    }
}
