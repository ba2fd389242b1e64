//! Guests' reads go first: what nobody waits for yet is fetched beside few of them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Fetches ahead of the guests at a time, of all disks of a host: enough to fill a fast network, and
/// few enough that a guest's own read, which shares it with them, is not held up for long.
const AHEAD_MAX: usize = 8;
/// The same while guests wait for fetches of their own.
const AHEAD_BESIDE_GUESTS_MAX: usize = 2;

#[derive(Debug, Default)]
struct UnderWay {
    guests: usize,
    ahead: usize,
}

impl UnderWay {
    const fn has_room(&self) -> bool {
        self.ahead < if self.guests > 0 { AHEAD_BESIDE_GUESTS_MAX } else { AHEAD_MAX }
    }
}

/// Who fetches just now.
#[derive(Debug, Default)]
pub(super) struct Turns {
    under_way: Mutex<UnderWay>,
    /// Told when there may be room.
    fewer: Notify,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody waits for a fetch, until the result is dropped. Never waits.
    pub(super) fn guest(&self) -> Guest<'_> {
        self.lock().guests += 1;
        Guest(self)
    }

    /// Waits until one more may be fetched ahead; it is under way until the result is dropped.
    pub(super) async fn ahead(&self) -> Ahead<'_> {
        loop {
            // Before the try, so that none is missed.
            let fewer = self.fewer.notified();
            if let Some(turn) = self.try_ahead() {
                return turn;
            }
            fewer.await;
        }
    }

    fn try_ahead(&self) -> Option<Ahead<'_>> {
        let mut under_way = self.lock();
        under_way.has_room().then(|| {
            under_way.ahead += 1;
            Ahead(self)
        })
    }
}

/// See [`Turns::guest`].
#[derive(Debug)]
pub(super) struct Guest<'a>(&'a Turns);

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let mut under_way = self.0.lock();
        under_way.guests -= 1;
        if under_way.guests == 0 {
            self.0.fewer.notify_waiters();
        }
    }
}

/// See [`Turns::ahead`].
#[derive(Debug)]
pub(super) struct Ahead<'a>(&'a Turns);

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        self.0.lock().ahead -= 1;
        self.0.fewer.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn few_are_fetched_ahead_while_a_guest_waits_and_more_once_it_does_not() {
        let turns = Turns::default();
        let guest = turns.guest();
        let mut ahead: Vec<_> = std::iter::from_fn(|| turns.try_ahead()).collect();
        assert_eq!(ahead.len(), AHEAD_BESIDE_GUESTS_MAX);
        let mut waits = pin!(turns.ahead());
        assert!(waits.as_mut().now_or_never().is_none());
        drop(guest);
        ahead.push(waits.await);
        ahead.extend(std::iter::from_fn(|| turns.try_ahead()));
        assert_eq!(ahead.len(), AHEAD_MAX);
        ahead.pop();
        // Guests are never held up.
        let guests = [turns.guest(), turns.guest()];
        assert!(turns.try_ahead().is_none());
        drop(guests);
        assert!(turns.try_ahead().is_some());
    }
}
