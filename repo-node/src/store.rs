//! The store as others see it.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use blobcr_proto::record::{RecordError, RecordKey, check_payload, open};
use blobcr_proto::v1;

use crate::compact::{CompactionReport, Compactor};
use crate::core::Core;
use crate::disk::{Disk, RealDisk};
use crate::error::{OpenError, StoreError};
use crate::format::{Key, StoreId};
use crate::options::Options;
use crate::queue::{Checked, DeleteOutcome, Outcome, Pending, PutOutcome, Work};
use crate::read::read_record;
use crate::recovery::{RecoveryReport, recover};
use crate::segments::Segment;
use crate::stepper::Stepper;
use crate::writer::Writer;

/// How often a read looks again for a record that compaction moved while it looked. Each time costs
/// compaction a whole segment, so a second time is rare already.
const READ_ATTEMPTS_MAX: usize = 16;

/// Bytes that are checked for one request at most, and records: a quarter of a second of a disk.
const CHECK_BYTES: u64 = 32 << 20;
const CHECK_RECORDS: usize = 4096;

/// Segments are begun anew at 32 GiB at the latest: half of what a place in one can name.
const SEGMENT_BYTES_MAX: u64 = 32 << 30;

/// A store of content-addressed records in a directory.
///
/// Calls block; any number of threads may make them at once. What a put, touch or delete has
/// answered is durable. Dropping the store closes it.
pub struct ChunkStore {
    core: Arc<Core>,
    compactor: Arc<Mutex<Compactor>>,
    maintenance: Arc<Maintenance>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    findings: Vec<String>,
}

/// What a store has for a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Fetched {
    /// It does not hold the record.
    Absent,
    /// It holds the record but cannot read it whole.
    Damaged,
    /// Here it is; its checksum was checked.
    Found(v1::Record),
}

/// A page of records: key, generation and bytes on the disk of each; and whether there are more.
pub type Page = (Vec<v1::ListedRecord>, bool);

/// What a store has done since it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Syncs of segments: one for each group of jobs that wrote something, and one for each new segment's header.
    pub syncs: u64,
    /// Groups of jobs that were written, or are being written.
    pub groups: u64,
    /// Jobs that wait for the next group.
    pub waiting: u64,
    /// Bytes of memory of the index.
    pub index_bytes: u64,
}

#[derive(Default)]
struct Maintenance {
    stop: Mutex<bool>,
    wake: Condvar,
}

impl Maintenance {
    /// Waits; says whether to go on.
    fn pause(&self, time: Duration) -> bool {
        let stop = self.stop.lock().expect("no holder of this lock panics");
        let waited = self.wake.wait_timeout_while(stop, time, |stop| !*stop);
        !*waited.expect("no holder of this lock panics").0
    }

    fn stop(&self) {
        *self.stop.lock().expect("no holder of this lock panics") = true;
        self.wake.notify_all();
    }
}

impl ChunkStore {
    /// Opens the store in `dir`, or makes one there. Tells what was found wrong.
    ///
    /// # Errors
    /// When another process has the directory, it cannot be read or written, or a newer program
    /// made it.
    pub fn open(dir: &Path, options: Options) -> Result<(Self, RecoveryReport), OpenError> {
        Self::open_on(Arc::new(RealDisk::open(dir)?), options)
    }

    /// Opens the store on `disk`, or makes one there.
    ///
    /// # Errors
    /// As [`ChunkStore::open`].
    pub fn open_on(
        disk: Arc<dyn Disk>,
        options: Options,
    ) -> Result<(Self, RecoveryReport), OpenError> {
        let interval = options.maintenance_interval;
        let (store, writer, report) = Self::recovered(disk, options, StoreId(rand::random()))?;
        store.spawn("blobcr-append", move || writer.run())?;
        if let Some(interval) = interval {
            let (compactor, maintenance) = (store.compactor.clone(), store.maintenance.clone());
            store.spawn("blobcr-compact", move || maintain(&compactor, &maintenance, interval))?;
        }
        Ok((store, report))
    }

