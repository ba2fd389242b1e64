//! A group of jobs that one write and one sync make durable: which records of the log they need,
//! and what these do to the index once they are on the disk.

use std::collections::HashMap;
use std::io::IoSlice;
use std::ops::Range;

use blobcr_proto::codec::crc32c;
use blobcr_proto::v1::Codec;
use bytes::Bytes;

use crate::format::listing::Entry;
use crate::format::segment::{
    ALIGN, HeaderEvent, Place, RECORD_HEADER_LEN, RecordHeader, TOMBSTONE_PAYLOAD_LEN,
    encode_tombstone, frame_len,
};
use crate::format::{Event, Key, Location, StoreId};
use crate::index::{Index, State};
use crate::queue::{Carried, Checked, DeleteOutcome, Job, Outcome, PutOutcome, Work};

/// Payloads up to this size are copied together, larger ones written from where they are: a copy
/// of 16 KiB costs less than another piece in the vector.
const COPY_BYTES_MAX: usize = 16 << 10;

/// What a durable record of the log does to the index.
#[derive(Clone, Copy, Debug)]
pub(super) enum Effect {
    Put(Key, State),
    Touch(Key, u64),
    Remove(Key),
}

enum Piece {
    Copied(Range<usize>),
    Borrowed(Bytes),
}

/// A job in a group, with its answer.
pub(super) struct Planned {
    pub(super) job: Job,
    pub(super) outcome: Outcome,
    /// It brings payloads, so it can be refused when there is no room.
    pub(super) is_bulky: bool,
}

/// The group.
pub(super) struct Group<'a> {
    index: &'a Index,
    store: StoreId,
    segment: u32,
    /// Where in the segment the group begins, and how far the segment is synced, in bytes.
    start: u64,
    /// Bytes of new records that the disk has room for.
    room: u64,
    /// Bytes that compaction may use.
    carry_room: u64,
    bytes: u64,
    arena: Vec<u8>,
    pieces: Vec<Piece>,
    entries: Vec<u8>,
    effects: Vec<Effect>,
    /// What the index will say once the group is durable, where it differs.
    overlay: HashMap<Key, Option<State>>,
    planned: Vec<Planned>,
}

/// What a finished group leaves.
pub(super) struct Finished {
    pub(super) effects: Vec<Effect>,
    pub(super) entries: Vec<u8>,
    pub(super) planned: Vec<Planned>,
}

impl<'a> Group<'a> {
    pub(super) fn new(
        index: &'a Index,
        store: StoreId,
        (segment, start): (u32, u64),
        (room, carry_room): (u64, u64),
    ) -> Self {
        Self {
            index,
            store,
            segment,
            start,
            room,
            carry_room,
            bytes: 0,
            arena: Vec::new(),
            pieces: Vec::new(),
            entries: Vec::new(),
            effects: Vec::new(),
            overlay: HashMap::new(),
            planned: Vec::new(),
        }
    }

