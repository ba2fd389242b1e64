//! Trees against the plain bytes of a disk.

use std::collections::{BTreeMap, HashMap};

use blobcr_proto::{ChunkSize, Hash};
use proptest::prelude::*;

use super::{Change, FanOut, Geometry, Nodes, Root, diff_nodes_max, model_diff};

/// Bytes of a model at most: some chunks of the largest size.
const BYTES_MAX: u64 = 20 << 20;
/// Chunks of a model at most: enough levels at small fan-outs.
const CHUNKS_MAX: u64 = 40;

#[derive(Clone, Debug)]
enum Step {
    /// Fractions of the disk's size, so that they mean something for every disk.
    Write {
        at: f64,
        len: u64,
        byte: u8,
    },
    Zero {
        from: f64,
        to: f64,
    },
    Resize {
        to: f64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        // A small alphabet, so that chunks are equal now and then; byte 0 makes holes.
        4 => (0.0..1.0, 1u64..300_000, 0u8..4)
            .prop_map(|(at, len, byte)| Step::Write { at, len, byte }),
        1 => (0.0..1.0, 0.0..1.0).prop_map(|(from, to)| Step::Zero { from, to }),
        2 => (0.0..=1.0).prop_map(|to| Step::Resize { to }),
    ]
}

struct Disk {
    bytes: Vec<u8>,
    geometry: Geometry,
    stored: HashMap<Hash, Vec<u8>>,
}

impl Disk {
    fn size_max(chunk_size: ChunkSize) -> u64 {
        BYTES_MAX.min(CHUNKS_MAX * chunk_size.bytes())
    }

    /// What a writer sees as changed: chunks by index.
    fn apply(&mut self, step: &Step) -> Vec<u64> {
        let size = self.bytes.len() as u64;
        let place = |fraction: f64| (size as f64 * fraction) as u64;
        let (range, byte) = match *step {
            Step::Write { at, len, byte } => (place(at)..(place(at) + len).min(size), byte),
            Step::Zero { from, to } => (place(from.min(to))..place(from.max(to)), 0),
            Step::Resize { to } => {
                let new = (Self::size_max(self.geometry.chunk_size) as f64 * to) as u64;
                self.bytes.resize(new as usize, 0);
                self.geometry.size_bytes = new;
                // A cut within a chunk changes that chunk.
                let cut = new < size && !new.is_multiple_of(self.geometry.chunk_size.bytes());
                return if cut { vec![self.geometry.chunks() - 1] } else { Vec::new() };
            }
        };
        if range.is_empty() {
            return Vec::new();
        }
        self.bytes[range.start as usize..range.end as usize].fill(byte);
        let chunk_size = self.geometry.chunk_size.bytes();
        (range.start / chunk_size..=(range.end - 1) / chunk_size).collect()
    }

    fn chunk(&self, index: u64) -> Vec<u8> {
        let size = self.geometry.chunk_size.len();
        let start = index as usize * size;
        let mut chunk = self.bytes[start..(start + size).min(self.bytes.len())].to_vec();
        chunk.resize(size, 0);
        chunk
    }

    fn change(&mut self, index: u64) -> Change {
        let chunk = self.chunk(index);
        if chunk.iter().all(|byte| *byte == 0) {
            return (index, None);
        }
        let id = Hash::of(&chunk);
        self.stored.insert(id, chunk);
        (index, Some(id))
    }

    fn model(&mut self) -> BTreeMap<u64, Hash> {
        let all: Vec<Change> = (0..self.geometry.chunks()).map(|i| self.change(i)).collect();
        all.into_iter().filter_map(|(index, id)| Some((index, id?))).collect()
    }

    fn read(&self, chunks: &[Option<Hash>]) -> Vec<u8> {
        let zeros = vec![0; self.geometry.chunk_size.len()];
        let chunks = chunks.iter().map(|id| id.map_or(&zeros[..], |id| &self.stored[&id][..]));
        let mut bytes: Vec<u8> = chunks.collect::<Vec<_>>().concat();
        let beyond = bytes.split_off(self.bytes.len());
        assert!(beyond.iter().all(|byte| *byte == 0), "padded with zeros");
        bytes
    }
}

fn check_history(geometry: Geometry, steps: &[Step]) {
    let nodes = Nodes::default();
    let bytes = vec![0; geometry.size_bytes as usize];
    let mut disk = Disk { bytes, geometry, stored: HashMap::new() };
    let mut snapshots: Vec<(Root, BTreeMap<u64, Hash>)> =
        vec![(Root::empty(geometry), BTreeMap::new())];
    for step in steps {
        let dirty = disk.apply(step);
        let changes: Vec<Change> = dirty.into_iter().map(|index| disk.change(index)).collect();
        let (before, model_before) = snapshots.last().unwrap().clone();
        let root = nodes.update(&before, disk.geometry, &changes).root;
        let model = disk.model();

        assert_eq!(root.geometry, disk.geometry);
        let chunks = nodes.lookup(&root, 0, disk.geometry.chunks() as usize);
        assert!(disk.read(&chunks) == disk.bytes, "the tree's bytes are the disk's");
        assert_eq!(nodes.present(&root), model);
        assert_eq!(root, nodes.build(disk.geometry, &model), "canonical");

        let (found, cost) = nodes.cost_of(|| nodes.diff(&before, &root).unwrap());
        assert_eq!(found, model_diff(&model_before, &model));
        assert!(cost.nodes <= diff_nodes_max(&before, &root, found.len()), "{cost:?}");
        snapshots.push((root, model));
    }
    for (root, model) in &snapshots {
        assert_eq!(&nodes.present(root), model, "no snapshot changes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_snapshot_of_a_history_is_the_disk_of_its_time(
        chunk_bits in 16u32..=22,
        fan_out_bits in 1u32..=10,
        size in 0.0..=1.0,
        steps in prop::collection::vec(step(), 1..12),
    ) {
        let chunk_size = ChunkSize::new(1 << chunk_bits).unwrap();
        let size_bytes = (Disk::size_max(chunk_size) as f64 * size) as u64;
        let fan_out = FanOut::new(1 << fan_out_bits).unwrap();
        check_history(Geometry::new(size_bytes, chunk_size, fan_out).unwrap(), &steps);
    }
}

#[test]
fn a_disk_of_every_odd_size_around_its_chunks() {
    for chunks in [0u64, 1, 2, 3, 4, 5, 8, 9] {
        for off in [-4096i64, -1, 0, 1, 4095] {
            let size = (chunks << 16).saturating_add_signed(off);
            for fan_out in [2, 4, 8, 16] {
                let fan_out = FanOut::new(fan_out).unwrap();
                let geometry = Geometry::new(size, ChunkSize::MIN, fan_out).unwrap();
                let steps = [
                    Step::Write { at: 0.0, len: u64::MAX >> 1, byte: 1 },
                    Step::Zero { from: 0.2, to: 0.7 },
                    Step::Resize { to: 0.1 },
                    Step::Resize { to: 1.0 },
                ];
                check_history(geometry, &steps);
            }
        }
    }
}