    /// Opens the store on `disk`, or makes one there with the identity `fresh`; without threads of
    /// its own: nothing is written but in the steps of the [`Stepper`]. Of the store's calls those
    /// that wait for the writer (`put`, `touch`, `delete`, `compact`) are then not for the thread
    /// that steps; its service runs on that thread alone.
    ///
    /// # Errors
    /// As [`ChunkStore::open`].
    pub fn open_stepped(
        disk: Arc<dyn Disk>,
        options: Options,
        fresh: StoreId,
    ) -> Result<(Self, Stepper, RecoveryReport), OpenError> {
        let (store, writer, report) = Self::recovered(disk, options, fresh)?;
        let arrived = store.core.queue.announce();
        let compactor = Arc::clone(&store.compactor);
        let stepper = Stepper { core: Arc::clone(&store.core), writer, compactor, arrived };
        Ok((store, stepper, report))
    }

    fn recovered(
        disk: Arc<dyn Disk>,
        mut options: Options,
        fresh: StoreId,
    ) -> Result<(Self, Writer, RecoveryReport), OpenError> {
        options.segment_bytes = options.segment_bytes.min(SEGMENT_BYTES_MAX);
        let recovered = recover(&*disk, fresh)?;
        let report = recovered.report;
        for finding in &report.findings {
            tracing::warn!(%finding, "recovery");
        }
        let (index, segments) = (recovered.index, recovered.segments);
        let core = Arc::new(Core::new(disk, options, recovered.store, index, segments));
        let writer = Writer::new(Arc::clone(&core), recovered.tail, recovered.next_segment);
        let store = Self {
            compactor: Arc::new(Mutex::new(Compactor::new(Arc::clone(&core)))),
            core,
            maintenance: Arc::default(),
            threads: Mutex::default(),
            findings: report.findings.iter().map(ToString::to_string).collect(),
        };
        Ok((store, writer, report))
    }

