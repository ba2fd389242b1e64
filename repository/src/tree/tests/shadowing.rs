//! The paper's figure 3.

use std::collections::BTreeMap;

use blobcr_proto::{ChunkSize, Hash};

use super::{FanOut, Geometry, Nodes, Reached, Root, content};

/// The segments `(first, end)` of a tree, from the whole disk to single chunks, as the paper draws
/// them: its leaves are the chunks' entries in our nodes of level 0.
fn segments(nodes: &Nodes, root: &Root) -> BTreeMap<(u64, u64), Hash> {
    let fan_out = u64::from(root.geometry.fan_out.get());
    let segment = |reached: &Reached| match *reached {
        Reached::Node { id, level, first_chunk } => {
            let end = first_chunk + fan_out.pow(level + 1);
            ((first_chunk, end.min(root.geometry.chunks())), id)
        }
        Reached::Chunk { id, index } => ((index, index + 1), id),
    };
    nodes.walk(root).iter().map(segment).collect()
}

#[test]
fn figure_3() {
    let nodes = Nodes::default();
    let geometry = Geometry::new(4 << 18, ChunkSize::DEFAULT, FanOut::MIN).unwrap();
    let chunk = |number: u64| content(number);

    // (a) Image A, snapshot 1: chunks C1 to C4.
    let first: Vec<_> = (0..4).map(|i| (i, Some(chunk(i + 1)))).collect();
    let a1 = nodes.update(&Root::empty(geometry), geometry, &first);
    assert_eq!(a1.new_nodes.len(), 3, "(0,2), (2,4), (0,4)");
    let of_a1 = segments(&nodes, &a1.root);
    let drawn = [(0, 1), (0, 2), (0, 4), (1, 2), (2, 3), (2, 4), (3, 4)];
    assert!(of_a1.keys().eq(&drawn));

    // (b) CLONE to image B, snapshot 1. The paper gives B a root of its own with the children of
    // A's; ours is addressed by its content, so it is A's: the clone is a second name for it, and
    // no node is written.
    let b1 = Root::try_from(&a1.root.to_wire()).unwrap();
    assert_eq!(b1, a1.root);
    assert_eq!(segments(&nodes, &b1), of_a1);

    // (c) COMMIT to image B, snapshot 2, with C4 changed.
    let b2 = nodes.update(&b1, geometry, &[(3, Some(chunk(5)))]);
    let of_b2 = segments(&nodes, &b2.root);
    assert!(of_b2.keys().eq(&drawn));
    let (shared, new): (Vec<_>, Vec<_>) =
        drawn.into_iter().partition(|segment| of_b2[segment] == of_a1[segment]);
    assert_eq!(shared, [(0, 1), (0, 2), (1, 2), (2, 3)]);
    assert_eq!(new, [(0, 4), (2, 4), (3, 4)]);
    let written: Vec<Hash> = b2.new_nodes.iter().map(|node| node.id).collect();
    assert_eq!(written, [of_b2[&(2, 4)], of_b2[&(0, 4)]], "children before parents");

    // Neither A nor B's first snapshot changed.
    assert_eq!(segments(&nodes, &a1.root), of_a1);
    assert_eq!(nodes.diff(&b1, &b2.root).unwrap(), [(3, Some(chunk(4)), Some(chunk(5)))]);
}
