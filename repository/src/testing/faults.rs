//! Faults on demand: the next so many calls of an operation fail, or are held until let go.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// What to do with one future call.
#[derive(Debug, Clone)]
enum Plan<E> {
    Pass,
    Fail(E),
    Hold(Arc<Gate>),
}

#[derive(Debug)]
struct Gate {
    /// Calls that have arrived.
    arrived: watch::Sender<u64>,
    released: watch::Sender<bool>,
}

/// Calls held back by [`Faults::hold_next`]. Dropping it lets them go.
#[derive(Debug)]
pub struct Held(Arc<Gate>);

impl Held {
    /// Waits until `calls` of the held calls have arrived.
    pub async fn arrived(&self, calls: u64) {
        let mut seen = self.0.arrived.subscribe();
        // The sender is in `self`: it cannot be gone.
        let _ = seen.wait_for(|arrived| *arrived >= calls).await;
    }

    /// Lets the held calls go on.
    pub fn release(self) {}
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.released.send_replace(true);
    }
}

#[derive(Debug)]
struct State<O, E> {
    calls: HashMap<O, u64>,
    plans: HashMap<O, VecDeque<Plan<E>>>,
    /// While set, every call of every operation fails so.
    down: Option<E>,
}

/// The faults of one object whose operations are named by `O` and fail with `E`.
#[derive(Debug)]
pub struct Faults<O, E>(Mutex<State<O, E>>);

impl<O, E> Default for Faults<O, E> {
    fn default() -> Self {
        Self(Mutex::new(State { calls: HashMap::new(), plans: HashMap::new(), down: None }))
    }
}

impl<O: std::hash::Hash + Eq + Copy, E: Clone> Faults<O, E> {
    fn state(&self) -> std::sync::MutexGuard<'_, State<O, E>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan(&self, operation: O, plans: impl Iterator<Item = Plan<E>>) {
        self.state().plans.entry(operation).or_default().extend(plans);
    }

    /// The next `calls` calls (behind those planned before) go through.
    pub fn pass_next(&self, operation: O, calls: usize) {
        self.plan(operation, std::iter::repeat_n(Plan::Pass, calls));
    }

    /// The next `calls` calls (behind those planned before) fail with `error`.
    pub fn fail_next(&self, operation: O, calls: usize, error: E) {
        self.plan(operation, std::iter::repeat_n(Plan::Fail(error), calls));
    }

    /// The next `calls` calls (behind those planned before) wait until the result is released.
    #[must_use = "dropping it lets the calls go"]
    pub fn hold_next(&self, operation: O, calls: usize) -> Held {
        let gate =
            Arc::new(Gate { arrived: watch::Sender::new(0), released: watch::Sender::new(false) });
        self.plan(operation, std::iter::repeat_n(Plan::Hold(Arc::clone(&gate)), calls));
        Held(gate)
    }

    /// Forgets what was planned and not met yet.
    pub fn clear(&self) {
        self.state().plans.clear();
    }

    /// From now on everything fails with `error`, until [`Self::up`].
    pub fn down(&self, error: E) {
        self.state().down = Some(error);
    }

    /// Ends [`Self::down`].
    pub fn up(&self) {
        self.state().down = None;
    }

    /// How many calls there were, failed and held ones among them.
    pub fn calls(&self, operation: O) -> u64 {
        self.state().calls.get(&operation).copied().unwrap_or(0)
    }

    /// Forgets the counts.
    pub fn reset_calls(&self) {
        self.state().calls.clear();
    }

    /// Counts a call and does to it what was planned.
    ///
    /// # Errors
    /// The planned error.
    pub async fn enter(&self, operation: O) -> Result<(), E> {
        let plan = {
            let mut state = self.state();
            *state.calls.entry(operation).or_default() += 1;
            if let Some(error) = &state.down {
                return Err(error.clone());
            }
            state.plans.get_mut(&operation).and_then(VecDeque::pop_front)
        };
        match plan {
            None | Some(Plan::Pass) => Ok(()),
            Some(Plan::Fail(error)) => Err(error),
            Some(Plan::Hold(gate)) => {
                gate.arrived.send_modify(|arrived| *arrived += 1);
                // The sender is in `gate`: it cannot be gone.
                let _ = gate.released.subscribe().wait_for(|released| *released).await;
                Ok(())
            }
        }
    }
}
