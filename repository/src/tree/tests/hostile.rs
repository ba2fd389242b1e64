//! Roots and nodes that somebody else made.

use std::collections::BTreeMap;

use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::{ChunkSize, Hash, v1};
use bytes::Bytes;
use proptest::prelude::*;

use super::super::node::{Node, NodeError, node_bytes_max};
use super::super::{GeometryError, Lost, Updater, survey};
use super::{
    Change, FanOut, Geometry, NodeSource, Nodes, Reached, Root, StoreError, TreeError, chunk_sizes,
    content, diff, fan_outs, for_each_node, for_each_present, lookup, now, update,
};

fn geometry(chunks: u64, fan_out: u32) -> Geometry {
    Geometry::new(chunks << 18, ChunkSize::DEFAULT, FanOut::new(fan_out).unwrap()).unwrap()
}

fn children(geometry: &Geometry, present: &[(usize, Hash)]) -> Vec<Option<Hash>> {
    let mut children = vec![None; geometry.fan_out.slots()];
    present.iter().for_each(|(slot, id)| children[*slot] = Some(*id));
    children
}

fn encode(geometry: &Geometry, level: u32, present: &[(usize, Hash)]) -> Bytes {
    Node::encode(geometry, level, &children(geometry, present)).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_nodes_of_version_1() {
    let one = Hash(*b"the first child, of 32 bytes.  1");
    let two = Hash(*b"the other child, of 32 bytes.  2");
    let golden = |bytes: &Bytes, file: &str| assert_eq!(hex(bytes), file.trim());
    let node = |geometry: &Geometry, level, children: &[(usize, Hash)], file: &str| {
        let bytes = encode(geometry, level, children);
        golden(&bytes, file);
        let node = Node::decode(bytes, geometry, level).unwrap();
        assert!(node.children().eq(children.iter().copied()));
    };
    let narrow = include_str!("../../../golden/tree-node-v1-fan-out-2.hex");
    node(&geometry(4, 2), 1, &[(1, one)], narrow);
    let wide = include_str!("../../../golden/tree-node-v1-fan-out-64.hex");
    node(&geometry(64, 64), 0, &[(0, one), (63, two)], wide);
    // And a whole disk's root, over nodes and chunks: the identities that others have stored.
    let chunks: BTreeMap<u64, Hash> = (0..200).map(|i| (i * i, content(i))).collect();
    let root = Nodes::default().build(geometry(200 * 200, 64), &chunks);
    golden(&root.node.unwrap().to_bytes(), include_str!("../../../golden/tree-root-v1.hex"));
}

#[test]
fn nodes_come_back_as_they_were() {
    for fan_out in fan_outs() {
        for chunk_size in chunk_sizes() {
            let geometry = Geometry { size_bytes: IMAGE_SIZE_MAX, chunk_size, fan_out };
            for level in [0, 1, 26] {
                let last = fan_out.slots() - 1;
                for slots in [vec![0], vec![last], vec![0, last / 2, last], (0..=last).collect()] {
                    let mut present: Vec<_> =
                        slots.iter().map(|slot| (*slot, content(*slot as u64))).collect();
                    present.dedup();
                    let encoding = encode(&geometry, level, &present);
                    assert!(encoding.len() <= node_bytes_max(fan_out));
                    let node = Node::decode(encoding, &geometry, level).unwrap();
                    assert_eq!(node.children().collect::<Vec<_>>(), present);
                    assert_eq!(node.last_slot(), *slots.last().unwrap());
                    for (slot, child) in children(&geometry, &present).into_iter().enumerate() {
                        assert_eq!(node.child(slot), child);
                    }
                    assert_eq!(node.child(fan_out.slots()), None);
                }
            }
        }
    }
}

#[test]
fn a_node_in_a_place_that_is_not_its_own_is_refused() {
    let it = geometry(1 << 20, 4);
    let good = encode(&it, 1, &[(0, content(1)), (3, content(2))]);
    let decode = |bytes: Vec<u8>| Node::decode(bytes.into(), &it, 1).unwrap_err();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = byte;
        decode(bytes)
    };
    assert!(Node::decode(good.clone(), &it, 1).is_ok());
    assert_eq!(with(0, b'X'), NodeError::Magic);
    assert_eq!(with(4, 2), NodeError::Version(2));
    assert_eq!(with(5, 0), NodeError::Level { expected: 1, actual: 0 });
    assert_eq!(with(6, 3), NodeError::FanOut { expected: it.fan_out, actual: 3 });
    assert_eq!(with(7, 16), NodeError::ChunkSize { expected: it.chunk_size, actual: 16 });
    assert_eq!(with(8, 0b1_1001), NodeError::Bitmap);
    assert_eq!(with(8, 0), NodeError::Empty);
    assert_eq!(with(8, 0b1011), NodeError::Length { expected: 105, actual: 73 });
    assert_eq!(decode([&good[..], &[0]].concat()), NodeError::Length { expected: 73, actual: 74 });
    for cut in 0..good.len() {
        assert!(matches!(decode(good[..cut].to_vec()), NodeError::Length { .. }), "cut at {cut}");
    }
}

