//! A network whose delays, partitions and broken connections a seed decides.
//!
//! Everything on it is the real client and the real server: HTTP/2 over [`Stream`]s. Bytes of one
//! connection stay in order, as those of TCP do; those of different connections overtake each other.

mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use blobcr_repository::client::{Connection, Dial};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::dice::Dice;
use crate::trace::Trace;
pub use stream::Stream;
use stream::{Fate, Wire};

/// A connection that cannot come about while the network is cut looks again so often.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// An ordinary message takes up to so long.
const DELAY_MS: u64 = 4;

#[derive(Debug, Default)]
struct State {
    /// Who listens where, by name of the host.
    listeners: BTreeMap<String, mpsc::UnboundedSender<Stream>>,
    /// How often each host has died.
    deaths: BTreeMap<String, u64>,
    /// Hosts that are off: nobody answers for them, not even with a refusal.
    off: BTreeSet<String>,
    /// Ways, from and to, on which nothing gets through.
    cut: BTreeSet<(String, String)>,
    /// What messages from and to a host take at most.
    slow: BTreeMap<String, Duration>,
    wires: Vec<Weak<Wire>>,
    connections: u64,
}

/// The network; clones are the same one.
#[derive(Clone, Debug)]
pub struct Net {
    state: Arc<Mutex<State>>,
    dice: Dice,
    trace: Trace,
}

/// The name of the host in `address`.
fn host_of(address: &str) -> &str {
    address.split(':').next().unwrap_or(address)
}

impl Net {
    /// A network of nobody.
    #[must_use]
    pub fn new(dice: Dice, trace: Trace) -> Self {
        Self { state: Arc::default(), dice, trace }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What one message takes.
    fn delay(&self, from: &str, to: &str) -> Duration {
        let state = self.state();
        let slow = state.slow.get(from).max(state.slow.get(to)).copied();
        drop(state);
        match slow {
            Some(most) => self.dice.ms(0..most.as_millis() as u64 + 1),
            None => self.dice.ms(0..DELAY_MS),
        }
    }

    fn is_cut(&self, from: &str, to: &str) -> bool {
        self.state().cut.contains(&(from.to_owned(), to.to_owned()))
    }

    /// Connections to `host` from now on.
    #[must_use]
    pub fn listen(&self, host: &str) -> mpsc::UnboundedReceiver<Stream> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.state();
        state.off.remove(host);
        state.listeners.insert(host.to_owned(), sender);
        receiver
    }

    /// What a process on `host` connects with, until that host dies.
    #[must_use]
    pub fn dial_from(&self, host: &str) -> Arc<dyn Dial> {
        let life = self.state().deaths.get(host).copied().unwrap_or_default();
        Arc::new(Line { net: self.clone(), host: host.to_owned(), life })
    }

    fn lives(&self, host: &str, life: u64) -> bool {
        self.state().deaths.get(host).copied().unwrap_or_default() == life
    }

    /// All processes on `host` are gone, in the middle of whatever they did. Whoever they were
    /// connected to learns it by a reset, or (when `silently`) by hearing nothing.
    pub fn kill(&self, host: &str, silently: bool) {
        let wires = {
            let mut state = self.state();
            *state.deaths.entry(host.to_owned()).or_default() += 1;
            state.listeners.remove(host);
            if silently {
                state.off.insert(host.to_owned());
            }
            state.wires.retain(|wire| wire.strong_count() > 0);
            state.wires.iter().filter_map(Weak::upgrade).collect::<Vec<_>>()
        };
        for wire in wires {
            let delay = self.dice.ms(0..DELAY_MS);
            let others = if silently { Fate::Silent } else { Fate::Reset(Instant::now() + delay) };
            wire.kill(host, others);
        }
    }

    /// Nothing gets through from one host to another.
    pub fn cut(&self, from: &str, to: &str) {
        self.state().cut.insert((from.to_owned(), to.to_owned()));
    }

    /// Messages from and to `host` take up to `most`.
    pub fn slow_down(&self, host: &str, most: Duration) {
        self.state().slow.insert(host.to_owned(), most);
    }

    /// Everything gets through again, in its time. What was under way comes now.
    pub fn heal(&self) {
        let wires: Vec<_> = {
            let mut state = self.state();
            state.cut.clear();
            state.slow.clear();
            state.wires.iter().filter_map(Weak::upgrade).collect()
        };
        wires.iter().for_each(|wire| wire.wake());
    }

    async fn connect(&self, from: &str, life: u64, to: &str) -> io::Result<Stream> {
        sleep(self.delay(from, to)).await;
        loop {
            if !self.lives(from, life) {
                return std::future::pending().await;
            }
            let off = self.state().off.contains(to);
            if !off && !self.is_cut(from, to) && !self.is_cut(to, from) {
                break;
            }
            sleep(LOOK_AGAIN).await;
        }
        let (mine, number) = {
            let mut state = self.state();
            let Some(listener) = state.listeners.get(to).cloned() else {
                return Err(io::ErrorKind::ConnectionRefused.into());
            };
            state.connections += 1;
            let wire = Arc::new(Wire::new(state.connections, from, to));
            state.wires.push(Arc::downgrade(&wire));
            let mine = Stream::new(Arc::clone(&wire), 0, self.clone());
            let other = Stream::new(wire, 1, self.clone());
            if listener.send(other).is_err() {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            (mine, state.connections)
        };
        self.trace.note(format_args!("net: {from} to {to} connected, #{number}"));
        sleep(self.delay(to, from)).await;
        Ok(mine)
    }
}

/// The network as one process has it.
#[derive(Debug)]
struct Line {
    net: Net,
    host: String,
    life: u64,
}

impl Dial for Line {
    fn dial(&self, address: String) -> BoxFuture<'static, io::Result<Box<dyn Connection>>> {
        let (net, host, life) = (self.net.clone(), self.host.clone(), self.life);
        Box::pin(async move {
            let stream = net.connect(&host, life, host_of(&address)).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }
}
