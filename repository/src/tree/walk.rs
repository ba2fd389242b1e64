//! Going through a tree in order, in bounded memory.

use std::collections::VecDeque;
use std::ops::Range;

use blobcr_proto::Hash;

use super::TreeError;
use super::geometry::{Geometry, Root};
use super::node::{Node, NodeError};
use super::source::{NodeSource, fetch, window};

/// Refuses a node with children beyond the end of the disk.
pub(super) fn check_extent(
    geometry: &Geometry,
    level: u32,
    position: u64,
    id: Hash,
    node: &Node,
) -> Result<(), TreeError> {
    let (chunk, chunks) =
        (geometry.first_chunk(level, position, node.last_slot()), geometry.chunks());
    if chunk < chunks {
        return Ok(());
    }
    Err(TreeError::Node { id, error: NodeError::BeyondEnd { chunk, chunks } })
}

/// What is yet to be read of one level, in order: `(position, identity)`.
struct Pending {
    level: u32,
    places: VecDeque<(u64, Hash)>,
}

/// A walk from left to right. Of each level it holds what one window of the level above has below
/// it, so its memory depends on the fan-out alone.
pub(super) struct Walk {
    geometry: Geometry,
    range: Range<u64>,
    /// The top level first.
    pending: Vec<Pending>,
}

impl Walk {
    /// A walk over the chunks of `range`; what is beyond the disk's end is not there.
    pub(super) fn new(root: &Root, range: Range<u64>) -> Self {
        let geometry = root.geometry;
        let range = range.start..range.end.min(geometry.chunks());
        let pending = match root.node {
            Some(id) if !range.is_empty() => {
                let level = geometry.depth() - 1;
                vec![Pending { level, places: VecDeque::from([(0, id)]) }]
            }
            _ => Vec::new(),
        };
        Self { geometry, range, pending }
    }

    /// Reads until it comes to chunks, and returns those: `(chunk index, identity)`, in order;
    /// `None` at the end. Before a node is read, `enter` is asked; where it says no, the node and
    /// all below it are left out. With `lost`, so is a damaged node, after telling it.
    pub(super) async fn next(
        &mut self,
        source: &dyn NodeSource,
        enter: &mut (dyn FnMut(u32, u64, Hash) -> bool + Send),
        mut lost: Option<&mut (dyn FnMut(Lost) + Send)>,
    ) -> Result<Option<Vec<(u64, Hash)>>, TreeError> {
        while let Some(top) = self.pending.last_mut() {
            let level = top.level;
            let mut places = Vec::new();
            while places.len() < window(self.geometry.fan_out) {
                let Some((position, id)) = top.places.pop_front() else { break };
                if enter(level, position, id) {
                    places.push((position, id));
                }
            }
            if top.places.is_empty() {
                self.pending.pop();
            }
            let mut below = VecDeque::new();
            let mut parts = vec![&places[..]];
            while let Some(part) = parts.pop() {
                match fetch(source, &self.geometry, level, part).await {
                    Ok(nodes) => {
                        for ((position, _), node) in part.iter().zip(&nodes) {
                            self.expand(level, *position, node, &mut below);
                        }
                    }
                    Err(error) if error.is_damage() && lost.is_some() => match part {
                        [place] => lost.iter_mut().for_each(|lost| {
                            lost(self.lost(level, *place, error.clone()));
                        }),
                        // Which one it is, and what the others are.
                        _ => {
                            let (left, right) = part.split_at(part.len() / 2);
                            parts.extend([right, left]);
                        }
                    },
                    Err(error) => return Err(error),
                }
            }
            if below.is_empty() {
                continue;
            }
            if level == 0 {
                return Ok(Some(below.into()));
            }
            self.pending.push(Pending { level: level - 1, places: below });
        }
        Ok(None)
    }

    fn lost(&self, level: u32, (position, id): (u64, Hash), error: TreeError) -> Lost {
        let first = self.geometry.first_chunk(level, position, 0);
        let end = self.geometry.first_chunk(level, position + 1, 0).min(self.geometry.chunks());
        Lost { id, level, chunks: first..end, error }
    }

    /// The children of a node that have chunks of the range below them.
    fn expand(&self, level: u32, position: u64, node: &Node, below: &mut VecDeque<(u64, Hash)>) {
        let bits = self.geometry.fan_out.bits();
        let first = self.geometry.first_chunk(level, position, 0);
        let slot = |index: u64| (index.saturating_sub(first) >> (bits * level)) as usize;
        let slots = slot(self.range.start)..slot(self.range.end - 1) + 1;
        let children = node.children_in(slots);
        below.extend(children.map(|(slot, id)| ((position << bits) + slot as u64, id)));
    }
}