proptest! {
    /// Whatever decodes is exactly what encoding it again gives: no two encodings of one node.
    #[test]
    fn any_bytes_are_refused_or_canonical(
        fan_out_bits in 1u32..=10, level in 0u32..27, junk in prop::collection::vec(any::<u8>(), 0..200),
        slots in prop::collection::btree_set(0usize..1024, 1..9),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..3),
        cut: prop::sample::Index,
    ) {
        let it = geometry(1, 1 << fan_out_bits);
        let present: BTreeMap<usize, Hash> =
            slots.iter().map(|slot| (slot % it.fan_out.slots(), content(*slot as u64))).collect();
        let present: Vec<_> = present.into_iter().collect();
        let mut bytes = encode(&it, level, &present).to_vec();
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let short = bytes[..cut.index(bytes.len())].to_vec();
        for bytes in [junk, bytes, short] {
            if let Ok(node) = Node::decode(bytes.clone().into(), &it, level) {
                let children: Vec<_> = node.children().collect();
                prop_assert_eq!(encode(&it, level, &children), bytes);
            }
        }
    }

    #[test]
    fn any_root_is_refused_or_possible(
        size_bytes: u64, chunk_size: u32, fan_out: u32, node in prop::collection::vec(any::<u8>(), 0..40),
        plausible in (0u64..1 << 44, 14u32..25, 0u32..13, prop::option::of(any::<[u8; 32]>())),
    ) {
        let wild = v1::TreeRoot { size_bytes, chunk_size, fan_out, node: node.into() };
        let (size_bytes, chunk_bits, fan_out_bits, node) = plausible;
        let plausible = v1::TreeRoot {
            size_bytes,
            chunk_size: 1 << chunk_bits,
            fan_out: 1 << fan_out_bits,
            node: node.map(|id| Bytes::copy_from_slice(&id)).unwrap_or_default(),
        };
        for wire in [wild, plausible] {
            if let Ok(root) = Root::try_from(&wire) {
                prop_assert_eq!(root.to_wire(), wire);
                prop_assert!(root.geometry.depth() <= 27);
            }
        }
    }
}

#[test]
fn impossible_roots_say_why() {
    let good = Root { geometry: geometry(4, 2), node: Some(content(1)) }.to_wire();
    assert!(Root::try_from(&good).is_ok());
    let refused = |wire: v1::TreeRoot| Root::try_from(&wire).unwrap_err();
    let size_bytes = IMAGE_SIZE_MAX + 1;
    assert_eq!(
        refused(v1::TreeRoot { size_bytes, ..good.clone() }),
        GeometryError::TooLarge(size_bytes)
    );
    for fan_out in [0, 1, 3, 2048, 65_538, u32::MAX] {
        let error = refused(v1::TreeRoot { fan_out, ..good.clone() });
        assert_eq!(error, GeometryError::FanOut(fan_out));
    }
    for chunk_size in [0, 1 << 15, 3 << 16, 1 << 23] {
        let error = refused(v1::TreeRoot { chunk_size, ..good.clone() });
        assert!(matches!(error, GeometryError::ChunkSize(_)));
    }
    let node = Bytes::from_static(&[1; 31]);
    assert_eq!(refused(v1::TreeRoot { node, ..good.clone() }), GeometryError::NodeId(31));
    assert_eq!(
        refused(v1::TreeRoot { size_bytes: 0, ..good }),
        GeometryError::NodeOfNothing(content(1))
    );
}

/// Every way to read a tree refuses it.
fn refusals(nodes: &dyn NodeSource, root: &Root) -> Vec<TreeError> {
    let whole = 0..root.geometry.chunks();
    let all: Vec<Change> = [(0, Some(content(77)))].into();
    let zeros = Root::empty(root.geometry);
    vec![
        now(lookup(nodes, root, 0, root.geometry.chunks() as usize)).unwrap_err(),
        now(for_each_present(nodes, root, whole, &mut |_, _| {})).unwrap_err(),
        now(for_each_node(nodes, root, &mut |_| true)).unwrap_err(),
        now(update(nodes, root, root.geometry, &all)).unwrap_err(),
        now(diff(nodes, root, &zeros, &mut |_, _, _| {})).unwrap_err(),
        now(diff(nodes, &zeros, root, &mut |_, _, _| {})).unwrap_err(),
    ]
}

