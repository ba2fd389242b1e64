//! Making the tree of a changed disk, by shadowing.

use std::collections::{HashMap, HashSet};

use blobcr_proto::Hash;
use bytes::Bytes;

use super::TreeError;
use super::geometry::{Geometry, Root};
use super::node::Node;
use super::source::{NodeSource, fetch, window};

/// A chunk's index and its new identity; `None` when the chunk is now all zeros.
pub type Change = (u64, Option<Hash>);

/// A tree node that has to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewNode {
    /// BLAKE3-256 of `encoding`.
    pub id: Hash,
    /// Its bytes.
    pub encoding: Bytes,
}

/// The tree of the changed disk.
#[derive(Clone, Debug)]
pub struct Updated {
    /// Its root, to be published once all nodes are durable.
    pub root: Root,
    /// Nodes that the tree has and its base did not have in that place, each once. A node comes
    /// after all of its children that are not stored yet.
    pub new_nodes: Vec<NewNode>,
}

/// The tree of `root`'s disk with `changes`, which are sorted and name each chunk once. The disk
/// takes the size of `geometry`: what a smaller one no longer has is left out, what a larger one
/// has more is zeros. When a smaller disk ends within a chunk that was not zeros beyond the new
/// end, that chunk must be among the changes, cut and filled with zeros.
///
/// A new tree is an update of [`Root::empty`], which reads nothing. To hold only part of a large
/// set of changes in memory, use an [`Updater`].
///
/// # Errors
/// When the changes are unsorted or beyond the end, when chunk size or fan-out would change, and
/// when nodes cannot be read or are not what the tree asks for.
pub async fn update(
    source: &dyn NodeSource,
    root: &Root,
    geometry: Geometry,
    changes: &[Change],
) -> Result<Updated, TreeError> {
    let mut updater = Updater::new(source, root, geometry).await?;
    updater.take_changes(source, changes).await?;
    updater.finish(source).await
}

/// A node on the way from the top to the chunk that was changed last.
struct Open {
    level: u32,
    position: u64,
    /// What was in this place.
    old: Option<Hash>,
    /// One for each slot.
    children: Vec<Option<Hash>>,
}

/// An update whose changes come in parts, in ascending order over all parts. It holds one node per
/// level, what one window of changes has to read, and the finished nodes until they are taken.
pub struct Updater {
    base: Geometry,
    geometry: Geometry,
    depth: u32,
    /// What is in the place of the top node.
    top: Option<Hash>,
    /// From the top down.
    open: Vec<Open>,
    /// The least chunk that may be changed next.
    next: u64,
    finished: Vec<NewNode>,
    /// Identities of `finished`.
    seen: HashSet<Hash>,
}

/// The old nodes that a window of changes has on its way, by level and position.
type Loaded = HashMap<(u32, u64), Node>;

impl Updater {
    /// Begins an update of `root` to a disk of `geometry`.
    ///
    /// # Errors
    /// As [`update`].
    pub async fn new(
        source: &dyn NodeSource,
        root: &Root,
        geometry: Geometry,
    ) -> Result<Self, TreeError> {
        root.check()?;
        geometry.check()?;
        root.geometry.check_compatible(&geometry)?;
        let (base, depth) = (root.geometry, geometry.depth());
        let mut top = root.node;
        // A less deep tree is what the deeper one has leftmost.
        for level in (depth.max(1)..base.depth()).rev() {
            let Some(id) = top else { break };
            let nodes = fetch(source, &base, level, &[(0, id)]).await?;
            top = nodes.first().and_then(|node| node.child(0));
        }
        let mut updater = Self {
            base,
            geometry,
            depth,
            top: if depth == 0 { None } else { top },
            open: Vec::new(),
            next: 0,
            finished: Vec::new(),
            seen: HashSet::new(),
        };
        updater.deepen();
        Ok(updater)
    }

    /// Puts the nodes that a deeper tree has above the old top.
    fn deepen(&mut self) {
        let Some(old) = self.top else { return };
        for level in (self.base.depth()..self.depth).rev() {
            let mut children = self.no_children();
            if level == self.base.depth() {
                children[0] = Some(old);
            }
            self.open.push(Open { level, position: 0, old: None, children });
        }
    }

    fn no_children(&self) -> Vec<Option<Hash>> {
        vec![None; self.geometry.fan_out.slots()]
    }

    /// Takes the next changes, and returns nodes that are finished, in the order of
    /// [`Updated::new_nodes`]: all are to be stored before the root is published.
    ///
    /// # Errors
    /// As [`update`]. The update is then of no more use.
    pub async fn apply(
        &mut self,
        source: &dyn NodeSource,
        changes: &[Change],
    ) -> Result<Vec<NewNode>, TreeError> {
        self.take_changes(source, changes).await?;
        self.seen.clear();
        Ok(std::mem::take(&mut self.finished))
    }

    async fn take_changes(
        &mut self,
        source: &dyn NodeSource,
        changes: &[Change],
    ) -> Result<(), TreeError> {
        self.check_changes(changes)?;
        let mut rest = changes;
        while !rest.is_empty() {
            let (changes, later) = rest.split_at(self.window_of(rest));
            rest = later;
            let indices: Vec<u64> = changes.iter().map(|(index, _)| *index).collect();
            let mut loaded = self.load(source, &indices, true).await?;
            for (index, id) in changes {
                self.seek(*index, &mut loaded);
                let slot = self.geometry.slot(*index);
                self.open.last_mut().expect("seek opens a node of level 0").children[slot] = *id;
                self.next = index + 1;
            }
        }
        Ok(())
    }

