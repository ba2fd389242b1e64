//! Wakes a persister a while after a COMMIT. No thread is woken when it is set: a thread that wakes may
//! take the processor from whoever is about to be told that the COMMIT is done.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// A timer of the kernel.
#[derive(Debug)]
pub(super) struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// One that is not set, for a task of the runtime that this is called in.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        // SAFETY: an owned descriptor is open, and the same, until the `AsyncFd` drops it.
        Ok(Self(unsafe { AsyncFd::register(timer) }?))
    }

    /// Has it ring once, so long from now, whatever it was set to before. Zero would unset it.
    pub(super) fn set(&self, after: Duration) -> io::Result<()> {
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = after.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        let once = Itimerspec { it_interval: never, it_value };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    /// Returns when it has rung since the last time.
    ///
    /// # Errors
    /// When the runtime ends.
    pub(super) async fn rang(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut times = [0; size_of::<u64>()];
            let read = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut times)?));
            if let Ok(read) = read {
                return read.map(drop);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn it_rings_once_and_not_before_its_time() {
        let alarm = Alarm::new().unwrap();
        let short = Duration::from_millis(5);
        assert!(tokio::time::timeout(short, alarm.rang()).await.is_err(), "it is not set");
        for _ in 0..2 {
            let began = Instant::now();
            alarm.set(Duration::from_secs(100)).unwrap();
            alarm.set(short).unwrap();
            alarm.rang().await.unwrap();
            assert!(began.elapsed() >= short);
            assert!(tokio::time::timeout(2 * short, alarm.rang()).await.is_err(), "it rang once");
        }
    }

    #[tokio::test]
    async fn that_it_rang_is_not_forgotten() {
        let alarm = Alarm::new().unwrap();
        alarm.set(Duration::from_millis(1)).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        alarm.rang().await.unwrap();
    }
}
