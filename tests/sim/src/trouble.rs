//! What goes wrong, and when. Each seed has its own choice of kinds: with all of them at once, no
//! run would get anywhere.

use std::sync::atomic::Ordering;
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_repo_node::testing::Fault;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::Cluster;
use crate::world::World;

/// A kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    KillNode,
    CutPower,
    CutPowerSoon,
    FailDisk,
    FillDisk,
    FlipBit,
    GoBack,
    Wipe,
    KillMetadata,
    ShakeStore,
    JumpClock,
    KillWriter,
    KillSteward,
    Partition,
    SlowDown,
    Drain,
}

const KINDS: [Kind; 16] = [
    Kind::KillNode,
    Kind::CutPower,
    Kind::CutPowerSoon,
    Kind::FailDisk,
    Kind::FillDisk,
    Kind::FlipBit,
    Kind::GoBack,
    Kind::Wipe,
    Kind::KillMetadata,
    Kind::ShakeStore,
    Kind::JumpClock,
    Kind::KillWriter,
    Kind::KillSteward,
    Kind::Partition,
    Kind::SlowDown,
    Kind::Drain,
];

/// A seed has each kind with this probability.
const HAS_KIND: f64 = 0.45;
/// Nodes that may be down at once: more would only keep everybody waiting.
const NODES_DOWN_MAX: usize = 2;
/// How far one jump of a clock goes.
const JUMP_MS: u64 = 8_000;

/// Troubles of one run.
pub struct Trouble {
    world: World,
    kinds: Vec<Kind>,
    /// The only node whose disk may lie: what it loses counts as the one loss that every
    /// acknowledged object survives.
    liar: usize,
}

impl Trouble {
    /// As the seed has it.
    #[must_use]
    pub fn new(world: &World, nodes: usize) -> Self {
        let kinds: Vec<Kind> = KINDS.into_iter().filter(|_| world.dice.chance(HAS_KIND)).collect();
        world.note(format_args!("troubles: {kinds:?}"));
        Self { kinds, liar: world.dice.index(nodes), world: world.clone() }
    }

