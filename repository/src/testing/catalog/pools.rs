//! Pools, nodes and placement.

use blobcr_proto::policy::{Compression, Policy};
use blobcr_proto::{PoolName, v1};

use super::{Answer, ById, invalid, not_found, precondition, unix_ms};
use crate::CatalogError;

/// Partitions of a pool, as the real service has them.
const PARTITIONS: u32 = 1024;

#[derive(Debug)]
pub(super) struct Pools {
    by_id: ById<u32, v1::Pool>,
    nodes: ById<String, v1::Node>,
    /// Node ids of each pool's table, fixed once made.
    placements: ById<u32, Vec<String>>,
}

impl Default for Pools {
    fn default() -> Self {
        let pool = v1::Pool {
            id: 1,
            name: "default".into(),
            policy: "replica:1".into(),
            partitions: PARTITIONS,
            compression: "adaptive".into(),
        };
        Self { by_id: ById::from([(1, pool)]), nodes: ById::new(), placements: ById::new() }
    }
}

impl Pools {
    pub(super) fn create(&mut self, r: v1::CreatePoolRequest) -> Answer<v1::Pool> {
        PoolName::new(r.name.as_str()).map_err(invalid)?;
        r.policy.parse::<Policy>().map_err(invalid)?;
        let compression: Compression = match r.compression.as_str() {
            "" => Compression::default(),
            text => text.parse().map_err(invalid)?,
        };
        if self.by_id.values().any(|pool| pool.name == r.name) {
            let text = format!("there is a pool {:?} already", r.name);
            return Err(CatalogError::AlreadyExists(text));
        }
        let id = self.by_id.keys().next_back().copied().unwrap_or(0) + 1;
        let (name, policy, compression) = (r.name, r.policy, compression.to_string());
        let pool = v1::Pool { id, name, policy, partitions: PARTITIONS, compression };
        self.by_id.insert(id, pool.clone());
        Ok(pool)
    }

    /// By name, by id, or (with neither) the default one.
    pub(super) fn get(&self, pool: &v1::PoolRef) -> Answer<&v1::Pool> {
        let by_id = pool.name.is_empty() && pool.id != 0;
        let name = if pool.name.is_empty() { "default" } else { pool.name.as_str() };
        let wanted = |p: &&v1::Pool| if by_id { p.id == pool.id } else { p.name == name };
        match self.by_id.values().find(wanted) {
            Some(found) => Ok(found),
            None if by_id => not_found(format!("no pool with id {}", pool.id)),
            None => not_found(format!("no pool {name:?}")),
        }
    }

    pub(super) fn list(&self) -> v1::ListPoolsResponse {
        v1::ListPoolsResponse { pools: self.by_id.values().cloned().collect() }
    }

    pub(super) fn register(&mut self, r: v1::RegisterNodeRequest) -> v1::Node {
        let v1::RegisterNodeRequest { id, address, domain, cluster } = r;
        let now = unix_ms();
        let node = v1::Node {
            id: id.clone(),
            address,
            domain,
            registered_unix_ms: now,
            state: v1::NodeState::Up.into(),
            last_seen_unix_ms: now,
            draining: false,
            cluster,
        };
        self.nodes.insert(id, node.clone());
        node
    }

    fn node(&mut self, id: &str) -> Answer<&mut v1::Node> {
        self.nodes.get_mut(id).map_or_else(|| not_found(format!("no node {id}")), Ok)
    }

    pub(super) fn drain(&mut self, r: &v1::DrainNodeRequest) -> Answer<v1::Node> {
        let node = self.node(&r.id)?;
        node.draining = !r.cancel;
        node.set_state(if r.cancel { v1::NodeState::Up } else { v1::NodeState::Draining });
        Ok(node.clone())
    }

    /// Tables do not change here, so a node of one cannot go.
    pub(super) fn remove(&mut self, r: &v1::RemoveNodeRequest) -> Answer<v1::Node> {
        let mut node = self.node(&r.id)?.clone();
        if self.placements.values().any(|nodes| nodes.contains(&r.id)) {
            return precondition(format!("node {} is in a table", r.id));
        }
        self.nodes.remove(&r.id);
        node.set_state(v1::NodeState::Removed);
        Ok(node)
    }

    pub(super) fn nodes(&self) -> v1::ListNodesResponse {
        v1::ListNodesResponse { nodes: self.nodes.values().cloned().collect() }
    }

    pub(super) fn placement(&mut self, r: &v1::GetPlacementRequest) -> Answer<v1::PlacementTable> {
        let pool = self.get(&v1::PoolRef { name: r.name.clone(), id: r.id })?.clone();
        let width = pool.policy.parse::<Policy>().map_err(invalid)?.nodes();
        if !self.placements.contains_key(&pool.id) {
            let ids: Vec<_> = self.nodes.keys().cloned().collect();
            if ids.len() < width {
                return precondition(format!(
                    "pool {} ({}) needs {width} nodes; {} are registered",
                    pool.name,
                    pool.policy,
                    ids.len()
                ));
            }
            self.placements.insert(pool.id, ids);
        }
        let ids = &self.placements[&pool.id];
        let partition = |p: u32| v1::PartitionNodes {
            node: (0..width as u32).map(|i| (p + i) % ids.len() as u32).collect(),
            moving_from: Vec::new(),
        };
        Ok(v1::PlacementTable {
            pool: pool.id,
            version: 1,
            nodes: ids.iter().map(|id| self.nodes[id].clone()).collect(),
            partitions: (0..pool.partitions).map(partition).collect(),
        })
    }
}
