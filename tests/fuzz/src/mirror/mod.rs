//! What `mirror-fuse` decodes: the files of its directory and of its disks, and ioctls.

mod disk;
mod seal;

use std::path::Path;

use blobcr_mirror_fuse::cache::{CacheLimits, ChunkCache};
use blobcr_mirror_fuse::fuzzing;
use blobcr_mirror_fuse::ioctl::{CLONE, COMMIT, CommitReply, Request, STATUS, StatusReply};
use blobcr_proto::codec::crc32c;
use blobcr_proto::v1::SnapshotState;
use blobcr_proto::{ChunkSize, Hash};

use crate::input::{Input, counted};
use crate::{Target, hex, joined, scratch};

pub use disk::DISK;

const RECORD: &str = include_str!("../../../../mirror-fuse/src/disk/golden/record-v1.hex");
const STATE: &str = include_str!("../../../../mirror-fuse/src/disk/golden/state-v1.hex");
const FACTS: &str = include_str!("../../../../mirror-fuse/src/disk/golden/facts-v1.hex");
const JOURNAL_FILE: &str = include_str!("../../../../mirror-fuse/src/disk/golden/journal-v1.hex");

/// The small files: a disk's record, its durable and volatile facts, the identity of a mirror. What
/// was read is written so that it is read the same.
pub const FILES: Target = Target { check: files, seeds: file_seeds };

fn files(input: &[u8]) {
    let mut input = Input(input);
    let (flags, which) = (input.u8(), input.u8());
    let mut bytes = input.0.to_vec();
    let (again, magic): (fn(&[u8]) -> Option<Vec<u8>>, _) = match which % 4 {
        0 => (fuzzing::record, b"BCDR"),
        1 => (fuzzing::state, b"BCDS"),
        2 => (fuzzing::volatile_facts, b"BCDF"),
        _ => (fuzzing::identity, b"BCMI"),
    };
    if flags & 1 != 0 {
        match which % 4 {
            3 => seal::identity(&mut bytes),
            _ => bytes = joined(&[&[0; 16], &bytes]),
        }
        seal::frame(&mut bytes, magic);
    }
    let Some(written) = again(&bytes) else { return };
    assert_eq!(again(&written).as_ref(), Some(&written));
}

fn file_seeds() -> Vec<Vec<u8>> {
    let identity = include_str!("../../../../mirror-fuse/golden/identity-v1.hex");
    [RECORD, STATE, FACTS, identity]
        .iter()
        .zip(0u8..)
        .flat_map(|(golden, which)| {
            let golden = hex(golden);
            let body = if which == 3 { &golden[..] } else { &golden[16..] };
            [joined(&[&[0, which], &golden]), joined(&[&[1, which], body])]
        })
        .collect()
}

/// A disk's journal: a damaged one is refused and left as it is; of any other, no more than the end
/// is cut off, and it then reads the same.
pub const JOURNAL: Target = Target { check: journal, seeds: journal_seeds };

const JOURNAL_HEAD: usize = 4096;

fn journal(input: &[u8]) {
    let mut input = Input(input);
    let (flags, words) = (input.u8(), usize::from(input.u8()) % 16 + 1);
    let mut bytes = if flags & 2 != 0 {
        input.0.to_vec()
    } else {
        joined(&[&[0; JOURNAL_HEAD], input.0])
    };
    if flags & 1 != 0 {
        seal::frame_of(&mut bytes, b"BCDJ", 0);
        seal::batches(&mut bytes, words, flags & 4 != 0);
    }
    let path = scratch("journal").join("journal");
    std::fs::write(&path, &bytes).expect("the scratch directory can be written");
    let found = fuzzing::journal(&path, words);
    let left = std::fs::read(&path).expect("it is still there");
    let Some(found) = found else {
        assert!(left == bytes, "a journal that is refused was changed");
        return;
    };
    assert!(left.len() <= bytes.len().max(JOURNAL_HEAD));
    let same = left.len().min(bytes.len());
    assert!(left[..same] == bytes[..same], "more than the end was changed");
    for (chunk, presence) in &found {
        let entry = presence.iter().fold(chunk.to_le_bytes().to_vec(), |mut entry, word| {
            entry.extend(word.to_le_bytes());
            entry
        });
        assert!(bytes.windows(entry.len()).any(|part| part == entry), "an entry is invented");
    }
    assert_eq!(fuzzing::journal(&path, words), Some(found), "a second start finds another");
}

