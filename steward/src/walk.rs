//! Goes through what several nodes hold of a range of partitions, in order of identity: each object
//! once, with all its copies and shards. Holds one page of each node's list in memory.

use std::collections::VecDeque;
use std::ops::Range;

use blobcr_proto::Hash;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{self, RecordKind};
use futures::future::join_all;

use crate::layout::Layout;
use crate::members::Members;
use crate::node::{Listed, Node, NodeError, behind};

/// Records on one page of a node's list.
const LIST_PAGE: u32 = 4096;

/// One record of an object, on one node.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// The node's index in the table.
    pub(crate) node: u32,
    pub(crate) key: RecordKey,
    pub(crate) generation: u64,
    pub(crate) stored_bytes: u64,
}

/// An object, and where it is.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub(crate) kind: RecordKind,
    pub(crate) id: Hash,
    pub(crate) copies: Vec<Copied>,
}

/// One node's list.
struct Cursor {
    node: u32,
    client: Node,
    page: VecDeque<Listed>,
    from: Option<v1::RecordRef>,
    more: bool,
}

impl Cursor {
    /// Has the next record in `page`, if there is one.
    async fn fill(&mut self, pool: u32, kind: RecordKind) -> Result<(), NodeError> {
        while self.page.is_empty() && self.more {
            let (page, more) = self.client.list(pool, kind, self.from.clone(), LIST_PAGE).await?;
            self.from = page.last().map(|listed| listed.key.clone());
            self.page = page.into();
            self.more = more;
        }
        Ok(())
    }
}

/// Objects of one kind in a range of partitions. Nodes that fail are left out, and noted in the
/// members.
pub(crate) struct Walk<'a> {
    layout: &'a Layout,
    members: &'a Members,
    kind: RecordKind,
    end: usize,
    cursors: Vec<Cursor>,
}

impl<'a> Walk<'a> {
    /// `nodes` are indices in the table.
    pub(crate) fn new(
        layout: &'a Layout,
        members: &'a Members,
        nodes: &[u32],
        kind: RecordKind,
        partitions: Range<usize>,
    ) -> Self {
        let from = layout.placement.before(partitions.start).map(|id| behind(kind, id));
        let cursor = |node: &u32| {
            let client = members.get(layout.id(*node))?.clone();
            let (page, from) = (VecDeque::new(), from.clone());
            Some(Cursor { node: *node, client, page, from, more: true })
        };
        let cursors = nodes.iter().filter_map(cursor).collect();
        Self { layout, members, kind, end: partitions.end, cursors }
    }

    /// The next object; `None` behind the last.
    pub(crate) async fn next(&mut self) -> Option<Object> {
        let (pool, kind) = (self.layout.pool, self.kind);
        let mut fills = Vec::with_capacity(self.cursors.len());
        for cursor in &mut self.cursors {
            fills.push(cursor.fill(pool, kind));
        }
        let mut failed = join_all(fills).await.into_iter();
        let (layout, members) = (self.layout, self.members);
        self.cursors.retain(|cursor| match failed.next() {
            Some(Err(error)) => {
                members.fail(layout.id(cursor.node), error);
                false
            }
            _ => members.get(layout.id(cursor.node)).is_some(),
        });
        let firsts = self.cursors.iter().filter_map(|cursor| Some(cursor.page.front()?.id));
        let id = firsts.min()?;
        if self.layout.placement.partition(&id) >= self.end {
            return None;
        }
        let mut copies = Vec::new();
        for cursor in &mut self.cursors {
            while cursor.page.front().is_some_and(|listed| listed.id == id) {
                let Some(listed) = cursor.page.pop_front() else { break };
                let Listed { generation, stored_bytes, ref key, .. } = listed;
                if let Ok(key) = RecordKey::try_from(key) {
                    copies.push(Copied { node: cursor.node, key, generation, stored_bytes });
                }
                // Another shard of it may be on the next page. A failure is found again.
                if cursor.fill(pool, kind).await.is_err() {
                    break;
                }
            }
        }
        Some(Object { kind, id, copies })
    }
}
