//! What programs call: `blobcr_mpi.h`. Nothing unwinds into C.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use blobcr_guest::Deadline;

use crate::failure::Failure;
use crate::global::checkpoint;
use crate::images::Taken;
use crate::mpi::{Comm, Handle, Mpi};
use crate::settings::Settings;
use crate::{host, output, trigger};

/// Bytes of a checkpoint's name and its final NUL.
const NAME_SIZE: usize = 64;
/// Between two looks at a set.
const PAUSE: Duration = Duration::from_millis(50);
/// One look is given at least this, however little is left of the wait.
const LOOK: Duration = Duration::from_secs(1);

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn call(work: impl FnOnce() -> Result<(), Failure>) -> c_int {
    call_for(|| work().map(|()| 0))
}

/// The same for a call that has more to tell than that it is done.
fn call_for(work: impl FnOnce() -> Result<c_int, Failure>) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Failure::new(libc::EIO, "libblobcr_mpi has a bug: it panicked".to_owned()))
    });
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            let text = CString::new(failure.text.replace('\0', "?")).unwrap_or_default();
            LAST_ERROR.set(text);
            failure.errno
        }
    }
}

/// Puts a result where the program wants it.
///
/// # Safety
/// The place is null or valid for a write.
unsafe fn give<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: as the caller promises.
        unsafe { to.write(value) };
    }
}

/// # Safety
/// The place is null or has room for a name.
unsafe fn give_text(to: *mut c_char, size: usize, text: &str) -> Result<(), Failure> {
    if to.is_null() || text.len() >= size {
        let room = text.len() + 1;
        return Err(Failure::new(libc::ENAMETOOLONG, format!("{text:?} needs {room} bytes")));
    }
    // SAFETY: as the caller promises, and it is not longer.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// # Safety
/// It is null or a text that ends with NUL.
unsafe fn text<'a>(from: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if from.is_null() {
        return Err(Failure::usage(format!("{what} is NULL")));
    }
    // SAFETY: as the caller promises.
    let text = unsafe { CStr::from_ptr(from) };
    text.to_str().map_err(|_| Failure::usage(format!("{what} {text:?} is no UTF-8")))
}

fn world() -> Result<Comm, Failure> {
    Mpi::get()?.world()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_checkpoint(
    comm: Handle,
    written: c_int,
    set: *mut u64,
) -> c_int {
    // SAFETY: the caller keeps to the header.
    unsafe { give(set, 0) };
    call_for(|| {
        let comm = Comm::of(Mpi::get()?, comm)?;
        let written = match written {
            0 => Ok(()),
            errno => Err(Failure::new(errno, "it could not write its state".to_owned())),
        };
        let taken = match Settings::get() {
            Ok(settings) if settings.images => process_images(&comm, written)?,
            settings => Taken { set: checkpoint(&comm, settings, written)?, restarted: false },
        };
        // SAFETY: as above.
        unsafe { give(set, taken.set) };
        Ok(taken.restarted.into())
    })
}

fn process_images(comm: &Comm, written: Result<(), Failure>) -> Result<Taken, Failure> {
    if comm.size != world()?.size {
        return Err(Failure::usage("BLOBCR_MPI_SAVE=criu saves all processes: use MPI_COMM_WORLD"));
    }
    trigger::take_images(written).unwrap_or_else(|| {
        Err(Failure::usage(
            "this library saw no MPI_Init: for BLOBCR_MPI_SAVE=criu, link it before MPI's own",
        ))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_wait(set: u64, timeout_ms: u32) -> c_int {
    call(|| {
        let settings = Settings::get()?;
        let deadline = Deadline::after(Duration::from_millis(timeout_ms.into()));
        while !host::is_stable(settings, set, Deadline::after(deadline.left().max(LOOK)))? {
            if deadline.is_over() {
                let text = format!("the set {set} is not stable yet; it may still become so");
                return Err(Failure::new(libc::EAGAIN, text));
            }
            std::thread::sleep(PAUSE.min(deadline.left()));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_need_checkpoint(flag: *mut c_int) -> c_int {
    call(|| {
        let needed = output::need_checkpoint(&world()?)?;
        // SAFETY: the caller keeps to the header.
        unsafe { give(flag, needed.into()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_should_exit(flag: *mut c_int) -> c_int {
    call(|| {
        let ends = output::should_exit(&world()?)?;
        // SAFETY: the caller keeps to the header.
        unsafe { give(flag, ends.into()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_start_output(name: *const c_char) -> c_int {
    // SAFETY: the caller keeps to the header.
    call(|| output::start_output(&world()?, unsafe { text(name, "the output's name") }))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_route_file(
    file: *const c_char,
    path: *mut c_char,
    size: usize,
) -> c_int {
    call(|| {
        // SAFETY: the caller keeps to the header.
        let routed = output::route_file(unsafe { text(file, "the file's name") }?)?;
        // SAFETY: the caller keeps to the header.
        unsafe { give_text(path, size, &routed) }
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_complete_output(valid: c_int, set: *mut u64) -> c_int {
    // SAFETY: the caller keeps to the header.
    unsafe { give(set, 0) };
    call(|| {
        let sequence = output::complete_output(&world()?, valid != 0)?;
        // SAFETY: as above.
        unsafe { give(set, sequence) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_have_restart(
    flag: *mut c_int,
    name: *mut c_char,
) -> c_int {
    call(|| {
        let found = output::have_restart(&world()?)?;
        // SAFETY: the caller keeps to the header.
        unsafe {
            give(flag, found.is_some().into());
            if let Some(found) = found {
                give_text(name, NAME_SIZE, &found)?;
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_start_restart(name: *mut c_char) -> c_int {
    call(|| {
        let found = output::start_restart(&world()?)?;
        // SAFETY: the caller keeps to the header.
        unsafe { give_text(name, NAME_SIZE, &found) }
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blobcr_mpi_complete_restart(valid: c_int) -> c_int {
    call(|| output::complete_restart(&world()?, valid != 0))
}
