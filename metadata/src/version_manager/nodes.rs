//! Repository nodes: membership.
//!
//! A node says every few seconds that it is there. One that does not is *suspected*, and then *down*:
//! new tables leave it out. It may come back at any time. States are derived from the clock when
//! they are read; only draining and removal are stored.

use std::sync::atomic::Ordering;
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_proto::v1::NodeState;

use super::{Held, RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{
    ClusterRecord, Counter, KeyKind, NodeRecord, PlacementRecord, check_node_id, prefix_of,
};
use crate::store::{StoreError, Swap};

/// A node that was not heard of for so long is suspected: several of its messages were lost.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(15);
/// A node that was not heard of for so long is down, unless the operator says otherwise: longer than
/// a process or a switch takes to start again, so that little data moves for nothing.
pub const DOWN_AFTER_DEFAULT: Duration = Duration::from_secs(60);
/// A time below that of suspicion would make nodes down that are only slow.
pub const DOWN_AFTER_MIN: Duration = SUSPECT_AFTER;
/// When a node was heard of last is written only when it is so much later than what is stored: a
/// swap for each message of each node would be most of what the store does.
pub const SEEN_GRANULARITY_MS: u64 = 5_000;

/// Nodes at most, with those that were removed: one reply lists all.
pub const NODES_MAX: usize = 4096;

/// The longest address or failure domain, in bytes: a host name of 255 and a port.
pub const ADDRESS_BYTES_MAX: usize = 300;

fn check_text(what: &str, text: &str) -> Result<(), Error> {
    if text.len() > ADDRESS_BYTES_MAX || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Error::invalid(format!(
            "a node's {what} has at most {ADDRESS_BYTES_MAX} bytes and no spaces; this is {text:?}"
        )));
    }
    Ok(())
}

fn describe(id: &str) -> String {
    format!("node {id}")
}

impl VersionManager {
    /// Adds a node, or notes that it is there still, or has moved. A node says this every few
    /// seconds. Tables name nodes by id, so a new address is valid for all of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad id, address or domain; [`Error::Precondition`] for a node that
    /// was removed, belongs to another repository, or is where another node is.
    pub async fn register_node(&self, r: v1::RegisterNodeRequest) -> Result<v1::Node, Error> {
        check_node_id(&r.id).map_err(Error::invalid)?;
        check_text("address", &r.address)?;
        check_text("failure domain", &r.domain)?;
        if r.address.is_empty() {
            return Err(Error::invalid(format!("node {} needs an address", r.id)));
        }
        let cluster = self.cluster_id().await?;
        if !r.cluster.is_empty() && r.cluster != cluster {
            let problem = format!(
                "belongs to another repository ({}, and this is {cluster}); point --metadata at its \
                 own repository, or give it an empty directory",
                r.cluster
            );
            return Err(Error::precondition(describe(&r.id), problem));
        }
        let node = until_won!(self, describe(&r.id), self.try_register(&r).await)?;
        Ok(v1::Node { cluster, ..node.to_wire(self.node_state(&node)) })
    }

