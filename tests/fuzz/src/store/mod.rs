//! What `repo-node` decodes: the files of a store, by opening the store that they make.

mod memory;
mod seal;

use std::collections::BTreeMap;
use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::codec::crc32c;
use blobcr_proto::record::{RecordKey, check_payload, whole};
use blobcr_proto::v1::{Codec, Record, RecordKind};
use blobcr_repo_node::{ChunkStore, Fetched, Finding, Options, RecoveryReport};

use crate::input::{Input, counted};
use crate::{Target, joined};
use memory::MemoryDisk;

/// Recovery of a store from any files: no record is invented, a second start finds the same, and
/// the store goes on from there.
pub const RECOVERY: Target = Target { check: recovery, seeds: recovery_seeds };

/// A listing, whatever its segment holds: as [`RECOVERY`], with nothing else to mutate.
pub const LISTING: Target = Target { check: listing, seeds: listing_seeds };

const NODE: &[u8] = include_bytes!("../../../../repo-node/tests/golden/node.v1");
const SEGMENT: &[u8] = include_bytes!("../../../../repo-node/tests/golden/segment.v1");
const LISTING_FILE: &[u8] = include_bytes!("../../../../repo-node/tests/golden/listing.v1");

type Files = BTreeMap<String, Vec<u8>>;

/// The largest number but some: recovery must not count beyond it.
fn number(byte: u8) -> u32 {
    if byte < 0xf0 { u32::from(byte) } else { u32::MAX - u32::from(0xff - byte) }
}

fn recovery(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut files = Files::new();
    if flags & 2 != 0 {
        files.insert("node".into(), NODE.to_vec());
    }
    while !input.is_empty() && files.len() < 12 {
        let (kind, number) = (input.u8(), number(input.u8()));
        let name = match kind % 8 {
            0 => "node".to_owned(),
            1 => "node.new".to_owned(),
            2 => "reserve".to_owned(),
            3..=5 => format!("{number:08x}.seg"),
            _ => format!("{number:08x}.idx"),
        };
        files.insert(name, input.counted().to_vec());
    }
    if flags & 1 != 0 {
        seal::all(&mut files);
    }
    opens(files, flags);
}

fn listing(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut files = Files::from([
        ("node".to_owned(), NODE.to_vec()),
        ("00000007.seg".to_owned(), SEGMENT.to_vec()),
        ("00000007.idx".to_owned(), input.0.to_vec()),
    ]);
    if flags & 8 != 0 {
        files.insert("00000008.seg".to_owned(), Vec::new());
    }
    if flags & 1 != 0 {
        seal::all(&mut files);
    }
    opens(files, flags);
}

fn options(flags: u8) -> Options {
    Options {
        segment_bytes: if flags & 4 != 0 { 512 } else { 1 << 20 },
        reserve_bytes: Some(0),
        maintenance_interval: None,
        ..Options::default()
    }
}

fn open(disk: &MemoryDisk, flags: u8) -> Option<(ChunkStore, RecoveryReport)> {
    ChunkStore::open_on(Arc::new(disk.clone()), options(flags)).ok()
}

/// What a store has, pool by pool.
type Held = BTreeMap<(u32, Hash, u8, i32), Fetched>;

fn held(store: &ChunkStore) -> Held {
    let mut held = Held::new();
    for pool in 0..u32::from(seal::POOLS) {
        for kind in [RecordKind::Chunk, RecordKind::TreeNode] {
            let (page, more) = store.list(pool, kind, None, usize::MAX);
            assert!(!more);
            for listed in page {
                let wire = listed.r#ref.expect("every record has a key");
                let key = RecordKey::try_from(&wire).expect("and it is one");
                assert_eq!(key.kind, kind);
                let fetched = store.get(pool, key);
                if let Fetched::Found(record) = &fetched {
                    assert_eq!(check_payload(record), Ok(key), "what is served is checked");
                }
                held.insert((pool, key.id, key.shard, kind as i32), fetched);
            }
        }
    }
    held
}

fn chunk(plain: &[u8]) -> Record {
    let (id, payload) = (Hash::of(plain), plain.to_vec().into());
    whole(RecordKind::Chunk, id, Codec::Plain, plain.len(), payload)
}

