//! Which fan-out the segment tree should have: measures lookups, updates and differences for every
//! fan-out from 2 to 1024, and picks the one with the least cost.
//!
//! Nodes and bytes are counted and processor time is measured, over nodes in memory. What a cluster
//! adds is modelled, with the parameters printed: a round trip for each request (a tree is read
//! with one request per level, and nothing of it is cached), the time of the bytes on the wire, and
//! a fixed cost for each record that a node server reads or stores. The chunks that are found or
//! committed are part of the cost, as they are for who waits for it. The pick has the least mean,
//! over all operations and image sizes, of how many times its cost is that of the best fan-out for
//! that operation, among those whose tree adds little to the data of scattered commits: a wide
//! node is written whole for one chunk that changed, does not compress, and is kept as long as the
//! snapshot.

mod report;

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use async_trait::async_trait;
use blobcr_proto::v1::RecordKind;
use blobcr_proto::{ChunkSize, Hash};
use blobcr_repository::StoreError;
use blobcr_repository::tree::{
    Change, FanOut, Geometry, NodeSource, Root, Updated, diff, lookup, update,
};
use bytes::Bytes;
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use report::Report;

#[derive(Parser, Serialize)]
#[command(about = "Measures every fan-out of the segment tree and picks one")]
struct Options {
    /// Image sizes, in GiB; every chunk of an image is present.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 64, 256])]
    image_gib: Vec<u64>,
    /// Chunk size, in KiB.
    #[arg(long, default_value_t = 256)]
    chunk_kib: u64,
    /// A round trip to a repository node, in microseconds.
    #[arg(long, default_value_t = 200.0)]
    round_trip_us: f64,
    /// What the network carries, in Gbit/s.
    #[arg(long, default_value_t = 10.0)]
    gbit: f64,
    /// What reading or storing one record costs a repository node, in microseconds.
    #[arg(long, default_value_t = 10.0)]
    record_us: f64,
    /// Copies of each tree node.
    #[arg(long, default_value_t = 3.0)]
    copies: f64,
    /// Seed of the places that are read and written.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// One JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

/// What an operation read and wrote.
#[derive(Clone, Copy, Default, Serialize)]
struct Cost {
    requests: u64,
    nodes_read: u64,
    bytes_read: u64,
    nodes_written: u64,
    bytes_written: u64,
    chunks_read: u64,
    chunks_written: u64,
    processor_us: f64,
}

impl Cost {
    /// Microseconds that it takes in a cluster.
    fn modelled_us(&self, options: &Options) -> f64 {
        let chunk = (options.chunk_kib << 10) as f64;
        let bytes_read = self.bytes_read as f64 + self.chunks_read as f64 * chunk;
        let bytes_written = self.bytes_written as f64 + self.chunks_written as f64 * chunk;
        let read = (self.nodes_read + self.chunks_read) as f64;
        let written = (self.nodes_written + self.chunks_written) as f64;
        // Chunks are read at once when all are known; they are written while the tree is read,
        // and the tree after them.
        let round_trips =
            self.requests + u64::from(self.chunks_read > 0) + u64::from(written > 0.0);
        round_trips as f64 * options.round_trip_us
            + (bytes_read + bytes_written * options.copies) * 8.0 / (options.gbit * 1000.0)
            + (read + written * options.copies) * options.record_us
            + self.processor_us
    }

    /// Bytes of tree for each byte of data that was written.
    fn tree_share(&self, options: &Options) -> f64 {
        let data = (self.chunks_written * (options.chunk_kib << 10)) as f64;
        if data == 0.0 { 0.0 } else { self.bytes_written as f64 / data }
    }
}

#[derive(Default)]
struct Nodes {
    stored: Mutex<HashMap<Hash, Bytes>>,
    cost: Mutex<Cost>,
}

#[async_trait]
impl NodeSource for Nodes {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let stored = self.stored.lock().expect("no thread panics with it");
        let missing = |id: &Hash| StoreError::Missing { kind: RecordKind::TreeNode, id: *id };
        let found: Vec<Bytes> = ids
            .iter()
            .map(|id| stored.get(id).cloned().ok_or_else(|| missing(id)))
            .collect::<Result<_, _>>()?;
        let mut cost = self.cost.lock().expect("no thread panics with it");
        cost.requests += 1;
        cost.nodes_read += found.len() as u64;
        cost.bytes_read += found.iter().map(|node| node.len() as u64).sum::<u64>();
        Ok(found)
    }
}