    /// Where it begins in its segment.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// The byte of the segment behind the group.
    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes
    }

    /// Whether there is anything to write.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Takes in a job; gives it back when there is no room for what it brings.
    pub(super) fn plan(&mut self, job: Job) -> Result<(), Job> {
        let before = self.bytes;
        let (outcome, is_bulky) = match &job.work {
            Work::Put { generation, records } => {
                if !self.has_room(records) {
                    return Err(job);
                }
                let outcome = self.put(*generation, records);
                (Outcome::Put(outcome), outcome.stored > 0)
            }
            Work::Touch { generation, keys } => {
                let touch = |key| self.touch(key, *generation);
                (Outcome::Touch(keys.iter().map(touch).collect()), false)
            }
            Work::Delete { before_generation, keys } => {
                (Outcome::Delete(self.delete(*before_generation, keys)), false)
            }
            Work::Carry(items) => {
                let bytes = carried_bytes(items);
                // Without records it is small, and may be what makes room.
                if bytes > 0 && self.carry_room < self.bytes + bytes {
                    return Err(job);
                }
                items.iter().for_each(|item| self.carry(item));
                (Outcome::Carried, bytes > 0)
            }
        };
        debug_assert!(is_bulky || self.bytes - before < 1 << 30, "small records stay small");
        self.planned.push(Planned { job, outcome, is_bulky });
        Ok(())
    }

    /// The bytes to write.
    pub(super) fn slices(&self) -> Vec<IoSlice<'_>> {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Copied(range) => IoSlice::new(&self.arena[range.clone()]),
                Piece::Borrowed(bytes) => IoSlice::new(bytes),
            })
            .collect()
    }

    pub(super) fn finish(self) -> Finished {
        Finished { effects: self.effects, entries: self.entries, planned: self.planned }
    }

    /// What is known of `key` once all before it in the group is durable.
    fn view(&self, key: &Key) -> Option<State> {
        self.overlay.get(key).copied().unwrap_or_else(|| self.index.get(key))
    }

    fn has_room(&self, records: &[Checked]) -> bool {
        let is_new = |record: &&Checked| self.view(&record.key).is_none_or(|held| held.damaged);
        let bytes = |record: &Checked| frame_len(record.payload.len() as u32);
        let needed: u64 = records.iter().filter(is_new).map(bytes).sum();
        needed == 0 || self.bytes + needed <= self.room
    }

    fn put(&mut self, generation: u64, records: &[Checked]) -> PutOutcome {
        let mut outcome = PutOutcome::default();
        for record in records {
            let generation = match self.view(&record.key) {
                Some(held) if !held.damaged => {
                    self.touch(&record.key, generation);
                    continue;
                }
                // The good copy takes the place of the bad one, which gets a tombstone: every copy
                // that does not count is hidden by one, or is in a leftover. Who touched the bad
                // one relies on the good one now.
                Some(held) => {
                    self.tombstone(&record.key, held.location);
                    generation.max(held.generation)
                }
                None => generation,
            };
            let header = RecordHeader {
                event: HeaderEvent::Put,
                key: record.key,
                generation,
                codec: record.codec,
                plain_len: record.plain_len,
                stored_len: record.payload.len() as u32,
                payload_crc: record.payload_crc,
            };
            self.record(header, &record.payload);
            outcome.stored += 1;
            outcome.stored_bytes += header.frame_len();
        }
        outcome
    }

    /// Raises the generation of a record where there is one; says whether there is.
    fn touch(&mut self, key: &Key, generation: u64) -> bool {
        let Some(held) = self.view(key).filter(|held| !held.damaged) else { return false };
        if generation > held.generation {
            self.append_touch(key, generation);
            self.overlay.insert(*key, Some(State { generation, ..held }));
        }
        true
    }

    fn delete(&mut self, before_generation: u64, keys: &[Key]) -> DeleteOutcome {
        let mut outcome = DeleteOutcome::default();
        for key in keys {
            match self.view(key) {
                Some(held) if held.generation < before_generation => {
                    self.tombstone(key, held.location);
                    self.effects.push(Effect::Remove(*key));
                    self.overlay.insert(*key, None);
                    outcome.deleted += 1;
                }
                Some(_) => outcome.kept += 1,
                None => {}
            }
        }
        outcome
    }

    fn carry(&mut self, item: &Carried) {
        match item {
            Carried::Record { from, header, payload } => {
                let held = self.view(&header.key).filter(|held| held.location == *from);
                if let Some(State { generation, .. }) = held {
                    self.record(RecordHeader { generation, ..*header }, payload);
                }
            }
            Carried::Touch { key, generation } => {
                if self.view(key).is_some_and(|held| held.generation == *generation) {
                    self.append_touch(key, *generation);
                }
            }
            Carried::Tombstone { key, target } => self.tombstone(key, *target),
        }
    }

    fn record(&mut self, header: RecordHeader, payload: &Bytes) {
        let location = self.append(header, payload, Event::Put);
        let RecordHeader { key, generation, stored_len, .. } = header;
        let state = State { location, stored_len, generation, damaged: false };
        self.effects.push(Effect::Put(key, state));
        self.overlay.insert(key, Some(state));
    }

    fn append_touch(&mut self, key: &Key, generation: u64) {
        let header = small(HeaderEvent::Touch, key, generation, &[]);
        self.append(header, &Bytes::new(), Event::Touch);
        self.effects.push(Effect::Touch(*key, generation));
    }

    fn tombstone(&mut self, key: &Key, target: Location) {
        let payload = encode_tombstone(target);
        let header = small(HeaderEvent::Tombstone, key, 0, &payload);
        self.append(header, &Bytes::copy_from_slice(&payload), Event::Tombstone(target));
    }

    fn append(&mut self, header: RecordHeader, payload: &Bytes, event: Event) -> Location {
        let unit =
            |bytes: u64| u32::try_from(bytes / ALIGN).expect("segments stay far below 64 GiB");
        let location = Location { segment: self.segment, unit: unit(self.end()) };
        let place = Place { store: self.store, location };
        let begin = self.arena.len();
        header.encode(place, unit(self.start), &mut self.arena);
        let padding = header.frame_len() as usize - RECORD_HEADER_LEN - payload.len();
        if payload.len() <= COPY_BYTES_MAX {
            self.arena.extend_from_slice(payload);
        } else {
            self.copied(begin);
            self.pieces.push(Piece::Borrowed(payload.clone()));
        }
        let rest = self.arena.len();
        self.arena.resize(rest + padding, 0);
        self.copied(if payload.len() <= COPY_BYTES_MAX { begin } else { rest });
        self.bytes += header.frame_len();
        let RecordHeader { key, generation, stored_len, .. } = header;
        let entry =
            Entry { event, key, generation, unit: location.unit, stored_len, damaged: false };
        entry.encode(&mut self.entries);
        location
    }

    /// Adds the arena's bytes from `begin` on to what is written.
    fn copied(&mut self, begin: usize) {
        let end = self.arena.len();
        match self.pieces.last_mut() {
            Some(Piece::Copied(range)) if range.end == begin => range.end = end,
            _ if begin == end => {}
            _ => self.pieces.push(Piece::Copied(begin..end)),
        }
    }
}

/// The header of a record that carries no payload of its own.
fn small(event: HeaderEvent, key: &Key, generation: u64, payload: &[u8]) -> RecordHeader {
    debug_assert!(payload.len() <= TOMBSTONE_PAYLOAD_LEN);
    RecordHeader {
        event,
        key: *key,
        generation,
        codec: Codec::Plain,
        plain_len: payload.len() as u32,
        stored_len: payload.len() as u32,
        payload_crc: crc32c(payload),
    }
}

/// Bytes of the records among `items`.
fn carried_bytes(items: &[Carried]) -> u64 {
    let bytes = |item: &Carried| match item {
        Carried::Record { header, .. } => header.frame_len(),
        Carried::Touch { .. } | Carried::Tombstone { .. } => 0,
    };
    items.iter().map(bytes).sum()
}