fn journal_seeds() -> Vec<Vec<u8>> {
    // The head without its padding, then a batch of two entries.
    let batch = &hex(JOURNAL_FILE)[80..];
    vec![
        joined(&[&[1, 0], batch]),
        joined(&[&[1 | 4, 0], batch, batch, batch]),
        joined(&[&[1 | 4, 0], batch, &batch[..30], batch]),
        joined(&[&[1 | 4, 3], batch, &[0; 64]]),
    ]
}

/// The cache of clean chunks: whatever its files hold, a chunk that is handed out has its identity,
/// and the cache stays within its bound.
pub const CACHE: Target = Target { check: cache, seeds: cache_seeds };

const SLOTS: u8 = 4;
const CHUNK: usize = ChunkSize::MIN.len();

fn chunk(name: u8) -> Vec<u8> {
    vec![name; CHUNK]
}

fn cache(input: &[u8]) {
    let mut input = Input(input);
    let (flags, slots) = (input.u8(), input.u8() % (SLOTS + 2));
    let (mut data, mut index) = (Vec::new(), vec![0; 4096]);
    for slot in 0..slots {
        let (held, named, place) = (input.u8() % 4, input.u8() % 4, input.u8());
        data.extend(chunk(held));
        if place & 1 != 0 {
            *data.last_mut().expect("a chunk has bytes") ^= 1;
        }
        let slot = if place & 2 != 0 { place } else { slot };
        let entry = joined(&[&Hash::of(&chunk(named)).0, &u32::from(slot).to_le_bytes()]);
        let crc = crc32c(&entry).to_le_bytes();
        index.extend(joined(&[&entry, &crc]));
    }
    data.truncate(data.len().saturating_sub(usize::from(input.u16())));
    let head = joined(&[b"BCCX\x01\0\0\0", &(CHUNK as u32).to_le_bytes()]);
    index[..12].copy_from_slice(&head);
    index[12..16].copy_from_slice(&crc32c(&head).to_le_bytes());
    while !input.is_empty() {
        let at = usize::from(input.u16()) % index.len();
        index[at] ^= input.u8();
    }
    let dir = scratch("cache");
    std::fs::write(dir.join("chunks-64k.data"), data).expect("the scratch directory is there");
    std::fs::write(dir.join("chunks-64k.index"), index).expect("the scratch directory is there");
    let capacity = CHUNK as u64 * u64::from(SLOTS - flags % 2);
    for _ in 0..2 {
        is_sound(&dir, capacity);
    }
}

fn is_sound(dir: &Path, capacity_bytes: u64) {
    let limits = CacheLimits { capacity_bytes, keep_free_bytes: 0 };
    let cache = ChunkCache::open(dir, limits).expect("damage is no error");
    assert!(cache.status().used_bytes <= capacity_bytes);
    let mut out = vec![0; 512];
    for name in 0..5 {
        let plain = chunk(name);
        let id = Hash::of(&plain);
        assert!(!cache.read(&id, ChunkSize::MIN, 0, &mut out), "nothing is verified yet");
        if let Some(read) = cache.read_verified(&id, ChunkSize::MIN) {
            assert_eq!(Hash::of(&read), id);
        } else {
            cache.insert(id, &plain);
        }
        assert!(cache.read(&id, ChunkSize::MIN, CHUNK - 512, &mut out), "there is room");
        assert!(out == plain[..512], "bytes of another chunk");
        assert!(cache.status().used_bytes <= capacity_bytes);
    }
}

fn cache_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0, 3, 0, 0, 0, 1, 1, 0, 2, 2, 0, 0, 0],
        vec![1, 5, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 0, 1, 1, 0, 9, 0, 20, 16, 1],
    ]
}