impl Nodes {
    fn store(&self, updated: &Updated) {
        let mut stored = self.stored.lock().expect("no thread panics with it");
        stored.extend(updated.new_nodes.iter().map(|node| (node.id, node.encoding.clone())));
    }

    fn reset(&self) {
        *self.cost.lock().expect("no thread panics with it") = Cost::default();
    }

    fn cost(&self, since: Instant) -> Cost {
        let cost = *self.cost.lock().expect("no thread panics with it");
        Cost { processor_us: since.elapsed().as_secs_f64() * 1e6, ..cost }
    }
}

/// What one fan-out costs for one image.
#[derive(Serialize)]
struct Measured {
    fan_out: u32,
    depth: u32,
    tree_nodes: usize,
    tree_bytes: usize,
    /// Nanoseconds to find one chunk when all nodes are at hand.
    warm_lookup_ns: f64,
    operations: Vec<(&'static str, Cost)>,
}

const SCATTERED_COMMIT: &str = "commit of 400 scattered chunks";
const WARM_LOOKUPS: u32 = 50_000;
/// Repetitions of what is too short to be measured once.
const REPEAT: u32 = 5;

struct Bench<'o> {
    options: &'o Options,
    runtime: tokio::runtime::Runtime,
    nodes: Nodes,
    root: Root,
}

impl<'o> Bench<'o> {
    fn new(options: &'o Options, gib: u64, fan_out: FanOut) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let chunk_size = ChunkSize::new(options.chunk_kib << 10)?;
        let geometry = Geometry::new(gib << 30, chunk_size, fan_out)?;
        let nodes = Nodes::default();
        let all: Vec<Change> = (0..geometry.chunks()).map(|i| (i, Some(content(i, 0)))).collect();
        let empty = Root::empty(geometry);
        let updated = runtime.block_on(update(&nodes, &empty, geometry, &all))?;
        nodes.store(&updated);
        Ok(Self { options, runtime, nodes, root: updated.root })
    }

    fn chunks(&self) -> u64 {
        self.root.geometry.chunks()
    }

    /// A cold lookup, on the average of many.
    fn lookup(&self, run: usize) -> Result<Cost> {
        let mut random = StdRng::seed_from_u64(self.options.seed);
        let mut total = Cost::default();
        let times = 200;
        for _ in 0..times {
            let first = random.random_range(0..self.chunks().saturating_sub(run as u64).max(1));
            self.nodes.reset();
            let start = Instant::now();
            self.runtime.block_on(lookup(&self.nodes, &self.root, first, run))?;
            let cost = self.nodes.cost(start);
            total.requests += cost.requests;
            total.nodes_read += cost.nodes_read;
            total.bytes_read += cost.bytes_read;
            total.processor_us += cost.processor_us;
        }
        Ok(Cost {
            requests: total.requests.div_ceil(times),
            nodes_read: total.nodes_read.div_ceil(times),
            bytes_read: total.bytes_read.div_ceil(times),
            chunks_read: run as u64,
            processor_us: total.processor_us / times as f64,
            ..total
        })
    }