fn opens(files: Files, flags: u8) {
    let all: Vec<u8> = files.values().flatten().copied().collect();
    let disk = MemoryDisk::new(files);
    let Some((store, report)) = open(&disk, flags) else { return };
    let first = held(&store);
    assert!(report.records >= first.len() as u64);
    for ((_, id, ..), fetched) in &first {
        assert!(all.windows(32).any(|bytes| bytes == id.0), "record {id} is invented");
        if let Fetched::Found(record) = fetched {
            assert_eq!(crc32c(&record.payload), record.payload_crc32c);
        }
    }
    store.close();
    drop(store);
    let (store, report) = open(&disk, flags).expect("what was opened once opens again");
    let mended = |finding: &Finding| {
        matches!(finding, Finding::TornTail { .. } | Finding::DamagedListing { .. })
    };
    assert!(!report.findings.iter().any(mended), "it was mended: {report:?}");
    assert_eq!(held(&store), first, "a second start finds something else");
    // Bytes that the input cannot hold a record of: a node believes a checksum, and would touch what
    // was forged under the identity of a new record.
    goes_on(&store, &disk, flags, (first, &Hash::of(&all).0));
}

/// New records are kept beside the old ones, over a compaction and a restart.
fn goes_on(store: &ChunkStore, disk: &MemoryDisk, flags: u8, (mut model, new): (Held, &[u8])) {
    let new = chunk(new);
    let key = check_payload(&new).expect("it was just made");
    store.put(1, 5, std::slice::from_ref(&new)).expect("there is room");
    assert_eq!(store.get(1, key), Fetched::Found(new.clone()));
    model.insert((1, key.id, 0, RecordKind::Chunk as i32), Fetched::Found(new));
    let touched = store.touch(1, 6, &[key]).expect("there is room");
    assert_eq!(touched, [true]);
    if flags & 16 != 0 {
        store.compact().expect("a disk in memory does not fail");
    }
    assert_eq!(held(store), model, "what was there before is still there");
    store.close();
    let (store, _) = open(disk, flags).expect("it opens again");
    assert_eq!(held(&store), model, "after a restart");
}

fn file(kind: u8, number: u8, bytes: &[u8]) -> Vec<u8> {
    joined(&[&[kind, number], &counted(bytes)])
}

/// The files of a store that was just killed, and of one that was stopped.
fn made(records: usize, clean: bool) -> (Vec<u8>, Vec<u8>) {
    let disk = MemoryDisk::new([("node".to_owned(), NODE.to_vec())]);
    let (store, _) = open(&disk, 0).expect("a new store opens");
    for n in 0..records {
        let record = chunk(&vec![n as u8; 20 + 7 * n]);
        store.put(n as u32 % 2 + 1, 3, &[record]).expect("there is room");
    }
    let last = check_payload(&chunk(&[0; 20])).expect("it was just made");
    store.delete(1, 9, &[last]).expect("there is room");
    if clean {
        store.close();
    }
    let bytes = |name: &str| {
        use blobcr_repo_node::disk::Disk;
        let file = disk.open(name).ok()?;
        file.read_at(0, file.length().ok()? as usize).ok()
    };
    let segment = bytes("00000000.seg").expect("something was put");
    (segment, bytes("00000000.idx").unwrap_or_default())
}

fn recovery_seeds() -> Vec<Vec<u8>> {
    let golden = [file(3, 7, SEGMENT), file(6, 7, LISTING_FILE)].concat();
    let (killed, _) = made(5, false);
    let (stopped, listing) = made(4, true);
    vec![
        joined(&[&[0], &file(0, 0, NODE), &golden]),
        joined(&[&[1 | 16], &golden]),
        joined(&[&[3 | 16], &file(3, 0, &killed)]),
        joined(&[&[3 | 4], &file(3, 0, &stopped), &file(6, 0, &listing)]),
        joined(&[&[3], &file(3, 0, &stopped), &file(3, 1, &killed), &file(6, 0, &listing)]),
        joined(&[&[1], &file(3, 0xfe, &killed[..killed.len() - 9]), &file(2, 0, b"x")]),
    ]
}

fn listing_seeds() -> Vec<Vec<u8>> {
    vec![
        joined(&[&[0], LISTING_FILE]),
        joined(&[&[1 | 16], LISTING_FILE]),
        joined(&[&[1 | 8], LISTING_FILE]),
    ]
}