/// The tree nodes that a host keeps: what is given has its identity, now and after a restart.
pub const NODES: Target = Target { check: nodes, seeds: node_seeds };

fn nodes(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let old = input.counted().to_vec();
    let (mut ids, dir) = (Vec::new(), scratch("nodes"));
    for (name, mut bytes) in [("nodes.old", old), ("nodes.young", input.0.to_vec())] {
        if flags & 1 != 0 {
            bytes = joined(&[b"BCTN\x01\0\0\0", &bytes]);
            seal::nodes(&mut bytes, flags & 2 != 0);
        }
        let places = (8..bytes.len()).step_by(8).filter_map(|at| bytes.get(at..at + Hash::LEN));
        ids.extend(places.filter_map(Hash::from_slice));
        std::fs::write(dir.join(name), bytes).expect("the scratch directory can be written");
    }
    let first = fuzzing::kept_nodes(&dir, &ids);
    for (id, node) in ids.iter().zip(&first) {
        assert!(node.as_ref().is_none_or(|node| Hash::of(node) == *id));
    }
    for (before, now) in first.iter().zip(fuzzing::kept_nodes(&dir, &ids)) {
        assert!(before.is_none() || now == *before, "a restart lost a node");
    }
}

fn node_seeds() -> Vec<Vec<u8>> {
    let golden = hex(include_str!("../../../../mirror-fuse/golden/nodes-v1.hex"));
    let record = &golden[8..];
    vec![
        joined(&[&[0], &counted(&golden), &golden]),
        joined(&[&[1 | 2], &counted(&[record, record].concat()), record]),
        joined(&[&[1], &counted(record), record, &record[..50]]),
    ]
}

/// Ioctls: no request is taken whose size or version is another, and an answer has its size.
pub const IOCTL: Target = Target { check: ioctl, seeds: ioctl_seeds };

fn ioctl(input: &[u8]) {
    let mut input = Input(input);
    let (flags, mut command) = (input.u8(), input.u32());
    if flags & 1 != 0 {
        command = [CLONE, COMMIT, STATUS][command as usize % 3];
    }
    let size = (command >> 16 & 0x3fff) as usize;
    if let Ok(request) = Request::parse(command, input.0) {
        assert_eq!(input.0.len(), size);
        assert_eq!(input.0[..8], joined(&[&1u32.to_ne_bytes(), &(size as u32).to_ne_bytes()]));
        let is_it = match request {
            Request::Clone => command == CLONE,
            Request::Commit { .. } => command == COMMIT,
            Request::Status { .. } => command == STATUS,
        };
        assert!(is_it);
    }
    let Ok(text) = std::str::from_utf8(input.0) else { return };
    let state = SnapshotState::Stable;
    let numbers = (u64::from(command), u64::from(flags));
    let (number, image_id) = numbers;
    let (dirty_bytes, downtime_ns, image) = (1, 2, text);
    let commit = CommitReply { state, number, image_id, dirty_bytes, downtime_ns, image }.encode();
    assert_eq!(commit.len(), (COMMIT >> 16 & 0x3fff) as usize);
    assert_eq!(commit.last(), Some(&0), "a text ends with a NUL");
    let status = StatusReply {
        state,
        number,
        image_id,
        last_stable: 1,
        pending: 2,
        disk_bytes: 3,
        dirty_bytes,
        local_bytes: 4,
        image,
        reason: text,
    };
    let status = status.encode();
    assert_eq!(status.last(), Some(&0));
    assert!(std::str::from_utf8(&status[208..]).is_ok(), "a text is cut at a character");
}

fn ioctl_seeds() -> Vec<Vec<u8>> {
    [CLONE, COMMIT, STATUS]
        .map(|command| {
            let size = command >> 16 & 0x3fff;
            let mut body = vec![0; size as usize];
            body[..8].copy_from_slice(&joined(&[&1u32.to_ne_bytes(), &size.to_ne_bytes()]));
            joined(&[&[0], &command.to_le_bytes(), &body])
        })
        .into_iter()
        .chain([joined(&[&[1, 0, 0, 0, 0], "naïve".repeat(60).as_bytes()])])
        .collect()
}
