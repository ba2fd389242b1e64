//! The functions of MPI that are wrapped. Each looks whether it is time, then is what it was.
//!
//! Types and communicators are handles, see [`crate::mpi`]. A program that this library is linked
//! with or preloaded into finds these first, and the MPI library's own under their `PMPI_` names.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use crate::mpi::{Handle, symbol};
use crate::{complain, trigger};

/// The MPI library's own function of that name.
pub(crate) fn own(found: &OnceLock<usize>, name: &CStr) -> usize {
    *found.get_or_init(|| match symbol(name) {
        Some(at) => at as usize,
        None => {
            // There is nothing to return that a program could go on with.
            complain(&format!("the MPI library has no {}", name.to_string_lossy()));
            std::process::abort()
        }
    })
}

macro_rules! wrapped {
    ($name:ident = $own:literal, $before:expr, $after:expr, ($($arg:ident: $type:ty),*)) => {
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name($($arg: $type),*) -> c_int {
            static OWN: OnceLock<usize> = OnceLock::new();
            let own = own(&OWN, $own);
            // A panic ends the process, and its launcher the job: better than ranks that wait for it.
            $before;
            // SAFETY: it is the function of that name, which takes and returns the same.
            let rc = unsafe {
                std::mem::transmute::<usize, unsafe extern "C" fn($($type),*) -> c_int>(own)(
                    $($arg),*
                )
            };
            $after(rc);
            rc
        }
    };
}

macro_rules! collective {
    ($name:ident = $own:literal, $function:literal, ($($arg:ident: $type:ty),*), $comm:ident) => {
        wrapped!($name = $own, trigger::before($function, $comm), |_: c_int| (),
            ($($arg: $type,)* $comm: Handle));
    };
}

fn nothing() {}

fn begun(rc: c_int) {
    if rc == 0 {
        trigger::begin();
    }
}

wrapped!(MPI_Init = c"PMPI_Init", nothing(), begun, (argc: *mut c_int, argv: *mut c_void));
wrapped!(MPI_Init_thread = c"PMPI_Init_thread", nothing(), begun,
    (argc: *mut c_int, argv: *mut c_void, required: c_int, provided: *mut c_int));
wrapped!(MPI_Finalize = c"PMPI_Finalize", trigger::end(), |_: c_int| (), ());

// The numbers are those of crate::settings::FUNCTIONS.
collective!(MPI_Barrier = c"PMPI_Barrier", 0, (), comm);
collective!(MPI_Bcast = c"PMPI_Bcast", 1,
    (buffer: *mut c_void, count: c_int, of: Handle, root: c_int), comm);
collective!(MPI_Reduce = c"PMPI_Reduce", 2,
    (send: *const c_void, recv: *mut c_void, count: c_int, of: Handle, op: Handle, root: c_int),
    comm);
collective!(MPI_Allreduce = c"PMPI_Allreduce", 3,
    (send: *const c_void, recv: *mut c_void, count: c_int, of: Handle, op: Handle), comm);
collective!(MPI_Allgather = c"PMPI_Allgather", 4,
    (send: *const c_void, sends: c_int, of: Handle, recv: *mut c_void, recvs: c_int,
     into: Handle), comm);
collective!(MPI_Gather = c"PMPI_Gather", 5,
    (send: *const c_void, sends: c_int, of: Handle, recv: *mut c_void, recvs: c_int,
     into: Handle, root: c_int), comm);
collective!(MPI_Scatter = c"PMPI_Scatter", 6,
    (send: *const c_void, sends: c_int, of: Handle, recv: *mut c_void, recvs: c_int,
     into: Handle, root: c_int), comm);
collective!(MPI_Alltoall = c"PMPI_Alltoall", 7,
    (send: *const c_void, sends: c_int, of: Handle, recv: *mut c_void, recvs: c_int,
     into: Handle), comm);
