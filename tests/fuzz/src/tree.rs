//! What `repository` decodes: tree nodes, whole trees of nodes that a faulty writer made, shards,
//! placement tables.

use std::collections::BTreeMap;

use async_trait::async_trait;
use blobcr_proto::codec::crc32c;
use blobcr_proto::policy::Policy;
use blobcr_proto::record::{open, whole};
use blobcr_proto::v1::{self, Codec, RecordKind};
use blobcr_proto::{ChunkSize, Hash};
use blobcr_repository::StoreError;
use blobcr_repository::placement::Placement;
use blobcr_repository::stripe::{HEADER_LEN, Shard, Stripe};
use blobcr_repository::tree::node::Node;
use blobcr_repository::tree::{
    FanOut, Geometry, NodeSource, Root, diff, for_each_present, lookup, survey, update,
};
use bytes::Bytes;
use prost::Message;

use crate::input::Input;
use crate::{Target, block_on, hex, joined};

/// Tree nodes: what decodes is the one encoding of its children.
pub const NODE: Target = Target { check: node, seeds: node_seeds };

fn geometry(input: &mut Input<'_>, chunks: u64) -> Geometry {
    let fan_out = FanOut::new(1 << (input.u8() % 10 + 1)).expect("a power of two in range");
    let chunk_size = ChunkSize::new(1 << (input.u8() % 7 + 16)).expect("a power of two in range");
    let size_bytes = (chunks * chunk_size.bytes()).saturating_sub(u64::from(input.u8()));
    Geometry::new(size_bytes, chunk_size, fan_out).expect("smaller than the largest image")
}

fn node_header(geometry: &Geometry, level: u8) -> [u8; 8] {
    let chunk_bits = geometry.chunk_size.bytes().trailing_zeros() as u8;
    let [m0, m1, m2, m3] = *b"BCTN";
    [m0, m1, m2, m3, 1, level, geometry.fan_out.bits() as u8, chunk_bits]
}

/// A node by its description in `docs/formats.md`.
fn encoded(geometry: &Geometry, level: u8, children: &[(usize, Hash)]) -> Vec<u8> {
    let mut bitmap = vec![0u8; geometry.fan_out.slots().div_ceil(8)];
    for (slot, _) in children {
        bitmap[slot / 8] |= 1 << (slot % 8);
    }
    let hashes = children.iter().flat_map(|(_, id)| id.0).collect::<Vec<u8>>();
    joined(&[&node_header(geometry, level), &bitmap, &hashes])
}

fn node(input: &[u8]) {
    let mut input = Input(input);
    let (flags, level) = (input.u8(), input.u8());
    let geometry = geometry(&mut input, 1 << 20);
    let bytes = if flags & 1 != 0 {
        joined(&[&node_header(&geometry, level), input.0])
    } else {
        input.0.to_vec()
    };
    let Ok(node) = Node::decode(bytes.clone().into(), &geometry, level.into()) else { return };
    let children: Vec<(usize, Hash)> = node.children().collect();
    assert_eq!(encoded(&geometry, level, &children), bytes);
    assert_eq!(children.last().map(|(slot, _)| *slot), Some(node.last_slot()));
    let by_slot: BTreeMap<usize, Hash> = children.into_iter().collect();
    for slot in 0..geometry.fan_out.slots() + 2 {
        assert_eq!(node.child(slot), by_slot.get(&slot).copied());
    }
}

fn node_seeds() -> Vec<Vec<u8>> {
    let narrow = hex(include_str!("../../../repository/golden/tree-node-v1-fan-out-2.hex"));
    let wide = hex(include_str!("../../../repository/golden/tree-node-v1-fan-out-64.hex"));
    let of = |node: &[u8]| {
        let (level, fan_out, chunk) = (node[5], node[6], node[7]);
        let head = [0, level, fan_out - 1, chunk - 16, 0];
        let sealed = [1, level, fan_out - 1, chunk - 16, 0];
        [joined(&[&head, node]), joined(&[&sealed, &node[8..]])]
    };
    [of(&narrow), of(&wide)].concat()
}

/// Trees whose nodes say what they like: whoever walks comes to an end, in order and within the
/// disk; and a tree without a fault is changed as a model is.
pub const WALK: Target = Target { check: walk, seeds: walk_seeds };

/// Chunks of a disk: a walk comes to each at most once, so this bounds its time.
const CHUNKS_MAX: u64 = 512;
/// Nodes and chunks are named by their first byte repeated.
fn named(name: u8) -> Hash {
    Hash([name; Hash::LEN])
}

#[derive(Debug, Default)]
struct Nodes(BTreeMap<Hash, Bytes>);

#[async_trait]
impl NodeSource for Nodes {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let missing = |id: &Hash| StoreError::Missing { kind: RecordKind::TreeNode, id: *id };
        ids.iter().map(|id| self.0.get(id).cloned().ok_or_else(|| missing(id))).collect()
    }
}