#[test]
fn a_wrong_graft_is_refused_and_named() {
    let nodes = Nodes::default();
    let it = geometry(8, 2);
    let leaf = nodes.put(encode(&it, 0, &[(0, content(1)), (1, content(2))]));
    let middle = nodes.put(encode(&it, 1, &[(0, leaf)]));
    let other = Geometry { chunk_size: ChunkSize::MIN, ..it };
    let of_other_chunks = nodes.put(encode(&other, 1, &[(0, leaf)]));
    let wide = geometry(8, 4);
    let of_other_fan_out = nodes.put(encode(&wide, 1, &[(0, leaf)]));
    let no_node = nodes.put(Bytes::from_static(b"the bytes of a chunk"));
    let empty = nodes.put(Bytes::from_static(b"BCTN\x01\x01\x01\x12\0"));
    // A middle node, a leaf and a chunk where a middle node belongs, and the top as its own child.
    for (wrong, level) in [
        (leaf, 1),
        (of_other_chunks, 1),
        (of_other_fan_out, 1),
        (no_node, 1),
        (empty, 1),
        (middle, 0),
    ] {
        let top = match level {
            1 => encode(&it, 2, &[(0, wrong)]),
            _ => encode(&it, 2, &[(0, nodes.put(encode(&it, 1, &[(0, wrong)])))]),
        };
        let root = Root { geometry: it, node: Some(nodes.put(top)) };
        for error in refusals(&nodes, &root) {
            assert!(matches!(error, TreeError::Node { id, .. } if id == wrong), "{error}");
            assert!(error.is_damage() && !error.is_transient());
            assert!(error.to_string().contains(&wrong.to_string()), "{error}");
        }
    }
}

#[test]
fn a_node_beyond_the_end_is_refused() {
    let nodes = Nodes::default();
    // The last node of level 0 has one chunk of four, the top two children of four.
    let it = geometry(5, 4);
    let leaf = nodes.put(encode(&it, 0, &[(0, content(1)), (1, content(2))]));
    for (top, wrong, chunk) in [
        (vec![(0, leaf), (1, leaf)], leaf, 5),
        (vec![(0, leaf), (2, leaf)], Hash::of(&encode(&it, 1, &[(0, leaf), (2, leaf)])), 8),
    ] {
        let root = Root { geometry: it, node: Some(nodes.put(encode(&it, 1, &top))) };
        let beyond = NodeError::BeyondEnd { chunk, chunks: 5 };
        for error in [
            now(lookup(&nodes, &root, 4, 1)).unwrap_err(),
            now(for_each_node(&nodes, &root, &mut |_| true)).unwrap_err(),
            now(update(&nodes, &root, geometry(9, 4), &[(5, None)])).unwrap_err(),
            now(diff(&nodes, &root, &Root::empty(it), &mut |_, _, _| {})).unwrap_err(),
        ] {
            assert!(
                matches!(&error, TreeError::Node { id, error } if *id == wrong && *error == beyond),
                "{error}"
            );
        }
    }
}

#[test]
fn a_survey_finds_all_damage_and_all_else() {
    let nodes = Nodes::default();
    let it = geometry(20_000, 2);
    let model: BTreeMap<u64, Hash> = (0..20_000).map(|i| (i, content(i))).collect();
    let root = nodes.build(it, &model);
    let leaves: Vec<(u64, Hash)> = nodes
        .walk(&root)
        .into_iter()
        .filter_map(|reached| match reached {
            Reached::Node { id, level: 0, first_chunk } => Some((first_chunk, id)),
            _ => None,
        })
        .collect();
    let gone = [leaves[0], leaves[7], leaves[4095], leaves[9999]];
    for (_, id) in &gone {
        nodes.stored.lock().unwrap().remove(id);
    }
    let (mut chunks, mut last, mut lost) = (0, None, Vec::new());
    let mut visit = |reached| {
        if let Reached::Chunk { index, .. } = reached {
            assert!(last.replace(index).is_none_or(|last| last < index), "ascending");
            chunks += 1;
        }
        true
    };
    let mut tell = |part: Lost| lost.push((part.id, part.level, part.chunks));
    let (result, cost) = nodes.cost_of(|| now(survey(&nodes, &root, &mut visit, &mut tell)));
    assert!(result.is_ok());
    assert!(cost.requests < 200, "damage is found by halves, not node by node: {cost:?}");
    assert_eq!(chunks, 20_000 - 8);
    let expected: Vec<_> = gone.iter().map(|(first, id)| (*id, 0, *first..first + 2)).collect();
    assert_eq!(lost, expected);
    assert!(now(for_each_node(&nodes, &root, &mut |_| true)).unwrap_err().is_damage());
    assert!(now(survey(&Away, &root, &mut |_| true, &mut |_| {})).unwrap_err().is_transient());
}