    /// Whether the store has no threads of its own.
    pub(crate) fn is_stepped(&self) -> bool {
        self.core.queue.is_stepped()
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), OpenError> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(run).map_err(OpenError::Thread)?;
        self.threads.lock().expect("no holder of this lock panics").push(thread);
        Ok(())
    }

    /// The node's identity: 32 hexadecimal digits, made with the store and never changed.
    #[must_use]
    pub fn node_id(&self) -> String {
        self.core.store.to_string()
    }

    /// Stores records that were put with a lease of `generation`. On return all are durable.
    ///
    /// Each whole record is checked down to its identity, each shard to its checksum. What is held
    /// already is touched instead.
    ///
    /// # Errors
    /// When a record is not what it says, there is no room, or the store is poisoned. Then any
    /// of the records may be held, each whole.
    pub fn put(
        &self,
        pool: u32,
        generation: u64,
        records: &[v1::Record],
    ) -> Result<PutOutcome, StoreError> {
        put_outcome(self.begin_put(pool, generation, records)?.wait()?)
    }

    pub(crate) fn begin_put(
        &self,
        pool: u32,
        generation: u64,
        records: &[v1::Record],
    ) -> Result<Pending, StoreError> {
        let checked = records.iter().map(|record| check(pool, record)).collect::<Result<_, _>>()?;
        Ok(self.core.queue.push(Work::Put { generation, records: checked }))
    }

    /// Tells which records are held, and raises their generation to `generation`. On return that
    /// is durable: the collector will find it, whatever happens meanwhile.
    ///
    /// A record that is known to be damaged counts as missing, so that its owner puts it again.
    ///
    /// # Errors
    /// When the store is poisoned, or has not even room for this.
    pub fn touch(
        &self,
        pool: u32,
        generation: u64,
        records: &[RecordKey],
    ) -> Result<Vec<bool>, StoreError> {
        touch_outcome(self.begin_touch(pool, generation, records).wait()?)
    }

    pub(crate) fn begin_touch(&self, pool: u32, generation: u64, records: &[RecordKey]) -> Pending {
        self.core.queue.push(Work::Touch { generation, keys: keys(pool, records) })
    }

    /// Deletes those records whose generation is below `before_generation`. On return that is
    /// durable.
    ///
    /// # Errors
    /// When the store is poisoned, or has not even room for this.
    pub fn delete(
        &self,
        pool: u32,
        before_generation: u64,
        records: &[RecordKey],
    ) -> Result<DeleteOutcome, StoreError> {
        delete_outcome(self.begin_delete(pool, before_generation, records).wait()?)
    }

    pub(crate) fn begin_delete(
        &self,
        pool: u32,
        before_generation: u64,
        records: &[RecordKey],
    ) -> Pending {
        self.core.queue.push(Work::Delete { before_generation, keys: keys(pool, records) })
    }

    /// Reads a record.
    #[must_use]
    pub fn get(&self, pool: u32, record: RecordKey) -> Fetched {
        let key = Key { pool, record };
        for _ in 0..READ_ATTEMPTS_MAX {
            let Some((state, segment)) = self.find(&key) else { return Fetched::Absent };
            let Some(segment) = segment else { continue };
            match read_record(&segment, self.core.store, &key, state) {
                Ok((header, payload)) => {
                    return Fetched::Found(v1::Record {
                        r#ref: Some(record.to_ref()),
                        codec: header.codec.into(),
                        plain_len: header.plain_len,
                        payload_crc32c: header.payload_crc,
                        payload,
                    });
                }
                Err(error) => {
                    self.core.mark_damaged(&key, state.location, &error);
                    let moved = |now: crate::index::State| now.location != state.location;
                    if !self.core.index.get(&key).is_some_and(moved) {
                        return Fetched::Damaged;
                    }
                }
            }
        }
        Fetched::Damaged
    }

    fn find(&self, key: &Key) -> Option<(crate::index::State, Option<Arc<Segment>>)> {
        let state = self.core.index.get(key)?;
        Some((state, self.core.segments.get(state.location.segment)))
    }

    /// Bytes of the payload of a record, when it is held.
    #[must_use]
    pub fn stored_len(&self, pool: u32, record: RecordKey) -> Option<u32> {
        self.core.index.get(&Key { pool, record }).map(|state| state.stored_len)
    }

    /// Up to `limit` records of one kind in order of id and shard, beginning behind `after`.
    #[must_use]
    pub fn list(
        &self,
        pool: u32,
        kind: v1::RecordKind,
        after: Option<RecordKey>,
        limit: usize,
    ) -> Page {
        let (records, more) = self.core.index.list(pool, kind, after, limit);
        let listed = |(record, state): (RecordKey, crate::index::State)| v1::ListedRecord {
            r#ref: Some(record.to_ref()),
            generation: state.generation,
            stored_bytes: crate::format::segment::frame_len(state.stored_len),
        };
        (records.into_iter().map(listed).collect(), more)
    }

    /// Reads records of one kind in order, beginning behind `after`, until about `limit_bytes` have
    /// been read (0: as many as [`CHECK_BYTES`]), and checks each as far as its checksum goes.
    #[must_use]
    pub fn check(
        &self,
        pool: u32,
        kind: v1::RecordKind,
        after: Option<RecordKey>,
        limit_bytes: u64,
    ) -> v1::CheckResponse {
        let limit_bytes = if limit_bytes == 0 { CHECK_BYTES } else { limit_bytes.min(CHECK_BYTES) };
        let (records, mut more) = self.core.index.list(pool, kind, after, CHECK_RECORDS);
        let mut done = v1::CheckResponse::default();
        for (key, state) in records {
            if done.bytes >= limit_bytes {
                more = true;
                break;
            }
            if matches!(self.get(pool, key), Fetched::Damaged) {
                done.damaged.push(key.to_ref());
            }
            done.records += 1;
            done.bytes += u64::from(state.stored_len);
            done.last = Some(key.to_ref());
        }
        done.more = more;
        done
    }

    /// How the store is.
    #[must_use]
    pub fn status(&self) -> v1::NodeStatus {
        let core = &self.core;
        let space = core.disk.space().ok();
        let segments = core.segments.list();
        v1::NodeStatus {
            node_id: self.node_id(),
            capacity_bytes: space.map_or(0, |space| space.capacity),
            free_bytes: space.map_or(0, |space| space.free),
            segment_bytes: segments.iter().map(|segment| segment.len()).sum(),
            live_bytes: segments.iter().map(|segment| segment.live_bytes()).sum(),
            records: core.index.len(),
            damaged_records: core.index.damaged(),
            poisoned: core.poisoned().is_some(),
            full: core.is_full(),
            recovery_findings: self.findings.clone(),
        }
    }

    /// What the store has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let core = &self.core;
        Counters {
            syncs: core.syncs.load(Ordering::Relaxed),
            groups: core.groups.load(Ordering::Relaxed),
            waiting: core.queue.waiting() as u64,
            index_bytes: core.index.memory(),
        }
    }

    /// Compacts now, as fast as it goes, until nothing is worth it.
    ///
    /// # Errors
    /// When the store is poisoned or closed, or a segment cannot be removed.
    pub fn compact(&self) -> Result<CompactionReport, StoreError> {
        let mut compactor = self.compactor.lock().expect("no holder of this lock panics");
        compactor.run(&mut |_| true)
    }

    /// Finishes what was begun, writes what a quick start needs, and stops. Later calls that
    /// change something are refused.
    pub fn close(&self) {
        self.maintenance.stop();
        self.core.queue.close();
        let threads = std::mem::take(&mut *self.threads.lock().expect("no holder panics"));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the chunk store panicked");
            }
        }
    }
}

