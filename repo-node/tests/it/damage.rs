//! Damage to real files: found, told, and nothing else lost.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use blobcr_proto::v1::Record;
use blobcr_repo_node::{ChunkStore, Fetched, Finding, FormatError, OpenError, RecoveryReport};
use bytes::Bytes;
use proptest::prelude::*;
use tempfile::TempDir;

use crate::common::{assert_holds, chunk, key, open, options};

const POOL: u32 = 1;
/// Two or three records each.
const SEGMENT: u64 = 4 << 10;
/// All records in one segment.
const ONE: u64 = 1 << 30;

/// What a process that is killed now would leave.
fn killed(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// A directory in which `records` were put one by one, cleanly stopped or killed.
fn made(records: &[Record], segment_bytes: u64, clean: bool) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), segment_bytes);
    for record in records {
        store.put(POOL, 1, std::slice::from_ref(record)).unwrap();
    }
    let copy = killed(dir.path());
    drop(store);
    if clean { dir } else { copy }
}

fn some_records() -> Vec<Record> {
    (0..10).map(|n| chunk(n, 900 + 100 * n as usize)).collect()
}

/// The file that holds a record, and the bytes of it that are the record's.
fn place(dir: &Path, record: &Record) -> (String, Range<usize>) {
    let id = &record.r#ref.as_ref().unwrap().id;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "seg") {
            let bytes = fs::read(&path).unwrap();
            if let Some(at) = bytes.windows(32).position(|window| window == id) {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                return (name, at - 16..at - 16 + 80 + record.payload.len());
            }
        }
    }
    panic!("no segment has the record")
}

fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = dir.join(name);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn assert_all_but(store: &ChunkStore, records: &[Record], lost: usize, as_what: &Fetched) {
    for (n, record) in records.iter().enumerate() {
        if n == lost {
            assert_eq!(store.get(POOL, key(record)), *as_what);
        } else {
            assert_holds(store, POOL, record);
        }
    }
}

/// Puts everything again; then everything is there, also after a restart.
fn assert_mends(dir: &Path, store: ChunkStore, records: &[Record], segment_bytes: u64) {
    store.put(POOL, 2, records).unwrap();
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
    assert_eq!(store.status().damaged_records, 0);
    store.compact().unwrap();
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
    drop(store);
    let (store, _) = open(dir, segment_bytes);
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
}

fn only(report: &RecoveryReport) -> &Finding {
    assert_eq!(report.findings.len(), 1, "{report:?}");
    // A line, with something to do in it.
    assert!(!report.findings[0].to_string().contains('\n'));
    &report.findings[0]
}

#[test]
fn a_torn_last_record_is_cut_off() {
    let records = some_records();
    let last = records.len() - 1;
    let base = made(&records, ONE, false);
    let (name, place) = place(base.path(), &records[last]);
    for cut in (place.start + 1..place.end).step_by(37).chain([place.end - 1]) {
        let dir = killed(base.path());
        edit(dir.path(), &name, |bytes| bytes.truncate(cut));
        let (store, report) = open(dir.path(), ONE);
        let len = (cut - place.start) as u64;
        let offset = place.start as u64;
        let torn = Finding::TornTail { segment: name.clone(), offset, len };
        assert_eq!(*only(&report), torn);
        assert_all_but(&store, &records, last, &Fetched::Absent);
        assert_mends(dir.path(), store, &records, ONE);
    }
}

#[test]
fn rubbish_behind_the_last_record_is_cut_off() {
    let records = some_records();
    for rubbish in [vec![0; 5000], vec![0xa5; 64], b"bcRr".repeat(300)] {
        let dir = made(&records, ONE, false);
        edit(dir.path(), "00000000.seg", |bytes| bytes.extend(rubbish));
        let (store, report) = open(dir.path(), ONE);
        assert!(matches!(only(&report), Finding::TornTail { .. }));
        records.iter().for_each(|record| assert_holds(&store, POOL, record));
        drop(store);
        let (_, report) = open(dir.path(), ONE);
        assert_eq!((report.findings.len(), report.segments_scanned), (0, 0));
    }
}

#[test]
fn a_file_with_a_number_that_no_store_comes_to_is_refused_by_name() {
    for number in ["ffffffff", "fffffffe", "80000000"] {
        for extension in ["seg", "idx"] {
            let dir = made(&some_records(), ONE, false);
            let name = format!("{number}.{extension}");
            fs::write(dir.path().join(&name), b"").unwrap();
            let error = ChunkStore::open(dir.path(), options(ONE)).err().unwrap();
            assert!(matches!(&error, OpenError::Format { file, .. } if *file == name), "{error}");
        }
    }
}

