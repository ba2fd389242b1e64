//! The bytes of a map, as version 1 wrote them.

use std::os::unix::fs::FileExt;

use blobcr_proto::ChunkSize;

use super::*;
use crate::disk::HostFiles;

const GOLDEN: &str = include_str!("../golden/map-v1.txt");
const SHAPE: Shape = Shape { size_bytes: 5 << 20, chunk_size: ChunkSize::DEFAULT };
/// Bytes in a line of the golden file.
const LINE: usize = 16;

fn identity() -> Identity {
    let (size_bytes, chunk_size) = (SHAPE.size_bytes, SHAPE.chunk_size.bytes());
    Identity { uid: vec![9; 16], generation: 4, size_bytes, chunk_size }
}

fn facts(seq: u64) -> Facts {
    Facts { seq, boot_id: "b".into(), epoch: 5 + seq, first: 5, ..Facts::default() }
}

/// Where it is not zero: offset and bytes in hex.
fn shown(bytes: &[u8]) -> String {
    let lines = bytes.chunks(LINE).enumerate().filter(|(_, line)| line.iter().any(|b| *b != 0));
    lines
        .map(|(n, line)| {
            let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{:05x} {hex}\n", n * LINE)
        })
        .collect()
}

fn file_of(golden: &str, path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(file_len(SHAPE)).unwrap();
    for line in golden.lines() {
        let (at, hex) = line.split_once(' ').unwrap();
        let at = u64::from_str_radix(at, 16).unwrap();
        let pairs = (0..hex.len()).step_by(2).map(|n| &hex[n..n + 2]);
        let bytes: Vec<u8> = pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect();
        file.write_all_at(&bytes, at).unwrap();
    }
}

#[test]
fn golden_map_of_version_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map");
    let files = Files::new("d".into(), Arc::new(HostFiles));
    let map = Map::create(&files, &path, SHAPE, &identity()).unwrap();
    for chunk in [0, 19] {
        map.reserve(chunk).unwrap();
        map.set_mark(chunk, Mark { epoch: 6, captured: chunk == 0 });
        map.add_present(chunk, Sectors { first: 60, end: 64 });
    }
    map.write_facts(&facts(1));
    map.write_facts(&facts(2));
    map.break_snapshot(3);
    map.sync().unwrap();
    drop(map);
    let shown = shown(&std::fs::read(&path).unwrap());
    assert_eq!(shown, GOLDEN, "this program writes:\n{shown}");

    file_of(GOLDEN, &path);
    let map = Map::open(&files, &path, SHAPE, &identity()).unwrap();
    let mut marks = Vec::new();
    map.scan(|chunk, mark| marks.push((chunk, mark.epoch, mark.captured))).unwrap();
    assert_eq!(marks, [(0, 6, true), (19, 6, false)]);
    assert_eq!(map.presence(19).collect::<Vec<_>>(), [0xf << 60]);
    assert_eq!(map.facts(), Some(facts(2)));
    assert!(map.is_broken(3) && !map.is_broken(4));
}