/// What was seen before is not read again.
#[test]
fn a_collector_marks_only_what_is_new() {
    let nodes = Nodes::default();
    let it = geometry(4096, 16);
    let full: Vec<Change> = (0..4096).map(|i| (i, Some(content(i)))).collect();
    let first = nodes.update(&Root::empty(it), it, &full);
    let second = nodes.update(&first.root, it, &[(77, Some(content(!0)))]);
    let mut marked = std::collections::HashSet::new();
    for (root, new) in [(first.root, first.new_nodes.len()), (second.root, 3)] {
        let mut visit = |reached| match reached {
            Reached::Node { id, .. } | Reached::Chunk { id, .. } => marked.insert(id),
        };
        let (result, cost) = nodes.cost_of(|| now(for_each_node(&nodes, &root, &mut visit)));
        assert!(result.is_ok());
        assert_eq!(cost.nodes, new as u64);
    }
    assert_eq!(marked.len(), nodes.len() + 4096 + 1);
}

/// Answers too few nodes.
struct Short;

#[async_trait::async_trait]
impl NodeSource for Short {
    async fn nodes(&self, _: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        Ok(Vec::new())
    }
}

/// Cannot be reached.
struct Away;

#[async_trait::async_trait]
impl NodeSource for Away {
    async fn nodes(&self, _: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        Err(StoreError::Unavailable("nobody answers".into()))
    }
}

#[test]
fn a_source_that_fails_is_told_apart() {
    let root = Root { geometry: geometry(8, 2), node: Some(content(1)) };
    for error in refusals(&Short, &root) {
        assert!(matches!(error, TreeError::Source { asked: 1, answered: 0 }), "{error}");
    }
    for error in refusals(&Away, &root) {
        assert!(error.is_transient() && !error.is_damage(), "{error}");
    }
    for error in refusals(&Nodes::default(), &root) {
        assert!(error.is_damage() && !error.is_transient(), "{error}");
    }
}

#[test]
fn impossible_updates_say_why() {
    let nodes = Nodes::default();
    let it = geometry(8, 2);
    let root = Root::empty(it);
    let refused =
        |geometry, changes: &[Change]| now(update(&nodes, &root, geometry, changes)).unwrap_err();
    assert!(matches!(refused(it, &[(8, None)]), TreeError::BeyondEnd { index: 8, chunks: 8 }));
    assert!(matches!(
        refused(it, &[(3, None), (3, None)]),
        TreeError::Unsorted { index: 3, after: 3 }
    ));
    assert!(matches!(
        refused(it, &[(3, None), (1, None)]),
        TreeError::Unsorted { index: 1, after: 3 }
    ));
    let too_large = Geometry { size_bytes: u64::MAX, ..it };
    assert!(matches!(refused(too_large, &[]), TreeError::Geometry(GeometryError::TooLarge(_))));
    for other in [geometry(8, 4), Geometry { chunk_size: ChunkSize::MIN, ..it }] {
        let incompatible =
            |error| matches!(error, TreeError::Geometry(GeometryError::Incompatible(..)));
        assert!(incompatible(refused(other, &[])));
        assert!(incompatible(nodes.diff(&root, &Root::empty(other)).unwrap_err()));
    }
    let mut updater = now(Updater::new(&nodes, &root, it)).unwrap();
    now(updater.apply(&nodes, &[(3, None)])).unwrap();
    let error = now(updater.apply(&nodes, &[(2, None)])).unwrap_err();
    assert!(matches!(error, TreeError::Unsorted { index: 2, after: 3 }));

    // Made by hand, as no wire form gives it.
    let of_nothing = Root { geometry: geometry(0, 2), node: Some(content(1)) };
    assert!(now(update(&nodes, &of_nothing, it, &[])).is_err());
    assert!(nodes.diff(&of_nothing, &root).is_err());
    assert_eq!(nodes.lookup(&of_nothing, 0, 2), [None, None]);
}