#[test]
fn a_bit_flip_in_a_header_costs_that_record_only() {
    let records = some_records();
    let base = made(&records, ONE, false);
    let (name, place) = place(base.path(), &records[4]);
    for bit in (0..80 * 8).step_by(13) {
        let dir = killed(base.path());
        edit(dir.path(), &name, |bytes| bytes[place.start + bit / 8] ^= 1 << (bit % 8));
        let (store, report) = open(dir.path(), ONE);
        let found = matches!(
            only(&report),
            Finding::UnreadableBytes { offset, len, .. }
                if *offset == place.start as u64 && *len == place.len().next_multiple_of(16) as u64
        );
        assert!(found, "{report:?}");
        assert_all_but(&store, &records, 4, &Fetched::Absent);
        assert_mends(dir.path(), store, &records, ONE);
        // It is told until the segment is gone.
        let (_, report) = open(dir.path(), ONE);
        assert!(matches!(only(&report), Finding::UnreadableBytes { .. }));
    }
}

#[test]
fn a_bit_flip_in_a_payload_of_the_open_segment_is_found_at_start() {
    let records = some_records();
    let base = made(&records, ONE, false);
    let (name, place) = place(base.path(), &records[4]);
    for byte in [place.start + 80, place.start + 500, place.end - 1] {
        let dir = killed(base.path());
        edit(dir.path(), &name, |bytes| bytes[byte] ^= 4);
        let (store, report) = open(dir.path(), ONE);
        let id = key(&records[4]).id;
        let offset = place.start as u64;
        assert_eq!(*only(&report), Finding::DamagedRecord { segment: name.clone(), offset, id });
        assert_eq!(store.status().damaged_records, 1);
        assert_eq!(store.status().recovery_findings, [report.findings[0].to_string()]);
        assert_all_but(&store, &records, 4, &Fetched::Damaged);
        assert_eq!(store.touch(POOL, 9, &[key(&records[4])]).unwrap(), [false]);
        assert_mends(dir.path(), store, &records, ONE);
    }
}

#[test]
fn a_bit_flip_in_a_closed_segment_is_found_on_read() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let (name, place) = place(dir.path(), &records[1]);
    for byte in [place.start + 20, place.start + 100] {
        edit(dir.path(), &name, |bytes| bytes[byte] ^= 1);
        let (store, report) = open(dir.path(), SEGMENT);
        assert_eq!((report.findings.len(), report.segments_scanned), (0, 0));
        assert_eq!(store.touch(POOL, 1, &[key(&records[1])]).unwrap(), [true], "not known yet");
        assert_all_but(&store, &records, 1, &Fetched::Damaged);
        assert_eq!(store.status().damaged_records, 1);
        assert_eq!(store.touch(POOL, 1, &[key(&records[1])]).unwrap(), [false]);
        edit(dir.path(), &name, |bytes| bytes[byte] ^= 1);
    }
    edit(dir.path(), &name, |bytes| bytes[place.start + 100] ^= 1);
    let (store, _) = open(dir.path(), SEGMENT);
    assert_eq!(store.get(POOL, key(&records[1])), Fetched::Damaged);
    assert_mends(dir.path(), store, &records, SEGMENT);
}

#[test]
fn compaction_leaves_alone_what_it_cannot_read() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let (name, place) = place(dir.path(), &records[1]);
    edit(dir.path(), &name, |bytes| bytes[place.start + 100] ^= 1);
    let (store, _) = open(dir.path(), SEGMENT);
    let others: Vec<_> = [0, 2, 3].map(|n| key(&records[n])).to_vec();
    assert_eq!(store.delete(POOL, 5, &others).unwrap().deleted, 3);
    store.compact().unwrap();
    assert_eq!(store.get(POOL, key(&records[1])), Fetched::Damaged);
    assert!(dir.path().join(&name).exists());
    // Deleted, it goes.
    assert_eq!(store.delete(POOL, 5, &[key(&records[1])]).unwrap().deleted, 1);
    store.compact().unwrap();
    assert!(!dir.path().join(&name).exists());
    drop(store);
    let (store, report) = open(dir.path(), SEGMENT);
    assert_eq!((report.findings.len(), report.records), (0, 6));
    records[4..].iter().for_each(|record| assert_holds(&store, POOL, record));
}

