//! The deterministic simulation: the real client, persist pipeline, leases, nodes, version manager and
//! steward in one thread, on a network, disks and clocks whose faults follow from a seed. The same
//! seed gives the same run, message for message.
//!
//! | module | holds |
//! |---|---|
//! | [`exact`] | a thread in which nothing is left to chance |
//! | [`net`] | connections in place of TCP: delays, partitions, resets |
//! | [`clock`], [`store`] | clocks that are wrong, and a store that is slow and fails |
//! | [`metadata`], [`node`], [`writer`], [`reader`], [`stewarding`] | the parts, as processes that die |
//! | [`trouble`] | what goes wrong |
//! | [`oracle`] | what must hold all the same |
//! | [`cluster`] | all of it together |
//!
//! Time is tokio's, paused: it passes when nobody has anything to do. Disks are
//! [`blobcr_repo_node::testing::SimDisk`].

pub mod clock;
pub mod cluster;
mod content;
pub mod dice;
pub mod exact;
mod importing;
pub mod metadata;
pub mod net;
pub mod node;
pub mod oracle;
pub mod reader;
pub mod stewarding;
pub mod store;
pub mod trace;
pub mod trouble;
mod watched;
pub mod world;
pub mod writer;

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::planted;
use blobcr_repository::ConnectOptions;

use clock::RunClock;
use cluster::Cluster;
use trace::Trace;
use trouble::Trouble;
use world::World;

pub use blobcr_proto::planted::Bug;
pub use content::Content;

/// What to run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Decides everything.
    pub seed: u64,
    /// A bug on purpose.
    pub plant: Option<Bug>,
    /// Keep all of the trace, and not only its end.
    pub whole_trace: bool,
    /// Tell in the trace what becomes of the objects whose identities begin with this.
    pub follows: Option<String>,
}

impl Settings {
    /// A plain run of `seed`.
    #[must_use]
    pub const fn of(seed: u64) -> Self {
        Self { seed, plant: None, whole_trace: false, follows: None }
    }
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its seed.
    pub seed: u64,
    /// What was wrong; nothing, if all is well.
    pub violations: Vec<String>,
    /// A hash of its whole trace.
    pub hash: u64,
    /// Lines of the trace.
    pub events: u64,
    /// The lines that were kept.
    pub trace: Vec<String>,
    /// Snapshots that became stable.
    pub published: u64,
    /// Records that were deleted.
    pub deleted: u64,
}

/// How a process on `host` talks to the repository.
pub(crate) fn options(world: &World, host: &str) -> ConnectOptions {
    ConnectOptions {
        dial: Some(world.net.dial_from(host)),
        clock: Arc::new(RunClock::new()),
        channels_per_node: 1,
        ..ConnectOptions::default()
    }
}

/// Runs a seed, in a thread of its own.
#[must_use]
pub fn simulate(settings: Settings) -> Verdict {
    let Settings { seed, plant, whole_trace, follows } = settings;
    let trace = Trace::new(whole_trace, follows);
    let of_run = trace.clone();
    let (done, panic) = exact::run(seed, move || {
        planted::plant(plant);
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().start_paused(true).build();
        runtime.map(|runtime| runtime.block_on(Box::pin(run(seed, of_run))))
    });
    let mut violations = Vec::new();
    let mut counts = (0, 0);
    match done {
        Ok(Ok((found, count))) => (violations, counts) = (found, count),
        Ok(Err(error)) => violations.push(format!("no runtime: {error}")),
        Err(_) => violations.push("the run panicked".into()),
    }
    violations.extend(panic.map(|panic| format!("a panic: {panic}")));
    let (hash, events) = trace.sum();
    let (published, deleted) = counts;
    Verdict { seed, violations, hash, events, trace: trace.lines(), published, deleted }
}

async fn run(seed: u64, trace: Trace) -> (Vec<String>, (u64, u64)) {
    let world = World::new(seed, trace);
    world.note(format_args!("seed {seed}"));
    match Cluster::start(&world).await {
        Some(mut cluster) => {
            let trouble = Trouble::new(&world, cluster.nodes.len());
            let time = Duration::from_secs(world.dice.of(15..45));
            trouble.make(&mut cluster, time).await;
            if let Err(error) = cluster.settle().await {
                world.oracle.violation(format!("the end went wrong: {error}"));
            }
        }
        None => world.oracle.violation("the cluster did not start".into()),
    }
    (world.oracle.violations(), world.oracle.counts())
}