/// Nodes out of an input: for each a level and children; children are nodes or chunks by name.
fn hostile_nodes(input: &mut Input<'_>, geometry: &Geometry) -> Nodes {
    let mut nodes = Nodes::default();
    for name in 0..input.u8() % 32 {
        let (level, count) = (input.u8() % 12, input.u8() % 16);
        let slots = geometry.fan_out.slots();
        let children: BTreeMap<usize, Hash> = (0..count)
            .map(|_| (usize::from(input.u16()) % slots, named(input.u8())))
            .collect();
        let children: Vec<(usize, Hash)> = children.into_iter().collect();
        nodes.0.insert(named(name), encoded(geometry, level, &children).into());
    }
    nodes
}

type Content = BTreeMap<u64, Hash>;

fn content(nodes: &Nodes, root: &Root) -> Option<Content> {
    let (mut found, mut next) = (Content::new(), 0);
    let mut visit = |index, id| {
        assert!((next..root.geometry.chunks()).contains(&index), "out of order or of the disk");
        next = index + 1;
        found.insert(index, id);
    };
    let walked = block_on(for_each_present(nodes, root, 0..u64::MAX, &mut visit));
    walked.is_ok().then_some(found)
}

fn walk(input: &[u8]) {
    let mut input = Input(input);
    let chunks = u64::from(input.u16()) % (CHUNKS_MAX + 1);
    let base = geometry(&mut input, chunks);
    let mut nodes = hostile_nodes(&mut input, &base);
    let root = Root { geometry: base, node: (chunks > 0).then(|| named(input.u8() % 33)) };
    if root.geometry.chunks() == 0 && root.node.is_some() {
        return;
    }
    block_on(survey(&nodes, &root, &mut |_| true, &mut |_| {})).expect("nothing is out of reach");
    let before = content(&nodes, &root);
    let looked = block_on(lookup(&nodes, &root, 0, CHUNKS_MAX as usize));
    assert_eq!(looked.is_ok(), before.is_some());
    let chunks = u64::from(input.u16()) % (CHUNKS_MAX + 1);
    let size_bytes = chunks * base.chunk_size.bytes();
    let resized = Geometry { size_bytes, ..base };
    let changes: BTreeMap<u64, Option<Hash>> = (0..input.u8() % 32)
        .filter(|_| chunks > 0)
        .map(|_| {
            let (index, name) = (u64::from(input.u16()) % chunks, input.u8());
            (index, (name != 0).then(|| named(name)))
        })
        .collect();
    let changes: Vec<(u64, Option<Hash>)> = changes.into_iter().collect();
    let updated = block_on(update(&nodes, &root, resized, &changes));
    let Some(mut model) = before.clone() else { return };
    let found = looked.expect("as the walk");
    let model_found = (0..CHUNKS_MAX).map(|index| model.get(&index).copied());
    assert!(found.into_iter().eq(model_found), "a lookup and a walk differ");
    let updated = updated.expect("a tree without a fault can be changed");
    nodes.0.extend(updated.new_nodes.into_iter().map(|node| (node.id, node.encoding)));
    model.retain(|index, _| *index < chunks);
    for (index, id) in changes {
        match id {
            Some(id) => drop(model.insert(index, id)),
            None => drop(model.remove(&index)),
        }
    }
    assert_eq!(content(&nodes, &updated.root).as_ref(), Some(&model));
    differs(&nodes, (&root, &before.unwrap_or_default()), (&updated.root, &model));
}

fn differs(nodes: &Nodes, (a, a_content): (&Root, &Content), (b, b_content): (&Root, &Content)) {
    let mut told = Vec::new();
    let mut visit = |index, a, b| told.push((index, a, b));
    block_on(diff(nodes, a, b, &mut visit)).expect("both can be read");
    let expected: Vec<_> = (0..CHUNKS_MAX)
        .map(|at| (at, a_content.get(&at).copied(), b_content.get(&at).copied()))
        .filter(|(_, a, b)| a != b)
        .collect();
    assert_eq!(told, expected);
}

fn walk_seeds() -> Vec<Vec<u8>> {
    // Five chunks, fan-out 2: three levels; node 0 above 1 and 2, and so on.
    let small: &[u8] = &[
        5, 0, 0, 0, 3, 5, 2, 2, 0, 0, 1, 1, 0, 2, 1, 2, 0, 0, 3, 1, 0, 4, 1, 1, 0, 0, 4, 0, 2, 0,
        0, 9, 1, 0, 8, 0, 1, 0, 0, 7, 0, 6, 0, 2, 4, 0, 9, 0, 0, 0,
    ];
    // One level, fan-out 64.
    let wide: &[u8] =
        &[40, 0, 5, 0, 0, 1, 0, 3, 1, 0, 9, 7, 0, 8, 39, 0, 7, 0, 60, 0, 1, 50, 0, 3];
    vec![small.to_vec(), wide.to_vec()]
}