#[test]
fn a_truncated_closed_segment_costs_what_was_cut() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let (name, place) = place(dir.path(), &records[1]);
    let len = fs::metadata(dir.path().join(&name)).unwrap().len();
    edit(dir.path(), &name, |bytes| bytes.truncate(place.start + 10));
    let (store, report) = open(dir.path(), SEGMENT);
    let missing_bytes = len - place.start as u64 - 10;
    let told = report.findings.iter().any(|finding| {
        matches!(finding, Finding::TruncatedSegment { segment, missing_bytes: m, missing_records }
            if *segment == name && *m == missing_bytes && *missing_records >= 1)
    });
    assert!(told, "{report:?}");
    assert_holds(&store, POOL, &records[0]);
    let lost = records.iter().filter(|r| store.get(POOL, key(r)) == Fetched::Absent).count();
    assert!((1..4).contains(&lost), "{lost}");
    assert_mends(dir.path(), store, &records, SEGMENT);
}

#[test]
fn a_segment_truncated_after_a_clean_stop_is_not_taken_for_a_torn_tail() {
    let records = some_records();
    let dir = made(&records, ONE, true);
    let (name, place) = place(dir.path(), &records[8]);
    edit(dir.path(), &name, |bytes| bytes.truncate(place.start + 10));
    let (store, report) = open(dir.path(), ONE);
    let told =
        |finding: &Finding| matches!(finding, Finding::TruncatedSegment { missing_records: 2, .. });
    assert!(report.findings.iter().any(told), "{report:?}");
    let torn = |finding: &Finding| matches!(finding, Finding::TornTail { .. });
    assert!(!report.findings.iter().any(torn), "{report:?}");
    records[..8].iter().for_each(|record| assert_holds(&store, POOL, record));
    assert_mends(dir.path(), store, &records, ONE);
}

#[test]
fn a_lost_or_damaged_listing_is_made_again() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let listing = dir.path().join("00000000.idx");
    fs::remove_file(&listing).unwrap();
    edit(dir.path(), "00000001.idx", |bytes| bytes[100] ^= 1);
    edit(dir.path(), "00000002.idx", |bytes| bytes.truncate(70));
    let (store, report) = open(dir.path(), SEGMENT);
    assert_eq!(report.segments_scanned, 3);
    let damaged = |f: &&Finding| matches!(f, Finding::DamagedListing { .. });
    assert_eq!(report.findings.iter().filter(damaged).count(), 2);
    assert_eq!(report.findings.len(), 2);
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
    drop(store);
    let (_, report) = open(dir.path(), SEGMENT);
    assert_eq!((report.segments_scanned, report.findings.len()), (0, 0));
}

#[test]
fn a_lost_segment_is_told() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let (name, _) = place(dir.path(), &records[0]);
    let bytes = fs::read(dir.path().join(&name)).unwrap();
    fs::remove_file(dir.path().join(&name)).unwrap();
    let (store, report) = open(dir.path(), SEGMENT);
    let Finding::MissingSegment { segment, missing_records } = only(&report) else {
        panic!("{report:?}")
    };
    assert_eq!(*segment, name);
    assert_eq!(store.status().records + missing_records, 10);
    assert_eq!(store.get(POOL, key(&records[0])), Fetched::Absent);
    drop(store);
    // Put back, everything is as before.
    fs::write(dir.path().join(&name), bytes).unwrap();
    let (store, report) = open(dir.path(), SEGMENT);
    assert!(report.findings.is_empty());
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
}

#[test]
fn a_damaged_segment_header_costs_nothing() {
    let records = some_records();
    for clean in [true, false] {
        let dir = made(&records, SEGMENT, clean);
        edit(dir.path(), "00000001.seg", |bytes| bytes[..64].fill(0xee));
        let (store, report) = open(dir.path(), SEGMENT);
        assert!(matches!(only(&report), Finding::DamagedSegmentHeader { .. }));
        records.iter().for_each(|record| assert_holds(&store, POOL, record));
    }
}

#[test]
fn a_segment_of_another_store_is_not_used() {
    let records = some_records();
    let dir = made(&records[..3], ONE, true);
    let other = made(&records[3..], ONE, true);
    fs::copy(other.path().join("00000000.seg"), dir.path().join("00000009.seg")).unwrap();
    let (store, report) = open(dir.path(), ONE);
    assert!(matches!(only(&report), Finding::ForeignSegment { .. }));
    assert_eq!(store.status().records, 3);
    store.put(POOL, 1, &records).unwrap();
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
    assert!(dir.path().join("00000009.seg").exists());
}

