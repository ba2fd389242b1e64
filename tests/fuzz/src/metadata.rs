//! What `metadata` decodes: records, and the small files of a directory.

use blobcr_metadata::fuzzing;
use blobcr_metadata::records::{
    self, ClusterRecord, CounterRecord, DebtRecord, GroupRecord, ImageNameRecord, ImageRecord, LeaseRecord,
    LeaseWorkRecord, NodeRecord, PinRecord, PlacementPartRecord, PlacementRecord, PoolNameRecord,
    PoolRecord, ReadTraceRecord, Record, RemovalRecord, SetRecord, SetVmRecord, SnapshotRecord, StewardRecord,
};
use blobcr_metadata::store::{KEY_BYTES_MAX, Key};
use blobcr_proto::codec::crc32c;
use prost::Message;

use crate::input::Input;
use crate::{Target, hex, joined};

/// Records of every kind: what is believed keeps to its rules, belongs under its key, and is read
/// back as it is written.
pub const RECORD: Target = Target { check: record, seeds: record_seeds };

fn record(input: &[u8]) {
    let mut input = Input(input);
    let (flags, kind) = (input.u8(), input.u8());
    // A key of its own, or else the one that the body asks for.
    let key = (flags & 2 != 0).then(|| Key::new(input.counted().to_vec()));
    macro_rules! of_kind {
        ($($record:ident),*) => {
            match kind {
                $(kind if kind == $record::KIND as u8 => {
                    of_kind::<$record>(key, input.0, flags & 1 != 0)
                })*
                _ => {}
            }
        };
    }
    of_kind!(
        CounterRecord,
        ImageRecord,
        ImageNameRecord,
        SnapshotRecord,
        SetRecord,
        SetVmRecord,
        PoolRecord,
        PoolNameRecord,
        NodeRecord,
        PlacementRecord,
        PlacementPartRecord,
        LeaseRecord,
        LeaseWorkRecord,
        RemovalRecord,
        DebtRecord,
        ClusterRecord,
        StewardRecord,
        PinRecord,
        GroupRecord,
        ReadTraceRecord
    );
}

fn of_kind<R: Record>(key: Option<Key>, bytes: &[u8], seal: bool) {
    let Some(key) = key.or_else(|| Some(<R as Message>::decode(bytes).ok()?.key())) else { return };
    let stored = if seal {
        let head = [b'B', b'C', b'M', b'R', 1, R::KIND as u8, 0, 0];
        let crc = crc32c(&joined(&[&head, key.as_slice(), bytes]));
        joined(&[&head, &crc.to_le_bytes(), bytes])
    } else {
        bytes.to_vec()
    };
    let Ok(record) = records::decode::<R>(&key, &stored) else { return };
    assert_eq!(record.check(), Ok(()));
    assert_eq!(record.key(), key);
    assert!(key.as_slice().len() <= KEY_BYTES_MAX);
    let again = records::encode(&record);
    assert_eq!(records::decode::<R>(&key, &again).as_ref(), Ok(&record));
}

fn record_seeds() -> Vec<Vec<u8>> {
    let golden = [
        include_str!("../../../metadata/golden/records-v1.txt"),
        include_str!("../../../metadata/golden/records-v1-members.txt"),
        include_str!("../../../metadata/golden/records-v1-repair.txt"),
        include_str!("../../../metadata/golden/records-v1-traces.txt"),
    ];
    let of = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let (key, stored) = (hex(words.next()?), hex(words.next()?));
        let body = joined(&[&[1, key[0]], &stored[12..]]);
        let whole = joined(&[&[2, key[0]], &crate::input::counted(&key), &stored]);
        Some([body, whole])
    };
    golden.iter().flat_map(|file| file.lines()).filter_map(of).flatten().collect()
}

/// The line of FORMAT and of a marker in etcd, the note of the newest version, and values of sled.
pub const FILES: Target = Target { check: files, seeds: file_seeds };

fn files(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut line = input.0.to_vec();
    if flags & 1 != 0 {
        line.extend(format!(" {:08x}\n", crc32c(&line)).bytes());
    }
    if let Some(written) = fuzzing::line(&line) {
        assert_eq!(fuzzing::line(written.as_bytes()).as_ref(), Some(&written));
    }
    let mut note = input.0.to_vec();
    if let (Some(16), true) = (note.len().checked_sub(4), flags & 2 != 0) {
        let crc = crc32c(&note[..16]);
        note[16..].copy_from_slice(&crc.to_le_bytes());
    }
    if let Some(written) = fuzzing::acknowledged(&note) {
        assert_eq!(written, note);
    }
    if let Some(written) = fuzzing::stored_value(input.0) {
        assert_eq!(written, input.0);
    }
}

fn file_seeds() -> Vec<Vec<u8>> {
    let lines = [
        include_str!("../../../metadata/golden/FORMAT-v1"),
        include_str!("../../../metadata/golden/FORMAT-moved-v1"),
        include_str!("../../../metadata/golden/etcd-marker-v1.txt"),
        include_str!("../../../metadata/golden/etcd-migrating-v1.txt"),
    ];
    let note = hex(include_str!("../../../metadata/golden/acknowledged-v1.hex"));
    let unsealed = joined(&[&[1], b"blobcr-metadata 1 moved etcd:http://a:1#x"]);
    lines
        .iter()
        .map(|line| joined(&[&[0], line.as_bytes()]))
        .chain([unsealed, joined(&[&[0], &note]), joined(&[&[2], &note])])
        .collect()
}
