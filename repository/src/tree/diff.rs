//! Where two disks differ.

use std::collections::VecDeque;

use blobcr_proto::Hash;

use super::TreeError;
use super::geometry::Root;
use super::node::Node;
use super::source::{NodeSource, fetch, window};

/// One of the two trees at some place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// Zeros.
    Absent,
    /// A node, or at the bottom a chunk.
    Is(Hash),
    /// Above the top of the less deep tree: all of that tree is below child 0.
    Above,
}

/// A place where the trees differ.
struct Differing {
    position: u64,
    a: Side,
    b: Side,
}

struct Tree<'r> {
    root: &'r Root,
    depth: u32,
}

impl Tree<'_> {
    /// What is at position 0 of `level`.
    fn leftmost(&self, level: u32) -> Side {
        match self.root.node {
            None => Side::Absent,
            Some(id) if level + 1 == self.depth => Side::Is(id),
            Some(_) => Side::Above,
        }
    }

    /// The children at each place of a level.
    async fn children(
        &self,
        source: &dyn NodeSource,
        level: u32,
        places: impl Iterator<Item = (u64, Side)> + Clone + Send,
    ) -> Result<Vec<Vec<(usize, Side)>>, TreeError> {
        let is = |(position, side)| match side {
            Side::Is(id) => Some((position, id)),
            Side::Absent | Side::Above => None,
        };
        let read: Vec<(u64, Hash)> = places.clone().filter_map(is).collect();
        let mut nodes = fetch(source, &self.root.geometry, level, &read).await?.into_iter();
        let below = |node: Node| node.children().map(|(slot, id)| (slot, Side::Is(id))).collect();
        let children = places.map(|(_, side)| match side {
            Side::Absent => Vec::new(),
            Side::Is(_) => nodes.next().map(below).unwrap_or_default(),
            Side::Above => vec![(0, self.leftmost(level - 1))],
        });
        Ok(children.collect())
    }
}

/// Calls `visit` with each chunk that is not the same in `a` and `b`, in ascending order: its
/// index, its identity in `a`, and in `b`; `None` for a hole and beyond a disk's end. The disks may
/// differ in size. Reads only nodes above chunks that differ, in bounded memory.
///
/// # Errors
/// When the trees differ in chunk size or fan-out, and when nodes cannot be read or are not what
/// their tree asks for; `visit` has then been called for chunks before those.
pub async fn diff(
    source: &dyn NodeSource,
    a: &Root,
    b: &Root,
    visit: &mut (dyn FnMut(u64, Option<Hash>, Option<Hash>) + Send),
) -> Result<(), TreeError> {
    a.check()?;
    b.check()?;
    a.geometry.check_compatible(&b.geometry)?;
    let bits = a.geometry.fan_out.bits();
    let a = Tree { root: a, depth: a.geometry.depth() };
    let b = Tree { root: b, depth: b.geometry.depth() };
    let Some(top) = a.depth.max(b.depth).checked_sub(1) else { return Ok(()) };
    let whole = Differing { position: 0, a: a.leftmost(top), b: b.leftmost(top) };
    let mut pending = Vec::new();
    if whole.a != whole.b {
        pending.push((top, VecDeque::from([whole])));
    }
    while let Some((level, places)) = pending.last_mut() {
        let level = *level;
        let now = places.len().min(window(a.root.geometry.fan_out));
        let now: Vec<Differing> = places.drain(..now).collect();
        if places.is_empty() {
            pending.pop();
        }
        let (of_a, of_b) = futures::try_join!(
            a.children(source, level, now.iter().map(|d| (d.position, d.a))),
            b.children(source, level, now.iter().map(|d| (d.position, d.b))),
        )?;
        let mut below = VecDeque::new();
        for ((parent, of_a), of_b) in now.iter().zip(of_a).zip(of_b) {
            merge(parent.position << bits, &of_a, &of_b, &mut below);
        }
        if level == 0 {
            for d in below {
                visit(d.position, chunk(d.a), chunk(d.b));
            }
        } else if !below.is_empty() {
            pending.push((level - 1, below));
        }
    }
    Ok(())
}

/// Adds the children that differ, in order.
fn merge(
    first: u64,
    mut a: &[(usize, Side)],
    mut b: &[(usize, Side)],
    below: &mut VecDeque<Differing>,
) {
    let take = |list: &mut &[(usize, Side)], slot| match list.split_first() {
        Some(((at, side), rest)) if *at == slot => {
            *list = rest;
            *side
        }
        _ => Side::Absent,
    };
    while let Some(slot) = [a.first(), b.first()].into_iter().flatten().map(|(slot, _)| *slot).min()
    {
        let (a, b) = (take(&mut a, slot), take(&mut b, slot));
        if a != b {
            below.push_back(Differing { position: first + slot as u64, a, b });
        }
    }
}

const fn chunk(side: Side) -> Option<Hash> {
    match side {
        Side::Is(id) => Some(id),
        Side::Absent | Side::Above => None,
    }
}