#[test]
fn a_lost_identity_is_restored_from_the_segments() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let (store, _) = open(dir.path(), SEGMENT);
    let id = store.node_id();
    drop(store);
    fs::remove_file(dir.path().join("node")).unwrap();
    edit(dir.path(), "00000000.seg", |bytes| bytes[20] ^= 1);
    let (store, report) = open(dir.path(), SEGMENT);
    assert!(matches!(report.findings[0], Finding::IdentityRestored { .. }), "{report:?}");
    assert_eq!(store.node_id(), id);
    records.iter().for_each(|record| assert_holds(&store, POOL, record));
    drop(store);
    edit(dir.path(), "node", |bytes| bytes[15] ^= 1);
    let (store, _) = open(dir.path(), SEGMENT);
    assert_eq!(store.node_id(), id);
}

#[test]
fn an_identity_that_nothing_can_restore_is_an_error_that_says_so() {
    let dir = made(&[], ONE, true);
    edit(dir.path(), "node", |bytes| bytes[15] ^= 1);
    let Err(error) = ChunkStore::open(dir.path(), options(ONE)) else { panic!("opened") };
    assert!(matches!(error, OpenError::Format { .. }));
    assert!(error.to_string().contains("node"), "{error}");
}

#[test]
fn files_of_a_newer_program_are_refused_and_left_alone() {
    let records = some_records();
    let dir = made(&records, ONE, true);
    edit(dir.path(), "00000000.seg", |bytes| {
        bytes[8] = 2;
        let crc = blobcr_proto::codec::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    });
    let before = fs::read(dir.path().join("00000000.seg")).unwrap();
    let Err(error) = ChunkStore::open(dir.path(), options(ONE)) else { panic!("opened") };
    let newer = FormatError::Newer { found: 2, known: 1 };
    assert!(matches!(&error, OpenError::Format { source, .. } if *source == newer), "{error}");
    assert_eq!(fs::read(dir.path().join("00000000.seg")).unwrap(), before);
}

#[test]
fn a_copy_of_a_segment_inside_a_payload_is_not_taken_for_records() {
    let inner = some_records();
    let dir = made(&inner, ONE, false);
    let segment = Bytes::from(fs::read(dir.path().join("00000000.seg")).unwrap());
    let (store, _) = open(dir.path(), ONE);
    // Such a payload at such a place that the records in it are aligned.
    let outer = blobcr_proto::record::whole(
        blobcr_proto::v1::RecordKind::Chunk,
        blobcr_proto::Hash::of(&segment),
        blobcr_proto::v1::Codec::Plain,
        segment.len(),
        segment,
    );
    let keys: Vec<_> = inner.iter().map(key).collect();
    assert_eq!(store.delete(POOL, 9, &keys).unwrap().deleted, 10);
    store.put(POOL, 1, std::slice::from_ref(&outer)).unwrap();
    store.put(POOL, 1, &[chunk(99, 10)]).unwrap();
    let copy = killed(dir.path());
    let (name, place) = place(copy.path(), &outer);
    edit(copy.path(), &name, |bytes| bytes[place.start + 3] ^= 1);
    let (store, report) = open(copy.path(), ONE);
    assert!(matches!(only(&report), Finding::UnreadableBytes { .. }));
    assert_eq!(store.status().records, 1);
    assert_holds(&store, POOL, &chunk(99, 10));
}

/// Damage to one file.
#[derive(Clone, Debug)]
enum Harm {
    Flip(usize),
    Zero(usize, usize),
    Rubbish(usize, Vec<u8>),
    Truncate(usize),
    Remove,
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        (0usize..1 << 20).prop_map(Harm::Flip),
        (0usize..1 << 20, 1usize..3000).prop_map(|(at, len)| Harm::Zero(at, len)),
        (0usize..1 << 20, prop::collection::vec(0u8..=255, 1..600))
            .prop_map(|(at, bytes)| Harm::Rubbish(at, bytes)),
        (0usize..1 << 20).prop_map(Harm::Truncate),
        Just(Harm::Remove),
    ]
}