/// The present chunks of a range, page by page, in bounded memory whatever the disk's size: for
/// an export, or for anything else that has to wait between pages.
pub struct Present(Walk);

impl Present {
    /// Begins before the first chunk of `range`. Nothing is read yet.
    #[must_use]
    pub fn new(root: &Root, range: Range<u64>) -> Self {
        Self(Walk::new(root, range))
    }

    /// The next page: `(chunk index, identity)` in ascending order, never empty; `None` at the
    /// end. A page has at most 2^18 chunks. After an error the walk is over.
    ///
    /// # Errors
    /// When nodes cannot be read or are not what the tree asks for.
    pub async fn next(
        &mut self,
        source: &dyn NodeSource,
    ) -> Result<Option<Vec<(u64, Hash)>>, TreeError> {
        let page = self.0.next(source, &mut |_, _, _| true, None).await;
        if page.is_err() {
            self.0.pending.clear();
        }
        page
    }
}

/// Calls `visit` for each chunk of `range` that is present, in ascending order. Chunks beyond the
/// disk's end are holes.
///
/// # Errors
/// When nodes cannot be read or are not what the tree asks for; `visit` has then been called for
/// chunks before those.
pub async fn for_each_present(
    source: &dyn NodeSource,
    root: &Root,
    range: Range<u64>,
    visit: &mut (dyn FnMut(u64, Hash) + Send),
) -> Result<(), TreeError> {
    let mut present = Present::new(root, range);
    while let Some(page) = present.next(source).await? {
        page.into_iter().for_each(|(index, id)| visit(index, id));
    }
    Ok(())
}

/// What [`for_each_node`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// A tree node, not read yet.
    Node {
        /// Its identity.
        id: Hash,
        /// How far above the chunks it is; 0: its children are chunks.
        level: u32,
        /// The first chunk that it covers.
        first_chunk: u64,
    },
    /// A chunk.
    Chunk {
        /// Its identity.
        id: Hash,
        /// Its index in the disk.
        index: u64,
    },
}

/// Comes to every tree node and every chunk of a disk, parents before children: what the
/// collector and a verification need. `visit` says of a node whether to go into it, so that what
/// is shared with a tree seen before costs nothing; what it says of a chunk does not matter. A
/// node or chunk that is in several places is come to once for each.
///
/// # Errors
/// When nodes cannot be read or are not what the tree asks for.
pub async fn for_each_node(
    source: &dyn NodeSource,
    root: &Root,
    visit: &mut (dyn FnMut(Reached) -> bool + Send),
) -> Result<(), TreeError> {
    go_through(source, root, visit, None).await
}

/// A part of a tree that cannot be read.
#[derive(Clone, Debug)]
pub struct Lost {
    /// The node.
    pub id: Hash,
    /// How far above the chunks it is.
    pub level: u32,
    /// The chunks that it covers: which of them are holes, nobody knows.
    pub chunks: Range<u64>,
    /// What is wrong with it.
    pub error: TreeError,
}

/// As [`for_each_node`], but goes on past nodes that are damaged or lost and tells each of them:
/// for a verification that is to find all damage. The collector must not use it, for what is below
/// a lost node would seem to be nobody's.
///
/// # Errors
/// When nodes cannot be reached at present.
pub async fn survey(
    source: &dyn NodeSource,
    root: &Root,
    visit: &mut (dyn FnMut(Reached) -> bool + Send),
    lost: &mut (dyn FnMut(Lost) + Send),
) -> Result<(), TreeError> {
    go_through(source, root, visit, Some(lost)).await
}

async fn go_through(
    source: &dyn NodeSource,
    root: &Root,
    visit: &mut (dyn FnMut(Reached) -> bool + Send),
    mut lost: Option<&mut (dyn FnMut(Lost) + Send)>,
) -> Result<(), TreeError> {
    let geometry = root.geometry;
    let mut walk = Walk::new(root, 0..geometry.chunks());
    loop {
        let mut enter = |level, position, id| {
            let first_chunk = geometry.first_chunk(level, position, 0);
            visit(Reached::Node { id, level, first_chunk })
        };
        let lost = lost.as_mut().map(|lost| &mut **lost as &mut (dyn FnMut(Lost) + Send));
        let Some(chunks) = walk.next(source, &mut enter, lost).await? else { return Ok(()) };
        for (index, id) in chunks {
            visit(Reached::Chunk { id, index });
        }
    }
}
