//! What the parts of a run share.

use std::fmt;

use crate::dice::Dice;
use crate::net::Net;
use crate::oracle::Oracle;
use crate::trace::Trace;

/// See the module.
#[derive(Clone, Debug)]
pub struct World {
    /// Decisions.
    pub dice: Dice,
    /// What happened.
    pub trace: Trace,
    /// The network.
    pub net: Net,
    /// What must hold.
    pub oracle: Oracle,
}

impl World {
    /// An empty world.
    #[must_use]
    pub fn new(seed: u64, trace: Trace) -> Self {
        let dice = Dice::new(seed);
        let net = Net::new(dice.fork(), trace.clone());
        Self { oracle: Oracle::new(trace.clone()), net, dice, trace }
    }

    /// Adds a line to the trace.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.trace.note(what);
    }
}
