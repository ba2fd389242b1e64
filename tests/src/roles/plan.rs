//! How many of each role a test wants.

/// See [`super::Roles::start`].
#[derive(Clone, Debug)]
pub struct Plan {
    /// Members of the etcd; without any the one metadata server keeps its records itself.
    pub etcd: usize,
    /// Metadata servers.
    pub metadata: usize,
    /// Repository nodes.
    pub nodes: usize,
    /// Mirrors, each of which stands for a host of virtual machines.
    pub mirrors: usize,
    /// Whether each mirror has a proxy beside it, which serves guests over TCP too.
    pub proxies: bool,
    /// Whether a steward runs.
    pub steward: bool,
    /// The policy of the pool `default`.
    pub pool: String,
    /// Seconds after which a node that is not heard of is down.
    pub node_down_after: u64,
    /// Whether each process gets a network namespace of its own, so that it can be cut off.
    pub isolated: bool,
    /// What the processes log; `None`: what they log unasked.
    pub log: Option<String>,
}

impl Default for Plan {
    /// One of each, at the least.
    fn default() -> Self {
        Self {
            etcd: 0,
            metadata: 1,
            nodes: 1,
            mirrors: 1,
            proxies: false,
            steward: false,
            pool: "replica:1".to_owned(),
            node_down_after: 60,
            isolated: false,
            log: None,
        }
    }
}

impl Plan {
    /// A cluster of which any one process may be away.
    #[must_use]
    pub fn cluster(pool: &str, nodes: usize) -> Self {
        let pool = pool.to_owned();
        Self { etcd: 3, metadata: 2, nodes, mirrors: 2, pool, ..Self::default() }
    }
}