    /// How many of the changes one window has: as many as are below one window of nodes.
    fn window_of(&self, changes: &[Change]) -> usize {
        let leaf = |change: &Change| self.geometry.position(0, change.0);
        let leaves = changes.chunk_by(|a, b| leaf(a) == leaf(b));
        leaves.take(window(self.geometry.fan_out)).map(<[Change]>::len).sum()
    }

    fn check_changes(&self, changes: &[Change]) -> Result<(), TreeError> {
        let chunks = self.geometry.chunks();
        let mut next = self.next;
        for (index, _) in changes {
            if *index < next {
                return Err(TreeError::Unsorted { index: *index, after: next - 1 });
            }
            if *index >= chunks {
                return Err(TreeError::BeyondEnd { index: *index, chunks });
            }
            next = index + 1;
        }
        Ok(())
    }

    /// Reads, level by level, the old nodes that are on the way to `indices` and not open. With
    /// `replaced`, every index gets a new chunk, and a node of level 0 of which nothing stays is
    /// not read.
    async fn load(
        &self,
        source: &dyn NodeSource,
        indices: &[u64],
        replaced: bool,
    ) -> Result<Loaded, TreeError> {
        let mut loaded = Loaded::new();
        let mut ways = vec![(0, self.top, indices)];
        for level in (0..self.depth).rev() {
            let mut places = Vec::new();
            for (position, old, indices) in &ways {
                let Some(id) = old else { continue };
                let nothing_stays = replaced && level == 0 && self.fills(*position, indices.len());
                if self.open_at(level, *position).is_none() && !nothing_stays {
                    places.push((*position, *id));
                }
            }
            let nodes = fetch(source, &self.base, level, &places).await?;
            loaded.extend(places.iter().map(|(position, _)| (level, *position)).zip(nodes));
            if level > 0 {
                ways = self.ways_below(level, &ways, &loaded);
            }
        }
        Ok(loaded)
    }

    /// Whether `count` chunks are all that the node of level 0 at `position` has.
    fn fills(&self, position: u64, count: usize) -> bool {
        let first = self.geometry.first_chunk(0, position, 0);
        count as u64 == (self.geometry.chunks() - first).min(self.geometry.fan_out.slots() as u64)
    }

    fn open_at(&self, level: u32, position: u64) -> Option<&Open> {
        self.open.iter().find(|open| open.level == level && open.position == position)
    }

    /// Splits the ways at nodes of `level` by the children that they go through.
    fn ways_below<'i>(
        &self,
        level: u32,
        ways: &[(u64, Option<Hash>, &'i [u64])],
        loaded: &Loaded,
    ) -> Vec<(u64, Option<Hash>, &'i [u64])> {
        let mut below = Vec::new();
        for (position, _, indices) in ways {
            let open = self.open_at(level, *position);
            let node = loaded.get(&(level, *position));
            let same_child = |a: &u64, b: &u64| {
                self.geometry.position(level - 1, *a) == self.geometry.position(level - 1, *b)
            };
            for indices in indices.chunk_by(same_child) {
                let child = self.geometry.position(level - 1, indices[0]);
                let slot = self.geometry.slot(child);
                let old = match (open, node) {
                    (Some(open), _) => open.children[slot],
                    (None, node) => node.and_then(|node| node.child(slot)),
                };
                below.push((child, old, indices));
            }
        }
        below
    }

    /// Closes what is not above chunk `index` and opens what is.
    fn seek(&mut self, index: u64, loaded: &mut Loaded) {
        while let Some(last) = self.open.last() {
            if last.position == self.geometry.position(last.level, index) {
                break;
            }
            self.close();
        }
        loop {
            let (level, old) = match self.open.last() {
                Some(parent) if parent.level == 0 => return,
                Some(parent) => {
                    let level = parent.level - 1;
                    let slot = self.geometry.slot(self.geometry.position(level, index));
                    (level, parent.children[slot])
                }
                None => (self.depth - 1, self.top),
            };
            let position = self.geometry.position(level, index);
            let mut children = self.no_children();
            // What is not loaded was not there, or nothing of it stays.
            let node = loaded.remove(&(level, position));
            for (slot, id) in node.iter().flat_map(Node::children) {
                if self.geometry.first_chunk(level, position, slot) < self.geometry.chunks() {
                    children[slot] = Some(id);
                }
            }
            self.open.push(Open { level, position, old, children });
        }
    }

    /// Finishes the lowest open node and puts it into its parent.
    fn close(&mut self) {
        let Some(open) = self.open.pop() else { return };
        let encoding = Node::encode(&self.geometry, open.level, &open.children);
        let id = encoding.as_deref().map(Hash::of);
        if let (Some(id), Some(encoding)) = (id, encoding)
            && open.old != Some(id)
            && self.seen.insert(id)
        {
            self.finished.push(NewNode { id, encoding });
        }
        match self.open.last_mut() {
            Some(parent) => parent.children[self.geometry.slot(open.position)] = id,
            None => self.top = id,
        }
    }

    /// Ends the update: the root, and the nodes that [`Self::apply`] has not returned.
    ///
    /// # Errors
    /// As [`update`].
    pub async fn finish(mut self, source: &dyn NodeSource) -> Result<Updated, TreeError> {
        let chunks = self.geometry.chunks();
        if chunks < self.base.chunks()
            && let Some(last) = chunks.checked_sub(1)
            && self.next <= last
        {
            // What a smaller disk no longer has is cut off along the way to its last chunk.
            let mut loaded = self.load(source, &[last], false).await?;
            self.seek(last, &mut loaded);
        }
        while !self.open.is_empty() {
            self.close();
        }
        let root = Root { geometry: self.geometry, node: self.top };
        Ok(Updated { root, new_nodes: self.finished })
    }
}
