//! Large disks, few chunks: every geometry that there is.

use std::collections::BTreeMap;

use blobcr_proto::units::IMAGE_SIZE_MAX;
use blobcr_proto::{ChunkSize, Hash};
use proptest::prelude::*;

use super::super::{Present, Updater};
use super::{
    Change, FanOut, Geometry, Nodes, Reached, Root, chunk_sizes, content, diff_nodes_max, fan_outs,
    model_diff, now,
};

#[derive(Clone, Debug)]
struct Step {
    /// Bytes: any size, near a power of two, or none.
    size: Option<u64>,
    /// Runs: where, how long, and what (0: a hole).
    runs: Vec<(u64, u64, u64)>,
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..=IMAGE_SIZE_MAX,
        (16u32..=43, -1i64..=1).prop_map(|(bits, off)| (1u64 << bits)
            .saturating_add_signed(off << 12)
            .min(IMAGE_SIZE_MAX)),
        0u64..1 << 22,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let start = prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), 0u64..3000];
    let runs = prop::collection::vec((start, 1u64..40, 0u64..5), 0..6);
    (prop::option::weighted(0.3, size()), runs).prop_map(|(size, runs)| Step { size, runs })
}

fn changes(step: &Step, chunks: u64) -> Vec<Change> {
    let mut changes = BTreeMap::new();
    for (start, len, what) in &step.runs {
        // The last chunk is as likely as the first.
        let start = if *start == u64::MAX { chunks.wrapping_sub(1) } else { *start };
        let Some(start) = start.checked_rem(chunks) else { continue };
        for index in start..(start + len).min(chunks) {
            changes.insert(index, (*what != 0).then(|| content(what + index % 3)));
        }
    }
    changes.into_iter().collect()
}

fn change_model(model: &mut BTreeMap<u64, Hash>, chunks: u64, changes: &[Change]) {
    model.split_off(&chunks);
    for (index, id) in changes {
        match id {
            Some(id) => model.insert(*index, *id),
            None => model.remove(index),
        };
    }
}