/// Shards: any that are whole give their record back, and no others give one with a wrong checksum.
pub const SHARDS: Target = Target { check: shards, seeds: shard_seeds };

fn shards(input: &[u8]) {
    let mut input = Input(input);
    let (data, parity) = (input.u8() % 6 + 2, input.u8() % 4 + 1);
    let stripe = Stripe::of(Policy::Erasure { data, parity }).expect("a policy with parity");
    let (mask, edits, codec) = (input.u16(), input.u8() % 8, input.u8());
    let edits: Vec<_> = (0..edits).map(|_| (input.u8(), input.u16(), input.u8())).collect();
    let plain = input.0;
    let record = match codec % 2 {
        0 => whole(RecordKind::Chunk, Hash::of(plain), Codec::Plain, plain.len(), input.0.to_vec().into()),
        // Never decoded here: any codec's payload is cut alike.
        _ => whole(RecordKind::TreeNode, Hash::of(plain), Codec::Zstd, 70_000, input.0.to_vec().into()),
    };
    let mut cut = stripe.cut(&record).expect("it is whole");
    for (shard, at, flip) in &edits {
        let shard = &mut cut[usize::from(*shard) % stripe.shards()];
        let mut payload = shard.payload.to_vec();
        // Mostly the header: there is nothing to find in the rest.
        let at = usize::from(*at) % (payload.len().min(HEADER_LEN + 4));
        payload[at] ^= flip;
        shard.payload_crc32c = crc32c(&payload);
        shard.payload = payload.into();
    }
    let opened: Vec<Shard> = cut.iter().filter_map(|shard| stripe.open(shard).ok()).collect();
    let chosen: Vec<&Shard> =
        opened.iter().filter(|shard| mask >> shard.number & 1 == 1).collect();
    let Ok(joined) = stripe.join(&chosen) else {
        let enough = chosen.len() >= stripe.needed();
        assert!(!enough || edits.iter().any(|(.., flip)| *flip != 0), "sound shards do not fit");
        return;
    };
    assert_eq!(crc32c(&joined.payload), joined.payload_crc32c);
    if codec % 2 == 0 && joined.payload == record.payload {
        open(&joined).expect("it is what it was");
    }
    if edits.iter().all(|(.., flip)| *flip == 0) {
        assert_eq!(joined, record);
    }
}

fn shard_seeds() -> Vec<Vec<u8>> {
    vec![
        joined(&[&[2, 1, 0b0111_0110, 0, 0, 0], &[5; 300]]),
        joined(&[&[0, 0, 0b1010, 0, 2, 0, 1, 8, 0, 1, 2, 17, 0, 4], b"some plain bytes"]),
        joined(&[&[0, 2, 0xff, 0xff, 1, 1, 3, 4, 0, 1], b"a payload of zstd"]),
    ]
}

/// Placement tables and roots: a table that is taken sends every object to nodes that it has.
pub const PLACEMENT: Target = Target { check: placement, seeds: placement_seeds };

fn placement(input: &[u8]) {
    let mut input = Input(input);
    let width = usize::from(input.u8() % 9);
    if let Ok(wire) = v1::TreeRoot::decode(input.0)
        && let Ok(root) = Root::try_from(&wire)
    {
        assert_eq!(Root::try_from(&root.to_wire()), Ok(root));
        assert!(root.geometry.depth() <= 48);
    }
    let Ok(wire) = v1::PlacementTable::decode(input.0) else { return };
    let partitions = wire.partitions.len();
    let Ok(table) = Placement::new(wire, width) else { return };
    assert!(table.same_nodes(&table));
    for first in 0..=u8::MAX {
        let id = named(first);
        assert!(table.partition(&id) < partitions);
        let (holders, readers) = (table.holders(&id), table.readers(&id));
        assert!(holders.len() >= width && readers.starts_with(holders));
        let nodes = table.nodes().len();
        assert!(readers.iter().all(|node| (*node as usize) < nodes));
        let distinct: std::collections::BTreeSet<&u32> = readers.iter().collect();
        assert_eq!(distinct.len(), readers.len());
    }
}

fn placement_seeds() -> Vec<Vec<u8>> {
    let row = |node: [u32; 2], from: &[u32]| v1::PartitionNodes {
        node: node.to_vec(),
        moving_from: from.to_vec(),
    };
    let table = v1::PlacementTable {
        pool: 1,
        version: 3,
        nodes: vec![v1::Node::default(); 3],
        partitions: vec![row([0, 1], &[2]), row([1, 2], &[])],
    };
    let root = v1::TreeRoot {
        size_bytes: 10 << 30,
        chunk_size: 1 << 18,
        fan_out: 64,
        node: Bytes::from_static(&[3; 32]),
    };
    vec![joined(&[&[2], &table.encode_to_vec()]), joined(&[&[0], &root.encode_to_vec()])]
}