    /// The repository's own id, which is made when it is first asked for.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn cluster_id(&self) -> Result<String, Error> {
        if let Some(held) = self.load::<ClusterRecord>(ClusterRecord::key_of()).await? {
            return Ok(held.value.id);
        }
        let id = format!("{:016x}{:016x}", self.entropy.next_u64(), self.entropy.next_u64());
        let made = self.store.swap(Swap::new().create(&ClusterRecord { id: id.clone() })).await;
        match made {
            Ok(_) => Ok(id),
            // Another server made it at the same time.
            Err(StoreError::Conflict { .. }) => {
                let held = self.load::<ClusterRecord>(ClusterRecord::key_of()).await?;
                Ok(held.map_or(id, |held| held.value.id))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn try_register(&self, r: &v1::RegisterNodeRequest) -> Result<NodeRecord, Error> {
        let held = self.load::<NodeRecord>(NodeRecord::key_of(&r.id)).await?;
        let now = self.now();
        let node = NodeRecord {
            id: r.id.clone(),
            address: r.address.clone(),
            domain: r.domain.clone(),
            registered_unix_ms: now,
            last_seen_unix_ms: now,
            draining: held.as_ref().is_some_and(|held| held.value.draining),
            removed_unix_ms: 0,
        };
        let Some(held) = held else {
            let swap = self.at_free_address(&node, Swap::new()).await?.create(&node);
            self.store.swap(swap).await?;
            return Ok(node);
        };
        let old = &held.value;
        if old.removed_unix_ms != 0 {
            let problem = "was removed; give it an empty directory and it joins as a new node";
            return Err(Error::precondition(describe(&r.id), problem));
        }
        if old.address != r.address || old.domain != r.domain {
            let swap = self.at_free_address(&node, Swap::new()).await?.update(&held, &node);
            self.store.swap(swap).await?;
            return Ok(node);
        }
        if now.saturating_sub(old.last_seen_unix_ms) < SEEN_GRANULARITY_MS {
            return Ok(old.clone());
        }
        let seen = NodeRecord { registered_unix_ms: old.registered_unix_ms, ..node };
        self.store.swap(Swap::new().update(&held, &seen)).await?;
        Ok(seen)
    }

    /// Takes part in the order of changes of membership, and refuses an address at which another
    /// node was heard of lately: one of the two would get what is meant for the other.
    async fn at_free_address(&self, node: &NodeRecord, swap: Swap) -> Result<Swap, Error> {
        let (_, swap) = self.count(Counter::Membership, 1, swap).await?;
        let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        let new = nodes.iter().all(|other| other.value.id != node.id);
        if new && nodes.len() >= NODES_MAX {
            let problem = format!("cannot join: there are {NODES_MAX} nodes already");
            return Err(Error::precondition(describe(&node.id), problem));
        }
        let lately = |other: &NodeRecord| {
            let silent = self.now().saturating_sub(other.last_seen_unix_ms);
            other.removed_unix_ms == 0 && u128::from(silent) < SUSPECT_AFTER.as_millis()
        };
        let other = nodes
            .iter()
            .map(|other| &other.value)
            .find(|other| other.id != node.id && other.address == node.address && lately(other));
        match other {
            None => Ok(swap),
            Some(other) => {
                let problem = format!(
                    "cannot be at {}: node {} is there; give it another address, or wait until \
                     that node is not heard of any more",
                    node.address, other.id
                );
                Err(Error::precondition(describe(&node.id), problem))
            }
        }
    }

    /// The state of a node now. After a start of the service all nodes have their full time again:
    /// they could not say that they were there while it was down.
    pub(super) fn node_state(&self, node: &NodeRecord) -> NodeState {
        if node.removed_unix_ms != 0 {
            return NodeState::Removed;
        }
        let seen = node.last_seen_unix_ms.max(self.renewable_unix_ms.load(Ordering::SeqCst));
        let silent = u128::from(self.now().saturating_sub(seen));
        if silent >= self.down_after.as_millis() {
            NodeState::Down
        } else if node.draining {
            NodeState::Draining
        } else if silent >= SUSPECT_AFTER.as_millis() {
            NodeState::Suspected
        } else {
            NodeState::Up
        }
    }

    async fn member(&self, id: &str) -> Result<Held<NodeRecord>, Error> {
        check_node_id(id).map_err(Error::invalid)?;
        let held = self.load::<NodeRecord>(NodeRecord::key_of(id)).await?;
        held.filter(|held| held.value.removed_unix_ms == 0)
            .ok_or_else(|| Error::not_found(describe(id), "`blobcr node list` shows what there is"))
    }

    /// Leaves a node out of new tables, or takes it in again.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such node.
    pub async fn drain_node(&self, r: v1::DrainNodeRequest) -> Result<v1::Node, Error> {
        until_won!(self, describe(&r.id), self.try_drain(&r).await)
    }

    async fn try_drain(&self, r: &v1::DrainNodeRequest) -> Result<v1::Node, Error> {
        let held = self.member(&r.id).await?;
        let node = NodeRecord { draining: !r.cancel, ..held.value.clone() };
        if node != held.value {
            let (_, swap) = self.count(Counter::Membership, 1, Swap::new()).await?;
            self.store.swap(swap.update(&held, &node)).await?;
        }
        Ok(node.to_wire(self.node_state(&node)))
    }

    /// Removes a node for good. It is refused from then on.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such node, [`Error::Precondition`] while a table names
    /// it.
    pub async fn remove_node(&self, r: v1::RemoveNodeRequest) -> Result<v1::Node, Error> {
        until_won!(self, describe(&r.id), self.try_remove_node(&r.id).await)
    }

    async fn try_remove_node(&self, id: &str) -> Result<v1::Node, Error> {
        let held = self.member(id).await?;
        let (_, swap) = self.count(Counter::Membership, 1, Swap::new()).await?;
        for head in self.all::<PlacementRecord>(&prefix_of(KeyKind::Placement)).await? {
            if self.is_in_use(&head.value, id).await? {
                let pool = head.value.pool;
                let problem = format!(
                    "still holds data of the pool with the id {pool}; `blobcr node drain {id}`, and \
                     remove it when its data has moved (while too few other nodes are up for the \
                     pool's policy, it cannot)"
                );
                return Err(Error::precondition(describe(id), problem));
            }
        }
        let node = NodeRecord { removed_unix_ms: self.now().max(1), ..held.value.clone() };
        self.store.swap(swap.update(&held, &node)).await?;
        Ok(node.to_wire(NodeState::Removed))
    }

    /// All nodes (at most [`NODES_MAX`]) but those that were removed, in order of id.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_nodes(
        &self,
        _: v1::ListNodesRequest,
    ) -> Result<v1::ListNodesResponse, Error> {
        let nodes = self.all::<NodeRecord>(&prefix_of(KeyKind::Node)).await?;
        let there = nodes.iter().map(|node| &node.value).filter(|node| node.removed_unix_ms == 0);
        let nodes = there.map(|node| node.to_wire(self.node_state(node))).collect();
        Ok(v1::ListNodesResponse { nodes })
    }
}