fn check_step(nodes: &Nodes, before: &Root, geometry: Geometry, changes: &[Change]) -> Root {
    let mut model = nodes.present(before);
    let model_before = model.clone();
    change_model(&mut model, geometry.chunks(), changes);
    let (updated, cost) = nodes.cost_of(|| nodes.update(before, geometry, changes));
    let root = updated.root;
    let depths = u64::from(before.geometry.depth() + geometry.depth());
    let touched = changes.len() as u64 + 1;
    assert!(cost.nodes <= touched * depths, "reads {cost:?} for {touched} ways");
    assert!(updated.new_nodes.len() as u64 <= touched * depths);

    assert_eq!(nodes.present(&root), model);
    assert_eq!(root, nodes.build(geometry, &model), "canonical");
    let (found, cost) = nodes.cost_of(|| nodes.diff(before, &root).unwrap());
    assert_eq!(found, model_diff(&model_before, &model));
    assert!(cost.nodes <= diff_nodes_max(before, &root, found.len()), "{cost:?}");
    for (index, a, b) in found {
        assert_eq!(nodes.lookup(before, index, 1), [a]);
        assert_eq!(nodes.lookup(&root, index, 1), [b]);
    }
    root
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn histories_of_sparse_disks(
        chunk_bits in 16u32..=22, fan_out_bits in 1u32..=10, first_size in size(),
        steps in prop::collection::vec(step(), 1..8),
    ) {
        let nodes = Nodes::default();
        let chunk_size = ChunkSize::new(1 << chunk_bits).unwrap();
        let fan_out = FanOut::new(1 << fan_out_bits).unwrap();
        let mut geometry = Geometry::new(first_size, chunk_size, fan_out).unwrap();
        let mut root = Root::empty(geometry);
        let mut all = vec![root];
        for step in &steps {
            geometry.size_bytes = step.size.unwrap_or(geometry.size_bytes);
            root = check_step(&nodes, &root, geometry, &changes(step, geometry.chunks()));
            all.push(root);
        }
        // Any two snapshots of the history, in both directions.
        let models: Vec<_> = all.iter().map(|root| nodes.present(root)).collect();
        for (a, model_a) in all.iter().zip(&models) {
            for (b, model_b) in all.iter().zip(&models) {
                prop_assert_eq!(nodes.diff(a, b).unwrap(), model_diff(model_a, model_b));
            }
        }
    }

    #[test]
    fn ranges_are_parts_of_the_whole(
        fan_out_bits in 1u32..=10, first_size in size(), steps in prop::collection::vec(step(), 1..4),
        first: u64, count in 0usize..3000,
    ) {
        let nodes = Nodes::default();
        let fan_out = FanOut::new(1 << fan_out_bits).unwrap();
        let geometry = Geometry::new(first_size, ChunkSize::MIN, fan_out).unwrap();
        let mut model = BTreeMap::new();
        for step in &steps {
            change_model(&mut model, geometry.chunks(), &changes(step, geometry.chunks()));
        }
        let root = nodes.build(geometry, &model);
        // Near chunks that are there, across the end, and beyond it.
        let near = model.keys().nth(first as usize % model.len().max(1)).copied().unwrap_or(first);
        for first in [first, near, near.saturating_sub(count as u64 / 2), geometry.chunks()] {
            let expected: Vec<_> = (0..count as u64)
                .map(|i| first.checked_add(i).and_then(|index| model.get(&index).copied()))
                .collect();
            prop_assert_eq!(nodes.lookup(&root, first, count), expected);
        }
    }

    #[test]
    fn an_update_in_parts_is_the_same(
        fan_out_bits in 1u32..=10, old in step(), new in step(), sizes in (size(), size()),
        cuts in prop::collection::vec(0.0..1.0, 0..4),
    ) {
        let nodes = Nodes::default();
        let fan_out = FanOut::new(1 << fan_out_bits).unwrap();
        let base = Geometry::new(sizes.0, ChunkSize::DEFAULT, fan_out).unwrap();
        let geometry = Geometry::new(sizes.1, ChunkSize::DEFAULT, fan_out).unwrap();
        let root = nodes.update(&Root::empty(base), base, &changes(&old, base.chunks())).root;
        let changes = changes(&new, geometry.chunks());
        let whole = nodes.update(&root, geometry, &changes);

        let mut cuts: Vec<_> = cuts.iter().map(|cut| (changes.len() as f64 * cut) as usize).collect();
        cuts.sort_unstable();
        let mut updater = now(Updater::new(&nodes, &root, geometry)).unwrap();
        let (mut parts, mut at) = (Vec::new(), 0);
        for cut in cuts.into_iter().chain([changes.len()]) {
            parts.extend(now(updater.apply(&nodes, &changes[at..cut])).unwrap());
            at = cut;
        }
        let last = now(updater.finish(&nodes)).unwrap();
        parts.extend(last.new_nodes);
        prop_assert_eq!(last.root, whole.root);
        let ids = |nodes: &[super::NewNode]| {
            let mut ids: Vec<_> = nodes.iter().map(|node| node.id).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        prop_assert_eq!(ids(&parts), ids(&whole.new_nodes));
    }
}

#[test]
fn the_largest_disk_at_every_chunk_size_and_fan_out() {
    for chunk_size in chunk_sizes() {
        for fan_out in fan_outs() {
            let nodes = Nodes::default();
            let geometry = Geometry::new(IMAGE_SIZE_MAX, chunk_size, fan_out).unwrap();
            let last = geometry.chunks() - 1;
            let model: BTreeMap<u64, Hash> =
                [0, 1, last / 2, last].into_iter().map(|index| (index, content(index))).collect();
            let root = nodes.build(geometry, &model);
            let depth = u64::from(geometry.depth());
            assert!(nodes.len() as u64 <= 4 * depth, "absent parts take no nodes");
            assert_eq!(nodes.present(&root), model);
            for index in [0, 1, 2, last / 2, last - 1, last] {
                let (found, cost) = nodes.cost_of(|| nodes.lookup(&root, index, 1));
                assert_eq!(found, [model.get(&index).copied()]);
                assert!(cost.requests <= depth && cost.nodes <= depth);
            }
            let cut = Geometry::new(1, chunk_size, fan_out).unwrap();
            let small = nodes.update(&root, cut, &[]).root;
            assert_eq!(small, nodes.build(cut, &BTreeMap::from([(0, content(0))])));
            let nothing = Geometry::new(0, chunk_size, fan_out).unwrap();
            for root in [&root, &small] {
                let gone = nodes.update(root, nothing, &[]).root;
                assert_eq!(gone, Root::empty(nothing));
                assert_eq!(nodes.update(&gone, geometry, &[]).root, Root::empty(geometry));
            }
            let holes: Vec<Change> = model.keys().map(|index| (*index, None)).collect();
            assert_eq!(nodes.update(&root, geometry, &holes).root, Root::empty(geometry));
        }
    }
}

/// More nodes on a level than one request takes, so that windows meet.
#[test]
fn a_full_disk_in_windows() {
    for fan_out in [2, 4, 16, 64, 1024] {
        let nodes = Nodes::default();
        let fan_out = FanOut::new(fan_out).unwrap();
        let chunks = 20_000u64.max(u64::from(fan_out.get()) * 300);
        let geometry = Geometry::new(chunks << 16, ChunkSize::MIN, fan_out).unwrap();
        let mut model: BTreeMap<u64, Hash> = (0..chunks).map(|i| (i, content(i))).collect();
        let root = nodes.build(geometry, &model);
        assert_eq!(nodes.present(&root), model);
        let expected: Vec<_> = model.values().copied().map(Some).collect();
        assert_eq!(nodes.lookup(&root, 0, chunks as usize), expected);
        let reached = nodes.walk(&root);
        assert_eq!(
            reached.iter().filter(|r| matches!(r, Reached::Node { .. })).count(),
            nodes.len()
        );

        let every_other: Vec<Change> =
            (0..chunks).step_by(2).map(|i| (i, Some(content(!i)))).collect();
        change_model(&mut model, chunks, &every_other);
        let changed = nodes.update(&root, geometry, &every_other).root;
        assert_eq!(changed, nodes.build(geometry, &model));
        assert_eq!(nodes.diff(&root, &changed).unwrap().len(), every_other.len());
        assert_eq!(nodes.diff(&changed, &Root::empty(geometry)).unwrap().len(), model.len());
    }
}

#[test]
fn pages_are_bounded_and_an_error_ends_them() {
    for fan_out in fan_outs() {
        assert!(super::super::source::window(fan_out) * fan_out.slots() <= 1 << 18);
    }
    let nodes = Nodes::default();
    let fan_out = FanOut::new(2).unwrap();
    let geometry = Geometry::new(20_000 << 16, ChunkSize::MIN, fan_out).unwrap();
    let model: BTreeMap<u64, Hash> = (0..20_000).map(|i| (i, content(i))).collect();
    let root = nodes.build(geometry, &model);
    let mut present = Present::new(&root, 5..15_000);
    let mut pages = Vec::new();
    while let Some(page) = now(present.next(&nodes)).unwrap() {
        pages.push(page);
    }
    assert!(pages.len() > 1 && pages.iter().all(|page| !page.is_empty()));
    assert!(pages.concat().iter().copied().eq(model.range(5..15_000).map(|(i, id)| (*i, *id))));

    nodes.stored.lock().unwrap().remove(&root.node.unwrap());
    let mut present = Present::new(&root, 0..10);
    assert!(now(present.next(&nodes)).unwrap_err().is_damage());
    assert_eq!(now(present.next(&nodes)).unwrap(), None);
}

/// What is replaced as a whole is not read.
#[test]
fn a_rewritten_disk_reads_no_leaves() {
    let nodes = Nodes::default();
    let fan_out = FanOut::new(16).unwrap();
    let geometry = Geometry::new(1000 << 16, ChunkSize::MIN, fan_out).unwrap();
    let of = |version: u64| -> Vec<Change> {
        (0..1000).map(|i| (i, Some(content(i + version * 1000)))).collect()
    };
    let root = nodes.update(&Root::empty(geometry), geometry, &of(0)).root;
    let (updated, cost) = nodes.cost_of(|| nodes.update(&root, geometry, &of(1)));
    assert_eq!(cost.nodes, 1 + 4, "the top and the four below it");
    assert_eq!(updated.new_nodes.len(), 63 + 4 + 1);
    assert_eq!(cost.requests, u64::from(geometry.depth()) - 1);
    let again = nodes.update(&updated.root, geometry, &of(1));
    assert_eq!(again.root, updated.root);
    assert_eq!(again.new_nodes, [], "equal bytes make no new nodes");
}
