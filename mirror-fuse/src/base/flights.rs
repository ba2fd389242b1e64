//! One piece of work for all who ask for its result at the same time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// How far a flight has come.
#[derive(Clone, Debug)]
pub(super) enum Progress<V> {
    Busy,
    /// Nothing moves, for this reason.
    Waiting(Arc<str>),
    Landed(V),
}

/// Where a flight reports to those who wait for it.
#[derive(Debug)]
pub(super) struct Reporter<V>(watch::Sender<Progress<V>>);

impl<V> Reporter<V> {
    /// Tells why nothing moves.
    pub(super) fn waiting(&self, reason: &str) {
        self.0.send_replace(Progress::Waiting(reason.into()));
    }

    /// Hands the result to all who wait and all who still join.
    pub(super) fn landed(&self, value: V) {
        self.0.send_replace(Progress::Landed(value));
    }
}

type Map<K, V> = Mutex<HashMap<K, watch::Receiver<Progress<V>>>>;

/// Work under way, by what it is for.
#[derive(Debug)]
pub(super) struct Flights<K, V>(Arc<Map<K, V>>);

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

fn lock<K, V>(map: &Map<K, V>) -> MutexGuard<'_, HashMap<K, watch::Receiver<Progress<V>>>> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a flight off the list when it ends, however it ends.
struct Listed<K: Eq + Hash, V> {
    key: K,
    map: Arc<Map<K, V>>,
}

impl<K: Eq + Hash, V> Drop for Listed<K, V> {
    fn drop(&mut self) {
        lock(&self.map).remove(&self.key);
    }
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// The progress of the flight for `key`, which is started when there is none. It goes on in a
    /// task of its own: one who stops waiting does not stop it for the others. It stays listed until
    /// it ends, which may be after it has landed.
    pub(super) fn join<F>(
        &self,
        key: &K,
        start: impl FnOnce(Reporter<V>) -> F,
    ) -> watch::Receiver<Progress<V>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut map = lock(&self.0);
        if let Some(flight) = map.get(key) {
            return flight.clone();
        }
        let (sender, receiver) = watch::channel(Progress::Busy);
        map.insert(key.clone(), receiver.clone());
        drop(map);
        let listed = Listed { key: key.clone(), map: Arc::clone(&self.0) };
        let flight = start(Reporter(sender));
        tokio::spawn(async move {
            let _listed = listed;
            flight.await;
        });
        receiver
    }

    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        lock(&self.0).len()
    }
}
