//! When a wrapped call takes a checkpoint, and what is done then.
//!
//! All ranks must decide alike. The n-th call of a collective on MPI_COMM_WORLD is the same call on
//! every rank, so a count needs no agreement. An interval and a signal do: one reduction at some of
//! the calls, of which the next is agreed on in the same reduction, so that it costs little where
//! calls come thick and acts soon where they are rare.

use std::cell::Cell;
use std::ffi::c_int;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::global::{agree, checkpoint};
use crate::images::{Images, Taken};
use crate::mpi::{Comm, Handle, Mpi};
use crate::save::{self, Saver};
use crate::settings::{FUNCTIONS, Settings};
use crate::{complain, say, signal};

/// How often ranks agree on whether it is time.
const AGREE: Duration = Duration::from_millis(50);
/// The most calls from one agreement to the next: calls may become rare at once.
const CALLS_MAX: u32 = 64;

static ACTIVE: Mutex<Option<Active>> = Mutex::new(None);
/// MPI_Init of Fortran may call that of C.
static BEGUN: AtomicBool = AtomicBool::new(false);
thread_local! {
    /// What saves the state may call MPI by itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A job whose checkpoints are taken here.
struct Active {
    settings: &'static Settings,
    /// A communicator of its own.
    comm: Comm,
    way: Way,
    counts: [u64; FUNCTIONS.len()],
    clock: Clock,
    taken: u64,
}

/// What a checkpoint is made of.
enum Way {
    /// What each rank writes of its state.
    States(Saver),
    /// All processes.
    Images(Images),
}

/// After MPI_Init: reads what is to be done, and ends the job when it cannot be.
pub(crate) fn begin() {
    if BEGUN.swap(true, Ordering::Relaxed) {
        return;
    }
    // A job that believes itself safe is worse off than one that ends now.
    let (mpi, world) = match Mpi::get().and_then(|mpi| Ok((mpi, mpi.world()?))) {
        Ok(found) => found,
        Err(failure) => {
            if !Settings::get().is_ok_and(|s| matches!(s.triggers(save::exported()), Ok(false))) {
                complain(&failure.text);
                std::process::exit(2);
            }
            return;
        }
    };
    match prepare(&world) {
        Ok(None) => {}
        Ok(Some(active)) => *ACTIVE.lock().unwrap_or_else(PoisonError::into_inner) = Some(active),
        Err(failure) => {
            if world.rank == 0 {
                complain(&failure.text);
            }
            mpi.end(2);
        }
    }
}

fn prepare(world: &Comm) -> Result<Option<Active>, Failure> {
    let mine = (|| {
        let settings = Settings::get()?;
        if !settings.triggers(save::exported())? {
            return Ok(None);
        }
        if let Some(wanted) = settings.signal {
            signal::watch(wanted)?;
        }
        // What would fail at the first checkpoint is found out now.
        settings.place.target()?;
        std::fs::create_dir_all(dir(settings)?)
            .map_err(|e| Failure::io("cannot make BLOBCR_MPI_DIR", &e))?;
        let way = match settings.images {
            true => Way::Images(Images::find(settings, dir(settings)?)?),
            false => Way::States(Saver::find(settings)?),
        };
        Ok(Some((settings, way)))
    })();
    // Even a rank that has nothing to do takes part: the others may have.
    let mine = agree(world, mine)?;
    let rule = mine.as_ref().map_or(0, |(settings, _)| settings.rule());
    let [most, least] = world.max([rule, -rule])?;
    if most != -least {
        // They would wait for each other at different calls.
        return Err(Failure::usage(
            "the ranks have different BLOBCR_MPI_EVERY, BLOBCR_MPI_INTERVAL_S or \
             BLOBCR_MPI_SIGNAL, or only some BLOBCR_MPI_SAVE=criu: set the same for all",
        ));
    }
    let Some((settings, mut way)) = mine else { return Ok(None) };
    let comm = world.duplicate()?;
    if let Way::Images(images) = &mut way {
        images.try_out(&comm)?;
    }
    let clock = Clock::new(settings.interval);
    let counts = [0; FUNCTIONS.len()];
    Ok(Some(Active { settings, comm, way, counts, clock, taken: 0 }))
}

fn dir(settings: &Settings) -> Result<&Path, Failure> {
    settings.dir.as_deref().ok_or_else(|| Failure::usage("BLOBCR_MPI_DIR is not set"))
}

/// Has all processes saved for a program that asks by itself. None where that is not how it is saved.
pub(crate) fn take_images(written: Result<(), Failure>) -> Option<Result<Taken, Failure>> {
    let mut active = ACTIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let Active { way: Way::Images(images), comm, taken, .. } = active.as_mut()? else {
        return None;
    };
    let outcome = agree(comm, written).and_then(|()| images.take(comm));
    *taken += u64::from(outcome.is_ok());
    Some(outcome)
}

/// Before a wrapped call of one of [`FUNCTIONS`].
pub(crate) fn before(function: usize, comm: Handle) {
    before_if(function, |mpi| mpi.is_world(comm));
}

/// The same, with Fortran's number of a communicator.
pub(crate) fn before_fortran(function: usize, comm: c_int) {
    before_if(function, |mpi| mpi.is_fortran_world(comm));
}

fn before_if(function: usize, is_world: impl FnOnce(&Mpi) -> bool) {
    if INSIDE.get() {
        return;
    }
    let Ok(mut active) = ACTIVE.lock() else { return };
    let Some(active) = active.as_mut() else { return };
    if Mpi::get().is_ok_and(is_world) {
        inside(|| active.called(function));
    }
}

/// Does something whose own calls of MPI take no checkpoints.
pub(crate) fn inside(work: impl FnOnce()) {
    let was = INSIDE.replace(true);
    work();
    INSIDE.set(was);
}

/// Before MPI_Finalize.
pub(crate) fn end() {
    let Some(active) = ACTIVE.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    if active.taken == 0 && active.comm.rank == 0 {
        let calls: Vec<_> =
            FUNCTIONS.iter().zip(active.counts).map(|(f, n)| format!("{f} {n}")).collect();
        complain(&format!(
            "no checkpoint was taken of this job; its calls on MPI_COMM_WORLD: {}",
            calls.join(", ")
        ));
    }
}

impl Active {
    fn called(&mut self, function: usize) {
        self.counts[function] += 1;
        let by_count = self.settings.every.is_some_and(|every| {
            every.function == function && self.counts[function].is_multiple_of(every.calls)
        });
        let asks = self.settings.interval.is_some() || self.settings.signal.is_some();
        let outcome = match asks && self.clock.is_agreed_now() {
            true => self.agree_on_time(),
            false => Ok(false),
        };
        match outcome {
            Ok(by_time) if by_count || by_time => self.take(),
            Ok(_) => {}
            Err(failure) => complain(&failure.text),
        }
    }

    fn agree_on_time(&mut self) -> Result<bool, Failure> {
        let signalled = self.settings.signal.is_some_and(signal::received);
        let leads = self.comm.rank == 0;
        let wanted = signalled || leads && self.clock.is_time();
        let next = if leads { self.clock.next_agreement() } else { 0 };
        let [wanted, next] = self.comm.max([wanted.into(), next as i32])?;
        self.clock.agreed(next as u32);
        Ok(wanted != 0)
    }

    fn take(&mut self) {
        let began = Instant::now();
        let outcome = match &mut self.way {
            Way::States(saver) => {
                let written = dir(self.settings).and_then(|dir| saver.save(&self.comm, dir));
                let set = checkpoint(&self.comm, Ok(self.settings), written);
                set.map(|set| format!("took the set {set}"))
            }
            Way::Images(images) => images.take(&self.comm).map(|taken| match taken.restarted {
                true => format!("restarted from the set {}", taken.set),
                false => format!("took the set {}", taken.set),
            }),
        };
        self.clock.taken();
        if let Some(signal) = self.settings.signal {
            // A signal for the whole job comes to the ranks one after the other: this was for all.
            signal::forget(signal);
        }
        let seconds = began.elapsed().as_secs_f64();
        match outcome {
            Ok(done) => {
                self.taken += 1;
                if self.comm.rank == 0 {
                    say(self.settings, || format!("{done} in {seconds:.3} s"));
                }
            }
            // The job itself is well: it goes on, and the next one may be taken.
            Err(failure) if self.comm.rank == 0 => {
                complain(&format!("no checkpoint could be taken: {}", failure.text));
            }
            Err(_) => {}
        }
    }
}

/// When it is time, and when ranks agree on that.
pub(crate) struct Clock {
    interval: Option<Duration>,
    last_taken: Instant,
    last_agreed: Instant,
    /// Calls from one agreement to the next.
    calls: u32,
    left: u32,
}

impl Clock {
    pub(crate) fn new(interval: Option<Duration>) -> Self {
        let now = Instant::now();
        Self { interval, last_taken: now, last_agreed: now, calls: 1, left: 1 }
    }

    pub(crate) fn is_time(&self) -> bool {
        self.interval.is_some_and(|interval| self.last_taken.elapsed() >= interval)
    }

    pub(crate) fn taken(&mut self) {
        self.last_taken = Instant::now();
    }

    fn is_agreed_now(&mut self) -> bool {
        // It stays at none when the last agreement failed.
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    /// In how many calls to agree again, by how quickly the last ones came.
    fn next_agreement(&self) -> u32 {
        let spent = self.last_agreed.elapsed().as_secs_f64().max(1e-9);
        let fitting = f64::from(self.calls) * AGREE.as_secs_f64() / spent;
        // Doubled at most: one quick call says little about the next.
        (fitting as u32).clamp(1, self.calls * 2).min(CALLS_MAX)
    }

    fn agreed(&mut self, next: u32) {
        self.last_agreed = Instant::now();
        self.calls = next.max(1);
        self.left = self.calls;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreements_become_rare_where_calls_come_thick() {
        let mut clock = Clock::new(None);
        assert!(!clock.is_time());
        for expected in [2, 4, 8, 16, 32, 64, 64] {
            for left in (0..clock.calls).rev() {
                assert_eq!(clock.is_agreed_now(), left == 0);
            }
            let next = clock.next_agreement();
            assert_eq!(next, expected);
            clock.agreed(next);
        }
        clock.last_agreed = Instant::now() - Duration::from_secs(10);
        assert_eq!(clock.next_agreement(), 1, "calls have become slow");
    }

    #[test]
    fn it_is_time_after_the_interval() {
        let mut clock = Clock::new(Some(Duration::from_secs(5)));
        assert!(!clock.is_time());
        clock.last_taken = Instant::now() - Duration::from_secs(6);
        assert!(clock.is_time());
        clock.taken();
        assert!(!clock.is_time());
    }
}