    /// Makes trouble for `time`.
    pub async fn make(&self, cluster: &mut Cluster, time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            sleep(self.world.dice.ms(100..4000)).await;
            self.recover(cluster);
            if !self.kinds.is_empty() {
                let kind = self.kinds[self.world.dice.index(self.kinds.len())];
                self.one(cluster, kind).await;
            }
        }
    }

    /// What is down comes back, sooner or later.
    fn recover(&self, cluster: &mut Cluster) {
        let dice = &self.world.dice;
        for node in &mut cluster.nodes {
            if node.is_up() && node.disk.is_dead() {
                node.power_cut();
            } else if node.is_poisoned() && dice.chance(0.5) {
                node.kill();
            } else if !node.is_up() && dice.chance(0.4) {
                node.start(&cluster.addresses);
            }
        }
        for server in &mut cluster.metadata {
            if dice.chance(0.5) {
                server.start();
            }
        }
        if dice.chance(0.5) {
            cluster.start_others();
        }
        if dice.chance(0.35) {
            self.world.note(format_args!("the network heals"));
            self.world.net.heal();
        }
    }

    async fn one(&self, cluster: &mut Cluster, kind: Kind) {
        let dice = &self.world.dice;
        match kind {
            Kind::KillMetadata | Kind::ShakeStore | Kind::JumpClock => {
                let server = dice.index(cluster.metadata.len());
                self.metadata(cluster, kind, server);
            }
            Kind::KillWriter => {
                let at = dice.index(cluster.writers.len());
                cluster.writers[at].kill(&self.world);
            }
            Kind::KillSteward => {
                let at = dice.index(cluster.others.len());
                cluster.others[at].kill(&self.world);
            }
            Kind::Partition => self.partition(cluster),
            Kind::SlowDown => {
                let host = self.any_host(cluster);
                let most = dice.ms(50..1500);
                self.world.note(format_args!("{host} is slow: {most:?}"));
                self.world.net.slow_down(&host, most);
            }
            Kind::Drain => self.drain(cluster).await,
            _ => self.node(cluster, kind),
        }
    }

    fn metadata(&self, cluster: &mut Cluster, kind: Kind, at: usize) {
        let server = &mut cluster.metadata[at];
        match kind {
            Kind::KillMetadata => server.kill(),
            Kind::ShakeStore => {
                let shaky = !server.shaky.fetch_xor(true, Ordering::SeqCst);
                self.world.note(format_args!("{}: shaky {shaky}", server.host));
            }
            _ => {
                let jump = self.world.dice.of(0..2 * JUMP_MS) as i64 - JUMP_MS as i64;
                self.world.note(format_args!("the clock of {} jumps {jump} ms", server.host));
                server.clock.jump(jump);
            }
        }
    }

    fn node(&self, cluster: &mut Cluster, kind: Kind) {
        let dice = &self.world.dice;
        let down = cluster.nodes.iter().filter(|node| !node.is_up()).count();
        let loses = matches!(kind, Kind::FlipBit | Kind::GoBack | Kind::Wipe);
        let at = if loses { self.liar } else { dice.index(cluster.nodes.len()) };
        let node = &mut cluster.nodes[at];
        if !node.is_up() || down >= NODES_DOWN_MAX {
            return;
        }
        match kind {
            Kind::KillNode => node.kill(),
            Kind::CutPower => node.power_cut(),
            Kind::CutPowerSoon => node.fault(dice.of(1..12), Fault::PowerCut),
            Kind::FailDisk if dice.chance(0.5) => node.fault(dice.of(1..6), Fault::SyncFails),
            Kind::FailDisk => node.fault(dice.of(1..6), Fault::WriteFails),
            Kind::FillDisk => {
                let free = dice.of(0..60_000) as usize;
                self.world.note(format_args!("{}: {free} bytes are left", node.host));
                node.disk.leave(free);
            }
            Kind::GoBack => node.go_back(),
            // Its identity is new: not too often.
            Kind::Wipe if dice.chance(0.7) => {}
            Kind::Wipe => node.wipe(),
            _ => {
                self.world.oracle.taint(at);
                let file = node.disk.flip();
                self.world.note(format_args!("{}: a bit flips in {file:?}", node.host));
            }
        }
    }

    fn any_host(&self, cluster: &Cluster) -> String {
        let nodes = cluster.nodes.iter().map(|node| &node.host);
        let servers = cluster.metadata.iter().map(|server| &server.host);
        let writers = cluster.writers.iter().map(|writer| &writer.host);
        let others = cluster.others.iter().map(|other| &other.host);
        let all: Vec<_> = nodes.chain(servers).chain(writers).chain(others).collect();
        all[self.world.dice.index(all.len())].clone()
    }

    fn partition(&self, cluster: &Cluster) {
        let dice = &self.world.dice;
        for _ in 0..dice.of(1..6) {
            let (a, b) = (self.any_host(cluster), self.any_host(cluster));
            let both = dice.chance(0.6);
            self.world.note(format_args!("{a} is cut off from {b}, both ways: {both}"));
            self.world.net.cut(&a, &b);
            if both {
                self.world.net.cut(&b, &a);
            }
        }
    }

    /// A node is to be emptied, or not any more.
    async fn drain(&self, cluster: &Cluster) {
        let node = &cluster.nodes[self.world.dice.index(cluster.nodes.len())];
        let Some(id) = node.store().map(|store| store.node_id()) else { return };
        let cancel = self.world.dice.chance(0.6);
        let Ok(repository) = cluster.client().await else { return };
        let request = v1::DrainNodeRequest { id, cancel };
        let drained = timeout(Duration::from_secs(2), repository.catalog().drain_node(request));
        let done = matches!(drained.await, Ok(Ok(_)));
        self.world.note(format_args!("{}: drain, cancel: {cancel}, done: {done}", node.host));
    }
}
