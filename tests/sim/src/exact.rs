//! Threads in which nothing is left to chance.
//!
//! Hash maps, and whatever else asks the system for randomness or time, would make two runs of one
//! seed differ. So this crate defines `getrandom` and `clock_gettime` for the programs that it is
//! linked into: in the thread of a run they answer from the seed, everywhere else as the system does.

use std::cell::{Cell, RefCell};
use std::panic;
use std::sync::Once;
use std::thread;

/// What the clocks of a run show at its begin, in seconds: late in 2023.
const BEGIN_SECONDS: i64 = 1_700_000_000;

/// Deep futures of unoptimised code need room.
const STACK_BYTES: usize = 16 << 20;

thread_local! {
    /// The state of the generator, in the thread of a run.
    static DICE: Cell<Option<u64>> = const { Cell::new(None) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// SplitMix64.
fn next(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (state, mixed ^ (mixed >> 31))
}

/// # Safety
/// As `getrandom(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(
    buffer: *mut libc::c_void,
    len: libc::size_t,
    flags: libc::c_uint,
) -> libc::ssize_t {
    let Some(mut state) = DICE.get() else {
        // SAFETY: passed on as it came.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) as libc::ssize_t };
    };
    // SAFETY: the caller says that so many bytes may be written there.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), len) };
    for some in bytes.chunks_mut(8) {
        let (after, number) = next(state);
        state = after;
        some.copy_from_slice(&number.to_le_bytes()[..some.len()]);
    }
    DICE.set(Some(state));
    len as libc::ssize_t
}

/// # Safety
/// As `clock_gettime(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(id: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    if DICE.get().is_none() {
        // SAFETY: passed on as it came.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, id, time) as libc::c_int };
    }
    // Standing still: what passes in a run is the runtime's own time.
    let stands = libc::timespec { tv_sec: BEGIN_SECONDS, tv_nsec: 0 };
    // SAFETY: the caller says that a time may be written there.
    unsafe { time.write(stands) };
    0
}

/// Runs `work` in a thread of its own, whose randomness follows from `seed`. Returns what it came
/// to, and the first panic of a task in it.
pub fn run<T: Send + 'static>(
    seed: u64,
    work: impl FnOnce() -> T + Send + 'static,
) -> (thread::Result<T>, Option<String>) {
    hear_panics();
    let thread = thread::Builder::new().name("simulation".into()).stack_size(STACK_BYTES);
    let run = thread.spawn(move || {
        DICE.set(Some(seed));
        let done = panic::catch_unwind(panic::AssertUnwindSafe(work));
        DICE.set(None);
        (done, PANIC.take())
    });
    run.map(thread::JoinHandle::join).unwrap_or_else(|error| Err(Box::new(error))).unwrap_or_else(
        |panic| (Err(panic), Some("the thread of the run did not end as it should".into())),
    )
}

/// A panic in a task is no more than an error to whoever waits for it: it must not go unseen.
fn hear_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if DICE.get().is_none() {
                return before(info);
            }
            PANIC.with_borrow_mut(|first| {
                first.get_or_insert_with(|| info.to_string());
            });
        }));
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::{Instant, SystemTime};

    fn order(seed: u64) -> Vec<u32> {
        super::run(seed, || (0..100).collect::<HashSet<u32>>().into_iter().collect()).0.unwrap()
    }

    #[test]
    fn hash_maps_and_clocks_follow_the_seed_and_the_rest_of_the_process_does_not() {
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        let times = || (Instant::now(), SystemTime::now());
        let first = super::run(1, times).0.unwrap();
        assert_eq!(first, super::run(1, times).0.unwrap());
        assert!(SystemTime::now() > first.1);
        let set = || (0..100).collect::<HashSet<u32>>().into_iter().collect::<Vec<_>>();
        assert_ne!(set(), order(1));
    }

    #[test]
    fn a_panic_is_told() {
        let (done, panic) = super::run(1, || panic!("on purpose"));
        let _: Box<dyn std::any::Any + Send> = done.unwrap_err() as _;
        assert!(panic.unwrap().contains("on purpose"));
    }
}