    fn warm_lookup_ns(&self) -> Result<f64> {
        let mut random = StdRng::seed_from_u64(self.options.seed);
        let start = Instant::now();
        for _ in 0..WARM_LOOKUPS {
            let index = random.random_range(0..self.chunks());
            let found = self.runtime.block_on(lookup(&self.nodes, &self.root, index, 1))?;
            anyhow::ensure!(found == [Some(content(index, 0))], "chunk {index} is another");
        }
        Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(WARM_LOOKUPS))
    }

    /// The cost of a COMMIT of these chunks, and of the difference that it makes.
    fn commit(&self, dirty: &BTreeSet<u64>) -> Result<(Cost, Cost)> {
        let changes: Vec<Change> = dirty.iter().map(|i| (*i, Some(content(*i, 1)))).collect();
        let geometry = self.root.geometry;
        let (mut commit, mut difference) = (Cost::default(), Cost::default());
        let (mut commit_us, mut difference_us) = (f64::MAX, f64::MAX);
        for _ in 0..REPEAT {
            self.nodes.reset();
            let start = Instant::now();
            let run = update(&self.nodes, &self.root, geometry, &changes);
            let updated = self.runtime.block_on(run)?;
            commit = self.nodes.cost(start);
            commit_us = commit_us.min(commit.processor_us);
            commit.chunks_written = dirty.len() as u64;
            commit.nodes_written = updated.new_nodes.len() as u64;
            commit.bytes_written =
                updated.new_nodes.iter().map(|node| node.encoding.len() as u64).sum();
            self.nodes.store(&updated);

            self.nodes.reset();
            let mut found = 0;
            let mut visit = |_, _, _| found += 1;
            let start = Instant::now();
            let run = diff(&self.nodes, &self.root, &updated.root, &mut visit);
            self.runtime.block_on(run)?;
            difference = self.nodes.cost(start);
            // Both trees are asked at once.
            difference.requests = difference.requests.div_ceil(2);
            difference_us = difference_us.min(difference.processor_us);
            anyhow::ensure!(found == dirty.len(), "{found} of {} differ", dirty.len());
        }
        commit.processor_us = commit_us;
        difference.processor_us = difference_us;
        Ok((commit, difference))
    }

    fn scattered(&self, count: usize) -> BTreeSet<u64> {
        let mut random = StdRng::seed_from_u64(self.options.seed);
        let mut dirty = BTreeSet::new();
        while dirty.len() < count.min(self.chunks() as usize) {
            dirty.insert(random.random_range(0..self.chunks()));
        }
        dirty
    }

    fn measure(&self) -> Result<Measured> {
        let (tree_nodes, tree_bytes) = {
            let stored = self.nodes.stored.lock().expect("no thread panics with it");
            (stored.len(), stored.values().map(Bytes::len).sum())
        };
        let third = self.chunks() / 3;
        let run = third..(third + 4096).min(self.chunks());
        let (commit_1, diff_1) = self.commit(&self.scattered(1))?;
        let (commit_400, diff_400) = self.commit(&self.scattered(400))?;
        let (commit_run, diff_run) = self.commit(&run.collect())?;
        Ok(Measured {
            fan_out: self.root.geometry.fan_out.get(),
            depth: self.root.geometry.depth(),
            tree_nodes,
            tree_bytes,
            warm_lookup_ns: self.warm_lookup_ns()?,
            operations: vec![
                ("cold lookup of 1 chunk", self.lookup(1)?),
                ("cold lookup of 256 chunks in a row", self.lookup(256)?),
                ("commit of 1 chunk", commit_1),
                (SCATTERED_COMMIT, commit_400),
                ("commit of 4096 chunks in a row", commit_run),
                ("diff of 1 chunk", diff_1),
                ("diff of 400 scattered chunks", diff_400),
                ("diff of 4096 chunks in a row", diff_run),
            ],
        })
    }
}

/// A chunk's identity, made up.
fn content(index: u64, version: u64) -> Hash {
    let mut bytes = [0; Hash::LEN];
    bytes[..8].copy_from_slice(&index.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    bytes[8..16].copy_from_slice(&version.to_le_bytes());
    Hash(bytes)
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut out = std::io::stdout().lock();
    let mut images = Vec::new();
    for gib in &options.image_gib {
        let mut measured = Vec::new();
        for bits in 1..=10 {
            let fan_out = FanOut::new(1u32 << bits)?;
            let bench = Bench::new(&options, *gib, fan_out)?;
            measured.push(bench.measure().with_context(|| format!("{fan_out:?}"))?);
        }
        if !options.json {
            report::print_table(&mut out, *gib, &measured, &options)?;
        }
        images.push((*gib, measured));
    }
    let report = Report::new(&options, images)?;
    if options.json {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    report.print_pick(&mut out)
}