impl Drop for ChunkStore {
    fn drop(&mut self) {
        self.close();
    }
}

fn maintain(compactor: &Mutex<Compactor>, maintenance: &Maintenance, interval: Duration) {
    while maintenance.pause(interval) {
        let mut compactor = compactor.lock().expect("no holder of this lock panics");
        match compactor.run(&mut |time| maintenance.pause(time)) {
            Ok(done) if done.segments > 0 => {
                tracing::info!(
                    segments = done.segments,
                    unlinked_bytes = done.unlinked_bytes,
                    carried_bytes = done.carried_bytes,
                    "compacted"
                );
            }
            Ok(_) | Err(StoreError::Closed) => {}
            Err(error) => tracing::warn!(%error, "compaction"),
        }
    }
}

/// Checks a record as far as a node can: a whole one to its identity, a shard to its checksum.
fn check(pool: u32, record: &v1::Record) -> Result<Checked, RecordError> {
    let is_shard = record.r#ref.as_ref().is_some_and(|wire| wire.shard != 0);
    let key = if is_shard { check_payload(record)? } else { open(record)?.0 };
    Ok(Checked {
        key: Key { pool, record: key },
        codec: record.codec(),
        plain_len: record.plain_len,
        payload_crc: record.payload_crc32c,
        payload: record.payload.clone(),
    })
}

fn keys(pool: u32, records: &[RecordKey]) -> Vec<Key> {
    records.iter().map(|record| Key { pool, record: *record }).collect()
}

pub(crate) fn put_outcome(outcome: Outcome) -> Result<PutOutcome, StoreError> {
    match outcome {
        Outcome::Put(outcome) => Ok(outcome),
        other => unreachable!("a put is answered by {other:?}"),
    }
}

pub(crate) fn touch_outcome(outcome: Outcome) -> Result<Vec<bool>, StoreError> {
    match outcome {
        Outcome::Touch(present) => Ok(present),
        other => unreachable!("a touch is answered by {other:?}"),
    }
}

pub(crate) fn delete_outcome(outcome: Outcome) -> Result<DeleteOutcome, StoreError> {
    match outcome {
        Outcome::Delete(outcome) => Ok(outcome),
        other => unreachable!("a delete is answered by {other:?}"),
    }
}