/// Does it, and returns the range of the file's bytes that it touched.
fn inflict(path: &Path, harm: &Harm) -> Range<usize> {
    let mut bytes = fs::read(path).unwrap();
    let len = bytes.len();
    let all = len.max(1);
    let range = match harm {
        Harm::Flip(at) => at % (all * 8) / 8..at % (all * 8) / 8 + 1,
        Harm::Zero(at, n) => at % all..(at % all + n).min(len),
        Harm::Rubbish(at, rubbish) => at % all..(at % all + rubbish.len()).min(len),
        Harm::Truncate(at) => at % all..usize::MAX,
        Harm::Remove => 0..usize::MAX,
    };
    match harm {
        Harm::Flip(at) if len > 0 => bytes[range.start] ^= 1 << (at % 8),
        Harm::Flip(_) => {}
        Harm::Zero(..) => bytes[range.clone()].fill(0),
        Harm::Rubbish(_, rubbish) => {
            bytes[range.clone()].copy_from_slice(&rubbish[..range.len()]);
        }
        Harm::Truncate(_) => bytes.truncate(range.start),
        Harm::Remove => {
            fs::remove_file(path).unwrap();
            return range;
        }
    }
    fs::write(path, bytes).unwrap();
    range
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn only_what_was_harmed_is_lost(
        clean: bool,
        one_segment: bool,
        harms in prop::collection::vec((0usize..100, harm()), 1..4),
    ) {
        let segment_bytes = if one_segment { ONE } else { SEGMENT };
        let records: Vec<_> = (0..12).map(|n| chunk(n, 300 * n as usize % 2000)).collect();
        let dir = made(&records, segment_bytes, clean);
        let places: Vec<_> = records.iter().map(|record| place(dir.path(), record)).collect();
        let mut harmed: HashMap<String, Vec<Range<usize>>> = HashMap::new();
        for (which, harm) in harms {
            let names = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<_> =
                names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.retain(|name| name.ends_with(".seg") || name.ends_with(".idx"));
            names.sort();
            if names.is_empty() {
                break;
            }
            let name = names[which % names.len()].clone();
            let range = inflict(&dir.path().join(&name), &harm);
            harmed.entry(name).or_default().push(range);
        }
        let (store, _) = open(dir.path(), segment_bytes);
        for (record, (name, place)) in records.iter().zip(&places) {
            let touches = |r: &Range<usize>| r.start < place.end && place.start < r.end;
            let is_harmed = harmed.get(name).is_some_and(|ranges| ranges.iter().any(touches));
            match store.get(POOL, key(record)) {
                Fetched::Found(found) => prop_assert_eq!(&found, record),
                lost => prop_assert!(is_harmed, "{lost:?} at {name} {place:?}, harmed {harmed:?}"),
            }
        }
        assert_mends(dir.path(), store, &records, segment_bytes);
    }
}

#[test]
fn a_check_reads_everything_once_and_tells_what_is_damaged() {
    let records = some_records();
    let dir = made(&records, SEGMENT, true);
    let victim = &records[4];
    let (name, place) = place(dir.path(), victim);
    let (store, _) = open(dir.path(), SEGMENT);
    edit(dir.path(), &name, |bytes| bytes[place.end - 1] ^= 1);
    let (mut after, mut looked_at, mut damaged) = (None, 0, Vec::new());
    loop {
        let page = store.check(POOL, blobcr_proto::v1::RecordKind::Chunk, after, 2000);
        looked_at += page.records;
        damaged.extend(page.damaged);
        after = page.last.map(|last| (&last).try_into().unwrap());
        if !page.more {
            break;
        }
    }
    assert_eq!((looked_at, damaged), (10, vec![victim.r#ref.clone().unwrap()]));
    assert_eq!(store.status().damaged_records, 1);
}

/// Found by the fuzzer: a start tells of the damage, and lists the segment; the next one must not go
/// on in the middle of a unit.
#[test]
fn what_is_put_behind_a_damaged_end_of_odd_length_is_kept() {
    let records = some_records();
    let dir = made(&records, ONE, true);
    let (name, place) = place(dir.path(), records.last().unwrap());
    edit(dir.path(), &name, |bytes| {
        bytes.truncate(place.end);
        bytes[place.end - 1] ^= 1;
    });
    drop(open(dir.path(), ONE));
    for n in 100..103 {
        let (store, _) = open(dir.path(), ONE);
        let new = chunk(n, 50);
        store.put(POOL, 2, std::slice::from_ref(&new)).unwrap();
        assert_holds(&store, POOL, &new);
        drop(store);
        let (store, _) = open(dir.path(), ONE);
        assert_holds(&store, POOL, &new);
    }
}
